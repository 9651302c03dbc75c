__version__ = "0.1.0"

from sae_nb.speed import threads as threads  # before anything imports torch

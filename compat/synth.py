"""SAELens's evaluation of SAEs on known features, and ours, on inputs that both make from a seed.

PEER/bin/python compat/synth.py answers    # where SAELens 6.54.12 is: writes fixtures/synth.json
python compat/synth.py compare             # here: what differs, and by how much
"""

import json
import sys
from pathlib import Path

import numpy as np

FIXTURE = Path(__file__).parent / "fixtures" / "synth.json"
N_TOKENS, BATCH, N_TRUE, D_IN, D_SAE, K, THRESHOLD = 10_240, 1_024, 200, 48, 64, 5, 1.5


def made():
    "Sizes of features [N_TOKENS, N_TRUE], directions, offset, and the weights of an SAE, from a seed."
    rng = np.random.RandomState(0)  # its numbers are the same in every version
    rates = 0.3 / np.arange(1, N_TRUE + 1) ** 0.7
    on = rng.rand(N_TOKENS, N_TRUE) < rates
    parent = np.where(np.arange(N_TRUE) < 8, -1, np.arange(N_TRUE) // 4 - 2)
    parent[40:] = -1
    for child in np.flatnonzero(parent >= 0):
        on[:, child] = on[:, parent[child]] & (rng.rand(N_TOKENS) < 0.3)
    features = on * np.maximum(3 + 0.7 * rng.randn(N_TOKENS, N_TRUE), 0)
    D = rng.randn(N_TRUE, D_IN)
    D /= np.linalg.norm(D, axis=1, keepdims=True)
    b = 0.5 * rng.randn(D_IN) / D_IN**0.5
    W_dec = D[:D_SAE] + 0.5 * rng.randn(D_SAE, D_IN) / D_IN**0.5
    W_dec[-6:] = rng.randn(6, D_IN)  # stand for nothing
    W_dec[1] = D[0] + 0.1 * rng.randn(D_IN) / D_IN**0.5  # a second one for the first feature
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    b_enc = np.zeros(D_SAE)
    b_enc[-9:-6] = -100.0  # dead
    weights = dict(W_enc=W_dec.T, b_enc=b_enc, W_dec=W_dec, b_dec=b + 0.05)
    return dict(features=features, directions=D, b=b, parent=parent, weights=weights)


# ------------------------------------------------------------------ theirs


def their_saes(weights):
    "The same weights as a BatchTopK SAE in training, with a threshold, and as a ReLU SAE."
    import torch
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
    )

    size = dict(d_in=D_IN, d_sae=D_SAE, device="cpu", dtype="float32", apply_b_dec_to_input=True)
    out = dict(
        batchtopk=BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=K, **size)),
        threshold=JumpReLUSAE(JumpReLUSAEConfig(**size)),
        standard=StandardSAE(StandardSAEConfig(**size)),
    )
    for sae in out.values():
        for name, v in weights.items():
            getattr(sae, name).data = torch.tensor(np.ascontiguousarray(v), dtype=torch.float32)
    out["threshold"].threshold.data = torch.full((D_SAE,), THRESHOLD)
    return out


class Pieces:
    "Hands out features in the order they were made."

    def __init__(self, features):
        self.features, self.at = features, 0

    def sample(self, n):
        self.at += n
        return self.features[self.at - n : self.at]


def answers():
    "What SAELens says of each SAE."
    import sae_lens
    import torch
    from sae_lens.synthetic import FeatureDictionary, eval_sae_on_synthetic_data

    inputs = made()
    features = torch.tensor(inputs["features"], dtype=torch.float32)
    dictionary = FeatureDictionary(N_TRUE, D_IN, bias=True, initializer=None)
    dictionary.feature_vectors.data = torch.tensor(inputs["directions"], dtype=torch.float32)
    dictionary.bias.data = torch.tensor(inputs["b"], dtype=torch.float32)
    versions = {"sae-lens": sae_lens.__version__, "torch": torch.__version__, "numpy": np.__version__}
    out = dict(versions=versions)
    for name, sae in their_saes(inputs["weights"]).items():
        result = eval_sae_on_synthetic_data(sae, dictionary, Pieces(features), N_TOKENS, BATCH)
        out[name] = {key.split("/")[-1]: value for key, value in result.to_log_dict().items()}
    FIXTURE.write_text(json.dumps(out, indent=1) + "\n")


# ------------------------------------------------------------------ ours


def our_world(inputs):
    "A world that hands out the same tokens, in every part."
    import torch

    from sae_nb.truth.synth import Fired, SynthWorld

    class Same(SynthWorld):
        def sample(self, n, part="train", at=None):
            f = torch.tensor(inputs["features"][at * BATCH : at * BATCH + n], dtype=torch.float32)
            token, feature = f.nonzero(as_tuple=True)
            return f @ self.directions + self.b, Fired(n, N_TRUE, token, feature, f[token, feature])

    world = Same("1k", n_true=N_TRUE, d_in=D_IN, roots=8, depth=1, d_sae=D_SAE, apart_steps=0)
    world.directions, world.b = (torch.tensor(inputs[name]).float() for name in ("directions", "b"))
    world.parent = torch.tensor(inputs["parent"])
    return world


def our_saes(weights):
    "The same weights in our variants."
    import torch

    from sae_nb.sae import build

    out = dict(batchtopk=build("batchtopk", D_IN, D_SAE, k=K), standard=build("standard", D_IN, D_SAE))
    for sae in out.values():
        for name, v in weights.items():
            getattr(sae, name).data = torch.tensor(np.ascontiguousarray(v), dtype=torch.float32)
    out["batchtopk"].n_batches.fill_(1)
    out["batchtopk"].threshold.fill_(THRESHOLD)
    return out


def ours():
    "The same three answers: name -> {number: value}."
    from sae_nb.evals.base import Context, flat
    from sae_nb.evals.synth_truth import SynthTruth

    inputs = made()
    world = our_world(inputs)
    sizes = dict(n_tokens=N_TOKENS, batch=BATCH, beside_tokens=BATCH, probe_steps=0, ablated=0)
    numbers = {
        name: flat(SynthTruth(**sizes)(sae, Context(toy=world)))
        for name, sae in our_saes(inputs["weights"]).items()
    }
    whole, out = numbers["batchtopk"], {}
    for name, m, ending in (
        ("batchtopk", whole, ""),
        ("threshold", whole, "_at_threshold"),
        ("standard", numbers["standard"], ""),
    ):
        said = dict(sae_l0="l0", f1_score="f1")
        said |= {key: key for key in ("shrinkage", "explained_variance", "precision", "recall")}
        out[name] = {theirs: m[own + ending] for theirs, own in said.items()}
        out[name] |= dict(mcc=m["mcc"], uniqueness=m["uniqueness"], true_l0=m["true_l0"])
        out[name]["dead_latents"] = round(m["frac_dead" + ending] * D_SAE)
    return out


def gaps():
    "SAE -> {number: difference, relative where numbers exceed one}."
    theirs = json.loads(FIXTURE.read_text())
    return {
        name: {
            key: abs(v - theirs[name][key]) / max(1.0, abs(theirs[name][key])) for key, v in numbers.items()
        }
        for name, numbers in ours().items()
    }


def compare():
    for name, differences in gaps().items():
        for key, gap in sorted(differences.items(), key=lambda item: item[1]):
            print(f"{name:12} {key:20} {gap:.1e}{'   <---' if gap > 1e-3 else ''}")


if __name__ == "__main__":
    dict(answers=answers, compare=compare)[sys.argv[1]]()

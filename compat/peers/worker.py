"""Training steps of one library, on request, inside that library's environment.

    python worker.py {sae_nb,floor,dictionary_learning,sae_lens,sparsify}

Lines of JSON come in on stdin, one answer goes out on stdout for each:

    {"do": "prepare", "work": {...}}    {"do": "step", "n": 2}    {"do": "l0"}

An answer holds "error" if that failed, and "lacks" if the library has no such SAE. What the libraries print
goes to stderr. The README beside this file says which choices were made, and why.
"""

import gc
import importlib.metadata
import json
import os
import sys
import time
import traceback
import types

import numpy as np
import torch

work_defaults = dict(
    variant="topk",
    d_in=512,
    d_sae=4096,
    n_tokens=2048,
    k=32,
    seed=0,
    threads=2,
    dtype="float32",
    warm=2,
    options={},
)
lr = 1e-7  # so small that what is measured stays what was prepared; the size of a step costs nothing


def activations(w):
    "Sparse combinations of 2 d_in directions, and a little noise: [n_tokens, d_in], mean square 1."
    g = np.random.default_rng(w["seed"])
    n = w["n_tokens"]
    d = w["d_in"]
    parts = 16
    dirs = g.standard_normal((2 * d, d), dtype=np.float32)
    x = 0.1 * g.standard_normal((n, d), dtype=np.float32)
    for _ in range(parts):
        x += (
            g.exponential(1.0, (n, 1)).astype(np.float32)
            * dirs[g.integers(0, 2 * d, n)]
            / np.float32(np.sqrt(2 * parts))
        )
    return torch.from_numpy(x / np.sqrt((x**2).mean()))


def cut(z, l0):
    "What to take off all pre-activations so that `l0` of them per token stay positive."
    return z.detach().flatten().topk(round(l0 * len(z)) + 1, sorted=False).values.min()


def on_road(road):
    "Inside the `with`, steps take this road; an earlier version of this repository can run in a race too."
    try:
        from sae_nb.speed.sparse import using
    except ImportError:
        from sae_nb.sparse import only

        return only(road)
    return using(road=road)


class Ours:
    'This repository. Options: `road` "dense" forces the dense step; the rest go to the variant.'

    package, variants = "sae_nb", None

    def __init__(self, w, x):
        from sae_nb.core import Batch
        from sae_nb.sae import build, options, parts_of
        from sae_nb.train import TrainConfig, Trainee

        o = dict(w["options"])
        self.road = o.pop("road", "")
        self.batch = Batch(x)
        self.i = 0
        if w["variant"] == "matryoshka":
            o["prefixes"] = tuple(w["prefixes"])
        if "k" in options(*parts_of(w["variant"], o.get("base"))):
            o["k"] = w["k"]
        self.sae = build(w["variant"], w["d_in"], w["d_sae"], seed=w["seed"], **o).to(x.dtype)
        self.weights = self.sae.W_dec
        if w["variant"] == "standard":
            with torch.no_grad():
                self.sae.b_enc.sub_(cut(self.sae.pre(x), w["l0"]))
        self.trainee = Trainee(
            self.sae, TrainConfig(tokens=w["n_tokens"] * 10**6, batch=w["n_tokens"], lr=lr).resolve()
        )

    def step(self, warm):
        with on_road(self.road):
            self.out = self.trainee.step(self.batch, self.i)
        self.i += 1

    def l0(self):
        return float(self.out.l0)


class Floor:
    "Dense products only. Option `products`: 1 is the encoder's; 5 are those of a dense training step."

    package, variants = "torch", None

    def __init__(self, w, x):
        g = torch.Generator().manual_seed(w["seed"])
        self.x = x
        self.n = w["options"].get("products", 1)
        self.W, self.D = (
            torch.randn(s, generator=g, dtype=x.dtype)
            for s in ((w["d_in"], w["d_sae"]), (w["d_sae"], w["d_in"]))
        )
        self.weights = None

    def step(self, warm):
        z = self.x @ self.W
        if self.n == 1:
            return
        x_hat = z @ self.D  # decode
        return (
            x_hat @ self.D.T,
            z.T @ x_hat,
            self.x.T @ z,
        )  # gradients of latents, of the decoder, of the encoder

    def l0(self):
        return None


class DictionaryLearning:
    '`trainer.update(step, x)`, as `trainSAE` calls it. Option `trainer`: "april" for the other ReLU trainer.'

    package = "dictionary-learning"
    variants = ("topk", "batchtopk", "standard", "matryoshka")

    def __init__(self, w, x):
        if "nnsight" not in sys.modules:  # its activation buffer imports it; no training step does
            sys.modules["nnsight"] = types.ModuleType("nnsight")
            sys.modules["nnsight"].LanguageModel = None
        from dictionary_learning.trainers import batch_top_k, standard, top_k
        from dictionary_learning.trainers import matryoshka_batch_top_k as matryoshka

        o = w["options"]
        kw = dict(
            steps=10**7,
            activation_dim=w["d_in"],
            dict_size=w["d_sae"],
            layer=0,
            lm_name="",
            lr=lr,
            seed=w["seed"],
            device="cpu",
        )
        self.variant = w["variant"]
        self.x = x
        self.i = 0
        if self.variant == "standard":
            self.trainer = (
                standard.StandardTrainerAprilUpdate
                if o.get("trainer") == "april"
                else standard.StandardTrainer
            )(**kw)
        elif self.variant == "matryoshka":
            self.trainer = matryoshka.MatryoshkaBatchTopKTrainer(
                **kw, k=w["k"], group_fractions=[float(v) for v in np.diff([0, *w["prefixes"]])]
            )
        else:
            self.trainer = {"topk": top_k.TopKTrainer, "batchtopk": batch_top_k.BatchTopKTrainer}[
                self.variant
            ](**kw, k=w["k"])
        self.ae = self.trainer.ae.to(x.dtype)
        if self.variant == "standard":
            with torch.no_grad():
                self.ae.encoder.bias.sub_(cut(self.ae.encoder(x - self.ae.bias), w["l0"]))
        self.weights = self.ae.W_dec if self.variant == "matryoshka" else self.ae.decoder.weight

    def step(self, warm):
        self.trainer.update(
            self.i if warm else 10**4 + self.i, self.x
        )  # its start-up (the median of step 0, 1,000 steps without a threshold) is over
        self.i += 1

    @torch.no_grad()
    def l0(self):
        f = (
            self.ae.encode(self.x)
            if self.variant == "standard"
            else self.ae.encode(self.x, use_threshold=False)
        )
        return float((f != 0).float().sum(-1).mean())


class SAELens:
    "One turn of `SAETrainer.fit`. Options: `sparse` for use_sparse_activations, `compile` for compile_sae."

    package = "sae-lens"
    variants = ("topk", "batchtopk", "standard", "matryoshka")

    def __init__(self, w, x):
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes import batchtopk_sae, matryoshka_batchtopk_sae, standard_sae, topk_sae
        from sae_lens.training.sae_trainer import SAETrainer

        o = w["options"]
        kw = dict(d_in=w["d_in"], d_sae=w["d_sae"], dtype=w["dtype"], device="cpu")
        if w["variant"] != "standard":
            kw.update(k=w["k"])
        if o.get("sparse"):
            kw.update(use_sparse_activations=True)
        if w["variant"] == "matryoshka":
            kw.update(matryoshka_widths=[round(p * w["d_sae"]) for p in w["prefixes"]])
        module, name = {
            "standard": (standard_sae, "Standard"),
            "topk": (topk_sae, "TopK"),
            "batchtopk": (batchtopk_sae, "BatchTopK"),
            "matryoshka": (matryoshka_batchtopk_sae, "MatryoshkaBatchTopK"),
        }[w["variant"]]
        torch.manual_seed(w["seed"])
        self.sae = getattr(module, name + "TrainingSAE")(getattr(module, name + "TrainingSAEConfig")(**kw))
        if w["variant"] == "standard":
            with torch.no_grad():
                self.sae.b_enc.sub_(cut(self.sae.encode_with_hidden_pre(x)[1], w["l0"]))
        if o.get("compile"):  # as its runner does
            self.sae.training_forward_pass = torch.compile(
                self.sae.training_forward_pass, mode=None, backend="inductor"
            )
        cfg = SAETrainerConfig(
            total_training_samples=w["n_tokens"] * 10**6,
            train_batch_size_samples=w["n_tokens"],
            lr=lr,
            lr_end=lr,
            device="cpu",
        )
        self.trainer = SAETrainer(cfg, self.sae, iter(lambda: x, None))
        self.weights = self.sae.W_dec

    def step(self, warm):
        t = self.trainer
        t.maybe_reset_sparsity()
        self.out = t.step(next(t.data_provider))
        t._checkpoint_if_needed()
        t.n_training_steps += 1

    def l0(self):
        return float(self.out.feature_acts.detach().to_dense().ne(0).float().sum(-1).mean())


class Sparsify:
    "`Trainer.fit`, hooked to a module that hands out the batch. Options: `optimizer`, `micro_acc_steps`."

    package, variants = "eai-sparsify", ("topk",)

    def __init__(self, w, x):
        import sparsify.trainer
        from sparsify import SparseCoderConfig, TrainConfig, Trainer

        sparsify.trainer.tqdm = lambda **kw: _Quiet()
        self.source = _Source(x)
        self.data = _Tokens(10**6, w["n_tokens"])
        cfg = TrainConfig(
            SparseCoderConfig(num_latents=w["d_sae"], k=w["k"]),
            batch_size=1,
            hookpoints=["acts"],
            init_seeds=[w["seed"]],
            log_to_wandb=False,
            lr=lr,
            save_every=10**9,
            **w["options"],
        )
        self.trainer = Trainer(cfg, self.data, self.source)
        self.trainer.save = lambda: None
        self.sae = self.trainer.saes["acts"]
        self.x = x
        self.weights = self.sae.W_dec

    def steps(self, n):
        self.data.n = n
        self.source.starts = []
        self.trainer.fit()
        (t, c), *_ = (
            self.source.starts
        )  # from the first batch on: what `fit` does before it happens once in a training
        return dict(seconds=time.perf_counter() - t, processor=time.process_time() - c)

    def step(self, warm):
        self.steps(1)

    @torch.no_grad()
    def l0(self):
        return float((self.sae.encode(self.x).top_acts > 0).float().sum(-1).mean())


class _Source(torch.nn.Module):
    "What sparsify takes for the language model: its one layer puts out the batch."

    def __init__(self, x):
        super().__init__()
        self.x = x[None]
        self.acts = torch.nn.Identity()
        self.starts = []
        self.device = torch.device("cpu")
        self.dummy_inputs = {}

    base_model = property(lambda self: self)

    def forward(self, *args):
        self.starts.append((time.perf_counter(), time.process_time()))
        return self.acts(self.x)


class _Tokens:
    "Its data: `n` rows of token numbers that nobody reads."

    def __init__(self, n, length):
        self.n = n
        self.row = dict(input_ids=torch.zeros(length, dtype=torch.long))

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.row

    def select(self, rows):
        return self


class _Quiet:
    def update(self, *a):
        pass

    def close(self):
        pass


libraries = dict(
    sae_nb=Ours, floor=Floor, dictionary_learning=DictionaryLearning, sae_lens=SAELens, sparsify=Sparsify
)


class Worker:
    def __init__(self, name):
        self.make = libraries[name]
        self.now = None

    def prepare(self, work):
        unknown = set(work) - set(work_defaults) - {"l0", "prefixes"}
        if unknown:
            raise ValueError(f"work has no {', '.join(sorted(unknown))}")
        w = {**work_defaults, **work}
        if self.make.variants and w["variant"] not in self.make.variants:
            return dict(lacks=w["variant"])
        torch.set_num_threads(w["threads"])
        self.now = None
        gc.collect()
        x = activations(w).to(getattr(torch, w["dtype"]))
        self.now = self.make(w, x)
        before = None if self.now.weights is None else self.now.weights.detach().clone()
        for _ in range(w["warm"]):
            self.now.step(True)
        moved = None if before is None else not torch.equal(before, self.now.weights.detach())
        return dict(
            version=importlib.metadata.version(self.make.package),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            data=round(float(x.double().pow(2).sum() + x.double().abs().sum()), 3),
            moved=moved,
            l0=self.now.l0(),
        )

    def step(self, n=1):
        if hasattr(self.now, "steps"):
            return self.now.steps(n)
        t, c = time.perf_counter(), time.process_time()
        for _ in range(n):
            self.now.step(False)
        return dict(seconds=time.perf_counter() - t, processor=time.process_time() - c)

    def l0(self):
        return dict(l0=self.now.l0())


def serve(name):
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    w = Worker(name)
    for line in sys.stdin:
        try:
            say = json.loads(line)
            do = say.pop("do")
            if do not in ("prepare", "step", "l0"):
                raise ValueError(f"cannot {do}")
            answer = getattr(w, do)(**say)
        except Exception as e:
            traceback.print_exc()
            answer = dict(error=f"{type(e).__name__}: {e}".splitlines()[0][:300])
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in libraries:
        sys.exit(f"usage: worker.py {{{','.join(libraries)}}}")
    serve(sys.argv[1])

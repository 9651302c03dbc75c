"""Tokens per second of one TopK training step on a GPU, beside what other libraries run and beside the product that bounds it.

    python compat/gpu.py [--quick] [--out results.json] [--limit 480]   # an NVIDIA GPU, torch, triton; nothing else is needed
    python compat/gpu.py --compile                                      # no GPU: builds every kernel for compute capability 9.0
    [TRITON_INTERPRET=1] python compat/gpu.py --cpu                     # no GPU: the whole script at toy sizes

One recipe for all arms: weights, gradients and Adam's moments in float32; matrix products and activations in bfloat16 (autocast, or a
bfloat16 copy of the weights); loss = squared error summed over d_in, averaged over tokens; decoder gradient projected, all gradients
clipped to norm 1 together, fused Adam, decoder rows brought back to length one. Nothing is asked of the GPU within a step, save where
a peer does so itself. Peers get the same fused Adam and no auxiliary loss.
"""

import argparse
import contextlib
import datetime
import importlib.machinery
import importlib.util
import itertools
import json
import platform
import signal
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

spec = importlib.util.spec_from_file_location(
    "cuda", Path(__file__).resolve().parent.parent / "sae_nb/speed/cuda.py"
)
S = importlib.util.module_from_spec(spec)
sys.modules["cuda"] = S
spec.loader.exec_module(S)
LR, BETAS, CLIP = 1e-4, (0.9, 0.999), 1.0


class OutOfTime(BaseException):
    pass


def ring(*_):
    raise OutOfTime


# ------------------------------------------------------------------ the work


class Work:
    "Weights to start from and batches to train on: some directions stronger than others, a mean, so that a few latents are on in very many tokens"

    def __init__(self, d_in, d_sae, n, k, device, batches=4):
        self.d_in, self.d_sae, self.n, self.k, self.device = d_in, d_sae, n, k, device
        g = torch.Generator(device).manual_seed(0)

        def draw(*s):
            return torch.randn(*s, generator=g, device=device)

        scale = (1 + torch.arange(d_in, device=device)) ** -0.25
        mean = draw(d_in) * scale
        self.x = [(draw(n, d_in) * scale + mean).bfloat16() for _ in range(batches)]
        self.W = F.normalize(draw(d_sae, d_in), dim=1)

    def tensors(self):  # encoder and decoder [d_sae, d_in], their biases
        return (
            self.W.clone(),
            torch.zeros(self.d_sae, device=self.device),
            self.W.clone(),
            torch.zeros(self.d_in, device=self.device),
        )


def half(device):
    return torch.autocast(device.split(":")[0], torch.bfloat16)


def project_(g, W):
    g.sub_((g * W).sum(1, keepdim=True) * W)


def unit_(W):
    W.div_(W.norm(dim=1, keepdim=True).clamp_min(1e-8))


class Dense:
    "What autograd does with the formulas: every product dense"

    def __init__(self, w):
        self.w = w
        self.p = [torch.nn.Parameter(t) for t in w.tensors()]
        self.opt = torch.optim.Adam(self.p, lr=LR, betas=BETAS, fused=True)

    def select(self, z):
        return z.topk(self.w.k, dim=-1, sorted=False)

    def gradients(self, x):
        E, b, D, c = self.p
        with half(self.w.device):
            z = F.linear(x - c, E, b)
            vals, cols = self.select(z)
            f = torch.zeros_like(z).scatter(-1, cols, vals.relu())
            loss = (f @ D + c - x).float().square().sum(-1).mean()
        loss.backward()
        project_(D.grad, D.data)
        return loss.detach()

    def step(self, x):
        loss = self.gradients(x)
        torch.nn.utils.clip_grad_norm_(self.p, CLIP)
        self.opt.step()
        unit_(self.p[2].data)
        self.opt.zero_grad(set_to_none=True)
        return loss


class DenseTies(Dense):
    "The same with ties in the top k settled to the left, as ours are: in bfloat16 many latents share the last place"

    def select(self, z):
        cols = S.topk(z.detach(), self.w.k)[1]
        return z.gather(-1, cols), cols


class Ours:
    "Dense encoder product, everything after it along the active latents; the optimiser as everywhere"

    one_pass = False

    def __init__(self, w):
        self.w = w
        self.p = [torch.nn.Parameter(t) for t in w.tensors()]
        self.low = [self.p[0].data.bfloat16(), self.p[2].data.bfloat16()]
        self.starts = torch.arange(0, w.n * w.k + 1, w.k, device=w.device)
        self.opt = torch.optim.Adam(self.p[1::2] if self.one_pass else self.p, lr=LR, betas=BETAS, fused=True)
        if self.one_pass:
            self.t, self.moments = 0, [torch.zeros_like(self.p[i].data) for i in (0, 0, 2, 2)]

    @torch.no_grad()
    def gradients(self, x):
        (E, b, D, c), (E16, D16), w = self.p, self.low, self.w

        def rounded(f, *o):
            return f(*o, out=torch.empty_like(x))  # one pass, no float32 copy

        seen = rounded(torch.sub, x, c)
        z = torch.addmm(b.bfloat16(), seen, E16.T)
        vals, cols = S.topk(z, w.k)
        del z
        a, v = S.Places(cols.flatten(), self.starts, w.d_sae, w.k), vals.relu().flatten()
        e = S.spmm(a, v, D16, dtype=torch.float32).add_(c).sub_(x)
        loss = torch.linalg.vector_norm(e).square() / w.n
        g16 = rounded(torch.mul, e, 2 / w.n)
        gv = S.sampled(a, g16, D16) * (v > 0)
        r = S.spmm_t2(a, v, g16, gv, seen, W=D.data if self.one_pass else None)
        gb = S.latent_sums(a, gv)
        gc = e.sum(0) * (2 / w.n) - (gb.bfloat16()[None] @ E16)[0].float()
        D.grad, E.grad, b.grad, c.grad = r[0], r[1], gb, gc
        if self.one_pass:
            self.stats = r[2]
        else:
            project_(D.grad, D.data)
        return loss

    @torch.no_grad()
    def step(self, x):
        loss = self.gradients(x)
        E, b, D, c = self.p
        torch.nn.utils.clip_grad_norm_(self.p, CLIP)
        self.opt.step()
        unit_(D.data)
        self.low[0].copy_(E.data)
        self.low[1].copy_(D.data)
        for p in self.p:
            p.grad = None
        return loss


class OnePass(Ours):
    "The same; clip, projection, Adam, normalisation and the bfloat16 copy in one pass over each matrix"

    one_pass = True

    @torch.no_grad()
    def step(self, x):
        loss = self.gradients(x)
        (E, b, D, c), (m, v, m2, v2) = self.p, self.moments
        f = S.clip_factor(self.stats, b.grad, c.grad, clip=CLIP)
        self.t += 1
        S.adam_rows(E.data, E.grad, m, v, self.t, f, LR, BETAS, low=self.low[0])
        S.adam_rows(D.data, D.grad, m2, v2, self.t, f, LR, BETAS, along=self.stats[1], low=self.low[1])
        b.grad *= f
        c.grad *= f
        self.opt.step()
        for p in self.p:
            p.grad = None
        return loss


# ------------------------------------------------------------------ other libraries, where they are installed


@contextlib.contextmanager
def without(*names):
    "Lets a library be imported without packages that it reads text, models or logs with and that a training step never touches"
    missing = [n for n in names if n not in sys.modules and importlib.util.find_spec(n) is None]
    sys.modules.update({n: mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(n, None)) for n in missing})
    try:
        yield
    finally:
        for n in missing:
            sys.modules.pop(n, None)


class DictionaryLearning:
    def __init__(self, w):
        with without("nnsight", "datasets", "wandb", "zstandard"):
            from dictionary_learning.trainers.top_k import TopKTrainer
        self.w, self.i = w, 1  # step 0 would look for a median
        self.t = t = TopKTrainer(
            steps=10**9,
            activation_dim=w.d_in,
            dict_size=w.d_sae,
            k=w.k,
            layer=0,
            lm_name="",
            auxk_alpha=0,
            lr=LR,
            warmup_steps=0,
            device=w.device,
            seed=0,
        )
        E, b, D, c = w.tensors()
        t.ae.encoder.weight.data, t.ae.encoder.bias.data, t.ae.decoder.weight.data, t.ae.b_dec.data = (
            E,
            b,
            D.T.contiguous(),
            c,
        )
        for group in t.optimizer.param_groups:
            group.update(fused=True, foreach=False)

    def step(self, x):
        self.i += 1
        with half(self.w.device):
            return self.t.update(self.i, x)


class SAELens:
    def __init__(self, w):
        from sae_lens.saes.sae import TrainStepInput
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        self.w = w
        self.sae = s = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=w.d_in, d_sae=w.d_sae, k=w.k, device=w.device, dtype="float32", aux_loss_coefficient=0.0
            )
        )
        E, b, D, c = w.tensors()
        s.W_enc.data, s.b_enc.data, s.W_dec.data, s.b_dec.data = E.T.contiguous(), b, D, c
        self.opt = torch.optim.Adam(s.parameters(), lr=LR, betas=BETAS, fused=True)
        self.given = lambda x: TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False
        )

    def step(self, x):
        with half(self.w.device):
            loss = self.sae.training_forward_pass(self.given(x)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), CLIP)
        self.opt.step()
        self.opt.zero_grad()
        return loss.detach()


class Sparsify:
    def __init__(self, w):
        with without("datasets"):
            from sparsify.config import SparseCoderConfig
            from sparsify.sparse_coder import SparseCoder
        self.w = w
        self.sae = s = SparseCoder(
            w.d_in, SparseCoderConfig(num_latents=w.d_sae, k=w.k), device=w.device, dtype=torch.float32
        )
        E, b, D, c = w.tensors()
        s.encoder.weight.data, s.encoder.bias.data, s.W_dec.data, s.b_dec.data = E, b, D, c
        self.opt = torch.optim.Adam(s.parameters(), lr=LR, betas=BETAS, fused=True)

    def step(self, x):
        x = x.float()
        variance = (x - x.mean(0)).square().sum()
        fvu = self.sae(x, total_variance=variance).fvu
        fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), CLIP)
        self.opt.step()
        self.sae.set_decoder_norm_to_unit_norm()
        self.opt.zero_grad()
        return fvu.detach() * variance / len(x)


class Floor:
    "The encoder product alone, nothing kept but its result"

    def __init__(self, w):
        self.low, self.b = w.W.bfloat16(), torch.zeros(w.d_sae, device=w.device, dtype=torch.bfloat16)
        self.z = torch.empty(w.n, w.d_sae, device=w.device, dtype=torch.bfloat16)

    def step(self, x):
        return torch.addmm(self.b, x, self.low.T, out=self.z)


ARMS = {
    "encoder product": Floor,
    "ours, one-pass Adam": OnePass,
    "ours": Ours,
    "dense": Dense,
    "dictionary_learning": DictionaryLearning,
    "sae_lens": SAELens,
    "sparsify": Sparsify,
}

# ------------------------------------------------------------------ measuring


def wait():
    torch.cuda.is_available() and torch.cuda.synchronize()


def timed(go, xs, reps):
    "Milliseconds of one call, on the GPU's own clock where there is one"
    if not xs[0].is_cuda:
        t = time.perf_counter()
        for i in range(reps):
            go(xs[i % len(xs)])
        return (time.perf_counter() - t) * 1e3 / reps
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    wait()
    a.record()
    for i in range(reps):
        go(xs[i % len(xs)])
    b.record()
    wait()
    return a.elapsed_time(b) / reps


def interleave(gos, xs, rounds, reps, deadline):
    "Milliseconds of every arm in every round, the order turned round each time; an arm that fails leaves"
    ms, why = {n: [] for n in gos}, {}
    for r in range(rounds):
        if time.time() > deadline:
            break
        for n in list(gos)[:: 1 if r % 2 == 0 else -1]:
            if n in why:
                continue
            try:
                ms[n].append(timed(gos[n], xs, reps))
            except Exception as e:
                why[n] = reason(e)
    return ms, why


def reason(e):
    if isinstance(e, ModuleNotFoundError):
        return f"not installed ({e.name})"
    return (
        f"{type(e).__name__}: {str(e).strip().splitlines()[0][:110]}" if str(e).strip() else type(e).__name__
    )


def off(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def check_kernels(w):
    "Each kernel against its dense formula in float64, on numbers of this run; ||out - formula|| / ||formula||"
    n, m, k = min(w.n, 2048), min(w.d_sae, 4096), w.k
    out = {}
    S.long, long = min(S.long, n // 2), S.long  # the latent that is always on is cut into pieces
    for dtype in (torch.float32, torch.bfloat16):
        g = torch.Generator(w.device).manual_seed(1)

        def draw(*s):
            return torch.randn(*s, generator=g, device=w.device).to(dtype)

        X, Y, W = draw(n, w.d_in), draw(n, w.d_in), draw(m, w.d_in)
        z = X.float() @ W.float().T
        z[:, 0] = 1e9
        z = z.to(dtype)  # latent 0: on in every token
        vals, cols = S.topk(z, k)
        assert torch.equal(vals.sort(-1, descending=True).values, z.topk(k).values) and torch.equal(
            z.gather(1, cols), vals
        ), "topk"
        a = S.Places(cols.flatten(), torch.arange(0, n * k + 1, k, device=w.device), m, k)
        v, u = draw(n * k), draw(n * k)

        def dense(v):
            return torch.zeros(n, m, dtype=torch.float64, device=w.device).index_put(
                (a.rows, a.cols), v.double()
            )

        G, H, stats = S.spmm_t2(a, v, X, u, Y, W=W.float())
        G0, H0, W0 = dense(v).T @ X.double(), dense(u).T @ Y.double(), W.double()
        e = {
            "spmm": off(S.spmm(a, v, W), dense(v) @ W0),
            "spmm_t": off(S.spmm_t(a, v, X), G0),
            "sampled": off(S.sampled(a, X, W), (X.double() @ W0.T)[a.rows, a.cols]),
            "spmm_t2": max(off(G, G0), off(H, H0)),
            "stats": max(
                off(s, t)
                for s, t in zip(
                    stats, ((G0 * G0).sum(1), (G0 * W0).sum(1), (W0 * W0).sum(1), (H0 * H0).sum(1))
                )
            ),
            "latent_sums": off(S.latent_sums(a, v), dense(v).sum(0)),
        }
        again = S.spmm_t2(a, v, X, u, Y)
        e["repeats"] = 0.0 if torch.equal(again[0], G) and torch.equal(again[1], H) else 1.0
        tight = 2e-5 if dtype == torch.float32 else 8e-3
        out[str(dtype)[6:]] = e
        print(
            f"kernels against float64, {str(dtype)[6:]}: " + ", ".join(f"{n} {x:.1e}" for n, x in e.items()),
            "| ok" if max(e.values()) < tight else "| WRONG",
            flush=True,
        )
    S.long = long
    return out


def check_steps(arms, w, steps=3):
    "Gradients of the first step, losses and weights of the first few, beside the dense step's; bfloat16 rounding is the tolerance"
    dense = DenseTies(w)
    dense.gradients(w.x[0])
    ref = [p.grad for p in dense.p]
    out = {}
    for n, cls in arms.items():
        a = cls(w)
        a.gradients(w.x[0])
        g = [p.grad for p in a.p]
        if a.one_pass:
            project_(g[2], a.p[2].data)
        e = {f"grad {s}": off(p, q) for s, p, q in zip(("W_enc", "b_enc", "W_dec", "b_dec"), g, ref)}
        for p in a.p:
            p.grad = None
        d = DenseTies(w)
        e["loss"] = max(
            abs(float(a.step(x)) / float(d.step(x)) - 1)
            for x in itertools.islice(itertools.cycle(w.x), steps)
        )

        def moved(o):
            return torch.cat([(p.data - q).flatten() for p, q in zip(o.p, w.tensors())])

        e["weights' way"] = off(moved(a), moved(d))
        bad = max(v for k, v in e.items() if "grad" in k) > 0.03 or e["loss"] > (
            5e-3 if S.interpreted else 1e-3
        )  # the interpreter cuts bfloat16 off where a GPU rounds
        out[n] = dict(e, ok=not bad)
        print(
            f"{n} against dense: " + ", ".join(f"{k} {v:.1e}" for k, v in e.items()),
            "| WRONG" if bad else "| ok",
            flush=True,
        )
        del a, d
    return out


def parts(w):
    "The pieces of our step, each by itself, and torch.topk beside ours"
    o = OnePass(w)
    x = w.x[0]
    o.step(x)
    c = o.p[3].data
    f = torch.ones((), device=w.device)
    seen = (x - c).bfloat16()
    z = torch.addmm(o.p[1].data.bfloat16(), seen, o.low[0].T)
    vals, cols = S.topk(z, w.k)

    def place():
        return S.Places(cols.flatten(), o.starts, w.d_sae, w.k)

    a, v = place(), vals.flatten()
    a.rows
    a.by_latent
    m = o.moments
    D = o.p[2].data
    gD, gE, stats = S.spmm_t2(a, v, seen, v, seen, W=D)
    n_on = a.by_latent[1].diff().float()
    print(
        f"latents on in this batch {int((n_on > 0).sum())} of {w.d_sae}; busiest in {float(n_on.max()) / w.n:.0%} of tokens",
        flush=True,
    )

    def adam(p, g, i, **kw):
        return S.adam_rows(p, g, m[i], m[i + 1], 1, f, 0.0, BETAS, **kw)

    return {
        "topk": lambda _: S.topk(z, w.k),
        "torch.topk": lambda _: z.topk(w.k, dim=-1, sorted=False),
        "order by latent": lambda _: place().by_latent,
        "spmm": lambda _: S.spmm(a, v, o.low[1]),
        "sampled": lambda _: S.sampled(a, seen, o.low[1]),
        "both weight gradients": lambda _: S.spmm_t2(a, v, seen, v, seen, W=D),
        "one weight gradient": lambda _: S.spmm_t(a, v, seen, dtype=torch.float32),
        "Adam, encoder": lambda _: adam(o.p[0].data, gE, 0, low=o.low[0]),
        "Adam, decoder": lambda _: adam(D, gD, 2, along=stats[1], low=o.low[1]),
    }


def tune(w, reps, deadline):
    "Other tiles for the kernels; prints the best of each, changes nothing"
    kept, p = dict(S.shape), parts(w)
    for name, part, choices in (
        ("segments", "both weight gradients", itertools.product((8, 16, 32), (128, 256, 512), (4, 8))),
        ("segments", "spmm", itertools.product((8, 16, 32), (128, 256, 512), (4, 8))),
        ("sampled", "sampled", itertools.product((8, 16, 32), (128, 256, 512), (4, 8))),
        ("groups", "topk", itertools.product((1024, 4096, 16384), (2, 4, 8))),
        ("adam", "Adam, decoder", itertools.product((256, 512, 1024), (2, 4, 8))),
    ):
        ms = {}
        for c in choices:
            if time.time() > deadline:
                break
            if name in ("segments", "sampled") and c[0] * c[1] // (32 * c[2]) > 64:
                continue  # more than the registers hold
            S.shape[name] = c
            try:
                p[part](None)
                wait()
                ms[c] = statistics.median(timed(p[part], w.x[:1], reps) for _ in range(3))
            except Exception as e:
                print(name, c, reason(e))
        S.shape.update(kept)
        print(
            f"d_sae {w.d_sae}, {part}: now {kept[name]} {ms.get(kept[name], float('nan')):.3f} ms; best "
            + ", ".join(f"{c} {t:.3f}" for c, t in sorted(ms.items(), key=lambda i: i[1])[:4]),
            flush=True,
        )


# ------------------------------------------------------------------ without a GPU: does everything build?


def compile_all():
    "Builds each kernel as a step at full size would call it, for compute capability 9.0; registers and bytes spilled"
    import re
    import subprocess
    import tempfile

    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

    triton.runtime.driver.set_active(Driver())
    made = {}

    def launch(t, kernel, grid, *args, **kw):
        made.setdefault(
            (kernel.__name__, str(t.dtype)[6:], *kw.items()), kernel.run(*args, grid=grid, warmup=True, **kw)
        )

    S._launch, S.interpreted = launch, True
    for dtype, d in ((torch.bfloat16, 2304), (torch.float32, 2304), (torch.bfloat16, 1000)):
        n, m, k = 16, 4096, 64
        z, X, W = torch.randn(n, m).to(dtype), torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
        vals, cols = z.topk(k)
        v = vals.flatten()
        S.topk(z, 16)
        for per in (k, 0):
            a = S.Places(cols.flatten(), torch.arange(0, n * k + 1, k), m, per)
            S.spmm(a, v, W)
            S.spmm_t(a, v, X)
            S.spmm_t2(a, v, X, v, X, W=W.float())
            S.sampled(a, X, W)
            S.latent_sums(a, v)
        p, low = torch.zeros(n, d), torch.zeros(n, d, dtype=torch.bfloat16)
        for along in (None, p[:, 0].contiguous()):
            S.adam_rows(p, p, p, p, 1, torch.ones(()), along=along, low=low)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    worst = {}
    for (name, dtype, *kw), k in made.items():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(k.asm["cubin"])
            f.flush()
            use = dict(
                re.findall(
                    r"(REG|STACK|LOCAL):(\d+)",
                    subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True).stdout,
                )
            )
            wide = len(
                re.findall(
                    r"LDG\.E\.128",
                    subprocess.run([tool, "-sass", f.name], capture_output=True, text=True).stdout,
                )
            )
        worst.setdefault((name, dtype), []).append(
            (int(use["REG"]), int(use["STACK"]) + int(use["LOCAL"]), wide)
        )
    print(f"triton {triton.__version__}, compute capability 9.0: {len(made)} kernels built")
    for (name, dtype), u in sorted(worst.items()):
        print(
            f"{name:10s} {dtype:9s} registers <= {max(r for r, _, _ in u):3d}   spilled {max(s for _, s, _ in u)} bytes   16-byte loads {min(l for *_, l in u)} to {max(l for *_, l in u)}"
        )


# ------------------------------------------------------------------ the run


def table(results):
    for size, r in results["sizes"].items():
        floor, rows = r["arms"].get("encoder product", {}).get("ms"), r["arms"]
        print(
            f"\n{size}: d_in {r['d_in']}, d_sae {r['d_sae']}, {r['n']} tokens, k {r['k']}"
            + (
                f"; encoder product {2e-9 * r['n'] * r['d_in'] * r['d_sae'] / floor:.1f} TFLOP/s"
                if floor
                else ""
            )
        )
        print(
            f"  {'arm':22s} {'ms':>9s} {'low':>9s} {'high':>9s} {'tokens/s':>12s} {'x floor':>8s} {'x dense':>8s} {'GiB':>7s} {'loss':>10s}  note"
        )
        dense = rows.get("dense", {}).get("ms")
        for n, a in rows.items():
            if a.get("ms") is None:
                print(f"  {n:22s} {a.get('note', '')}")
                continue
            of, gib = (
                lambda t: f"{a['ms'] / t:8.2f}" if t else " " * 8,
                "" if a["gib"] is None else f"{a['gib']:.2f}",
            )
            print(
                f"  {n:22s} {a['ms']:9.3f} {a['low']:9.3f} {a['high']:9.3f} {r['n'] / a['ms'] * 1e3:12,.0f} {of(floor)} {of(dense)} {gib:>7s} {a.get('loss', float('nan')):10.4f}  {a.get('note', '')}"
            )
        for n, t in r.get("parts", {}).items():
            print(f"    part: {n:24s} {t:9.3f} ms" + (f" {t / floor:8.2f} x floor" if floor else ""))


def run_size(r, w, names, rounds, warm, reps, deadline):
    cuda = w.device.startswith("cuda")
    arms = {}
    xs = w.x
    for n in names:
        row = r["arms"][n]
        if time.time() > deadline:
            break
        try:
            wait()
            before = torch.cuda.memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            arm = ARMS[n](w)
            for i in range(warm):
                loss = arm.step(xs[i % len(xs)])
            wait()
            arms[n] = arm.step
            row["gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
            if n != "encoder product":
                row["loss"] = float(loss)
        except Exception as e:
            row["note"] = reason(e)
            arm = None
            if cuda:
                torch.cuda.empty_cache()
    ms, why = interleave(arms, xs, rounds, reps, deadline)
    for n, t in ms.items():
        if t:
            r["arms"][n].update(note="", ms=statistics.median(t), low=min(t), high=max(t), rounds=t)
        if n in why or len(t) < rounds:
            r["arms"][n]["note"] = why.get(n, f"{len(t)} of {rounds} rounds: out of time")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--quick", action="store_true", help="three rounds, the smaller dictionary only")
    add("--cpu", action="store_true", help="toy sizes on the CPU")
    add("--compile", action="store_true", help="build the kernels for compute capability 9.0, no GPU needed")
    add("--tune", action="store_true", help="try other tile sizes first")
    add("--out", help="results as JSON")
    add("--limit", type=float, default=480, help="seconds after which what is left is skipped")
    add(
        "--arms",
        default=",".join(ARMS).replace(", ", "; "),
        help="which, separated by commas (a comma within a name is written ;)",
    )
    add("--sizes", default="", help="d_sae, separated by commas")
    o = p.parse_args()
    if o.compile:
        return compile_all()
    if not o.cpu and not torch.cuda.is_available():
        sys.exit("no GPU here: --cpu runs everything at toy sizes, --compile builds the kernels")
    start = time.time()
    deadline = start + o.limit * 0.9
    device = "cpu" if o.cpu else "cuda"
    d_in, n, k, sizes, rounds, warm, reps = (
        (2304, 8192, 64, (16384, 65536), 9, 3, 5)
        if not o.cpu
        else (72, 24, 2, (128, 256), 2, 2, 1)
        if S.interpreted
        else (256, 512, 16, (2048, 8192), 7, 2, 2)
    )
    if o.quick:
        sizes, rounds = sizes[:1], 3
    if o.sizes:
        sizes = tuple(map(int, o.sizes.split(",")))
    names = [a.replace(";", ",") for a in o.arms.split(",")]
    torch.backends.cuda.matmul.allow_tf32 = False
    about = {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": S.triton.__version__ if S.triton else "not installed",
        "kernels": "Triton"
        if device == "cuda" and S.triton
        else "Triton's interpreter"
        if S.interpreted
        else "plain torch",
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    results = {
        "about": about,
        "recipe": "float32 weights, gradients and moments; bfloat16 products and activations; projected decoder gradient, clip 1, fused Adam, unit decoder rows",
        "sizes": {},
    }
    for s, f in ((signal.SIGALRM, ring), (signal.SIGTERM, ring)):
        signal.signal(s, f)
    signal.alarm(int(o.limit))
    for d_sae in sizes:
        results["sizes"][f"d_sae {d_sae}"] = dict(
            d_in=d_in,
            d_sae=d_sae,
            n=n,
            k=k,
            arms={a: dict(note="not measured: out of time") for a in names},
            parts={},
        )
    try:
        for r in results["sizes"].values():
            d_sae = r["d_sae"]
            if time.time() > deadline:
                continue
            try:
                w = Work(d_in, d_sae, n, k, device)
                r["kernels"] = check_kernels(w)
                r["steps"] = check_steps(
                    {a: c for a, c in ARMS.items() if a in names and issubclass(c, Ours)}, w
                )
            except Exception as e:
                print(f"check failed, d_sae {d_sae}: {reason(e)}", flush=True)
                r["check"] = reason(e)
            if device == "cuda":
                torch.cuda.empty_cache()
            try:
                if o.tune:
                    tune(w, reps, time.time() + 0.4 * (deadline - time.time()))
                run_size(r, w, names, rounds, warm, reps, deadline)
                if device == "cuda":
                    torch.cuda.empty_cache()
                ps = parts(w)
                for go in ps.values():
                    go(None)
                r["parts"] = {
                    a: statistics.median(t)
                    for a, t in interleave(ps, w.x[:1], rounds, reps, deadline)[0].items()
                    if t
                }
                del ps
            except Exception as e:
                r["note"] = reason(e)
                print(f"d_sae {d_sae}: {r['note']}", flush=True)
            for a, c in r.get("steps", {}).items():
                if not c["ok"] and a in r["arms"]:
                    r["arms"][a]["note"] = "WRONG: differs from the dense step"
            if device == "cuda":
                torch.cuda.empty_cache()
    except OutOfTime:
        print("out of time: what is missing was not measured")
    finally:
        signal.alarm(0)
        results["seconds"] = time.time() - start
        if o.out:
            Path(o.out).write_text(json.dumps(results, indent=1))
        print("\n" + "\n".join(f"{k}: {v}" for k, v in about.items()) + "\nrecipe: " + results["recipe"])
        table(results)


if __name__ == "__main__":
    main()

"""Tokens per second of one TopK training step on a GPU.

It is measured beside what other libraries run and beside the encoder product, which bounds it.

    python compat/gpu.py [--quick] [--out results.json] [--limit 480]   # an NVIDIA GPU, torch and triton
    python compat/gpu.py --compile                    # no GPU: builds every kernel for compute capability 9.0
    [TRITON_INTERPRET=1] python compat/gpu.py --cpu   # no GPU: the whole script at toy sizes

One recipe for all arms: weights, gradients and Adam's moments in float32; matrix products and activations in
bfloat16 (autocast, or a bfloat16 copy of the weights); loss = squared error summed over d_in, averaged over
tokens; decoder gradient projected, all gradients clipped to norm 1 together, fused Adam, decoder rows brought
back to length one. Nothing is asked of the GPU within a step, save where a peer does so itself. Peers get the
same fused Adam and no auxiliary loss.
"""

import argparse
import contextlib
import datetime
import importlib.machinery
import importlib.util
import itertools
import json
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F


def load_kernels():
    "`sae_nb.speed.cuda` from its file, so that the package need not be installed."
    file = Path(__file__).resolve().parent.parent / "sae_nb/speed/cuda.py"
    spec = importlib.util.spec_from_file_location("cuda", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda"] = module
    spec.loader.exec_module(module)
    return module


S = load_kernels()
LR, BETAS, CLIP = 1e-4, (0.9, 0.999), 1.0


class OutOfTime(BaseException):
    pass


def ring(*_):
    raise OutOfTime


# ------------------------------------------------------------------ the work


class Work:
    """Weights to start from and batches to train on.

    Directions differ in strength and there is a mean, so that a few latents are on in very many tokens.
    """

    def __init__(self, d_in, d_sae, n, k, device, batches=4):
        self.d_in, self.d_sae, self.n, self.k, self.device = d_in, d_sae, n, k, device
        g = torch.Generator(device).manual_seed(0)

        def draw(*s):
            return torch.randn(*s, generator=g, device=device)

        scale = (1 + torch.arange(d_in, device=device)) ** -0.25
        mean = draw(d_in) * scale
        self.x = [(draw(n, d_in) * scale + mean).bfloat16() for _ in range(batches)]
        self.W = F.normalize(draw(d_sae, d_in), dim=1)

    def tensors(self):
        "Encoder [d_sae, d_in], its bias, decoder [d_sae, d_in], its bias."
        b, c = torch.zeros(self.d_sae, device=self.device), torch.zeros(self.d_in, device=self.device)
        return self.W.clone(), b, self.W.clone(), c

    def batches(self, n):
        "`n` batches, from the first one on, over and over."
        return itertools.islice(itertools.cycle(self.x), n)


def half(device):
    return torch.autocast(device.split(":")[0], torch.bfloat16)


def project_(g, W):
    g.sub_((g * W).sum(1, keepdim=True) * W)


def unit_(W):
    W.div_(W.norm(dim=1, keepdim=True).clamp_min(1e-8))


def fused_adam(parameters):
    return torch.optim.Adam(parameters, lr=LR, betas=BETAS, fused=True)


class Dense:
    "What autograd does with the formulas: every product dense."

    one_pass = False

    def __init__(self, work):
        self.work = work
        self.weights = [torch.nn.Parameter(t) for t in work.tensors()]
        self.opt = fused_adam(self.weights)

    def select(self, z):
        return z.topk(self.work.k, dim=-1, sorted=False)

    def gradients(self, x):
        E, b, D, c = self.weights
        with half(self.work.device):
            z = F.linear(x - c, E, b)
            vals, cols = self.select(z)
            f = torch.zeros_like(z).scatter(-1, cols, vals.relu())
            loss = (f @ D + c - x).float().square().sum(-1).mean()
        loss.backward()
        project_(D.grad, D.data)
        return loss.detach()

    def step(self, x):
        loss = self.gradients(x)
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.opt.step()
        unit_(self.weights[2].data)
        self.opt.zero_grad(set_to_none=True)
        return loss


class DenseTies(Dense):
    "The same with ties in the top k settled to the left, as ours are: in bfloat16 they are many."

    def select(self, z):
        cols = S.topk(z.detach(), self.work.k)[1]
        return z.gather(-1, cols), cols


class Ours:
    "Dense encoder product, everything after it along the active latents; the optimiser as everywhere."

    one_pass = False

    def __init__(self, work):
        self.work = work
        self.weights = [torch.nn.Parameter(t) for t in work.tensors()]
        self.low = [self.weights[0].data.bfloat16(), self.weights[2].data.bfloat16()]
        self.starts = torch.arange(0, work.n * work.k + 1, work.k, device=work.device)
        self.opt = fused_adam(self.weights[1::2] if self.one_pass else self.weights)

    @torch.no_grad()
    def gradients(self, x):
        (E, b, D, c), (E16, D16), work = self.weights, self.low, self.work

        def rounded(f, *args):
            return f(*args, out=torch.empty_like(x))  # one pass, no float32 copy

        seen = rounded(torch.sub, x, c)
        z = torch.addmm(b.bfloat16(), seen, E16.T)
        vals, cols = S.topk(z, work.k)
        del z
        places, v = S.Places(cols.flatten(), self.starts, work.d_sae, work.k), vals.relu().flatten()
        e = S.spmm(places, v, D16, dtype=torch.float32).add_(c).sub_(x)
        loss = torch.linalg.vector_norm(e).square() / work.n
        g16 = rounded(torch.mul, e, 2 / work.n)
        gv = S.sampled(places, g16, D16) * (v > 0)
        D.grad, E.grad, *stats = S.spmm_t2(places, v, g16, gv, seen, W=D.data if self.one_pass else None)
        b.grad = S.latent_sums(places, gv)
        c.grad = e.sum(0) * (2 / work.n) - (b.grad.bfloat16()[None] @ E16)[0].float()
        if self.one_pass:
            self.stats = stats[0]
        else:
            project_(D.grad, D.data)
        return loss

    @torch.no_grad()
    def step(self, x):
        loss = self.gradients(x)
        E, b, D, c = self.weights
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.opt.step()
        unit_(D.data)
        self.low[0].copy_(E.data)
        self.low[1].copy_(D.data)
        self.forget_gradients()
        return loss

    def forget_gradients(self):
        for w in self.weights:
            w.grad = None


class OnePass(Ours):
    "The same; clip, projection, Adam, normalisation and the bfloat16 copy in one pass over each matrix."

    one_pass = True

    def __init__(self, work):
        super().__init__(work)
        self.steps, self.moments = 0, [torch.zeros_like(self.weights[i].data) for i in (0, 0, 2, 2)]

    @torch.no_grad()
    def step(self, x):
        loss = self.gradients(x)
        (E, b, D, c), (E16, D16) = self.weights, self.low
        factor = S.clip_factor(self.stats, b.grad, c.grad, clip=CLIP)
        self.steps += 1
        how = (self.steps, factor, LR, BETAS)
        S.adam_rows(E.data, E.grad, *self.moments[:2], *how, low=E16)
        S.adam_rows(D.data, D.grad, *self.moments[2:], *how, along=self.stats[1], low=D16)
        b.grad *= factor
        c.grad *= factor
        self.opt.step()
        self.forget_gradients()
        return loss


# ------------------------------------------------------------------ other libraries, where they are installed


@contextlib.contextmanager
def without(*names):
    """Lets a library be imported without packages that a training step never touches.

    They are what it reads text, models or logs with.
    """
    missing = [n for n in names if n not in sys.modules and importlib.util.find_spec(n) is None]
    sys.modules.update({n: mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(n, None)) for n in missing})
    try:
        yield
    finally:
        for n in missing:
            sys.modules.pop(n, None)


class DictionaryLearning:
    def __init__(self, work):
        with without("nnsight", "datasets", "wandb", "zstandard"):
            from dictionary_learning.trainers.top_k import TopKTrainer
        self.work, self.i = work, 1  # step 0 would look for a median
        size = dict(activation_dim=work.d_in, dict_size=work.d_sae, k=work.k)
        schedule = dict(steps=10**9, lr=LR, warmup_steps=0, auxk_alpha=0)
        self.trainer = TopKTrainer(**size, **schedule, layer=0, lm_name="", device=work.device, seed=0)
        E, b, D, c = work.tensors()
        ae = self.trainer.ae
        ae.encoder.weight.data, ae.encoder.bias.data = E, b
        ae.decoder.weight.data, ae.b_dec.data = D.T.contiguous(), c
        for group in self.trainer.optimizer.param_groups:
            group.update(fused=True, foreach=False)

    def step(self, x):
        self.i += 1
        with half(self.work.device):
            return self.trainer.update(self.i, x)


class SAELens:
    def __init__(self, work):
        from sae_lens.saes.sae import TrainStepInput
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        self.work, self.Input = work, TrainStepInput
        size = dict(d_in=work.d_in, d_sae=work.d_sae, k=work.k)
        config = TopKTrainingSAEConfig(**size, device=work.device, dtype="float32", aux_loss_coefficient=0.0)
        self.sae = sae = TopKTrainingSAE(config)
        E, b, D, c = work.tensors()
        sae.W_enc.data, sae.b_enc.data, sae.W_dec.data, sae.b_dec.data = E.T.contiguous(), b, D, c
        self.opt = fused_adam(sae.parameters())

    def step(self, x):
        rest = dict(coefficients={}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False)
        with half(self.work.device):
            loss = self.sae.training_forward_pass(self.Input(sae_in=x, **rest)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), CLIP)
        self.opt.step()
        self.opt.zero_grad()
        return loss.detach()


class Sparsify:
    def __init__(self, work):
        with without("datasets"):
            from sparsify.config import SparseCoderConfig
            from sparsify.sparse_coder import SparseCoder
        config = SparseCoderConfig(num_latents=work.d_sae, k=work.k)
        self.sae = sae = SparseCoder(work.d_in, config, device=work.device, dtype=torch.float32)
        E, b, D, c = work.tensors()
        sae.encoder.weight.data, sae.encoder.bias.data, sae.W_dec.data, sae.b_dec.data = E, b, D, c
        self.opt = fused_adam(sae.parameters())

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
    "The encoder product alone, nothing kept but its result."

    def __init__(self, work):
        self.low = work.W.bfloat16()
        self.b = torch.zeros(work.d_sae, device=work.device, dtype=torch.bfloat16)
        self.z = torch.empty(work.n, work.d_sae, device=work.device, dtype=torch.bfloat16)

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
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(go, batches, reps):
    "Milliseconds of one call, on the GPU's own clock where there is one."
    if not batches[0].is_cuda:
        start = time.perf_counter()
        for i in range(reps):
            go(batches[i % len(batches)])
        return (time.perf_counter() - start) * 1e3 / reps
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    wait()
    start.record()
    for i in range(reps):
        go(batches[i % len(batches)])
    end.record()
    wait()
    return start.elapsed_time(end) / reps


def interleave(gos, batches, rounds, reps, deadline):
    "Milliseconds of every arm in every round, the order turned round each time; an arm that fails leaves."
    ms, why = {name: [] for name in gos}, {}
    for r in range(rounds):
        if time.time() > deadline:
            break
        for name in list(gos)[:: 1 if r % 2 == 0 else -1]:
            if name in why:
                continue
            try:
                ms[name].append(timed(gos[name], batches, reps))
            except Exception as e:
                why[name] = reason(e)
    return ms, why


def reason(e):
    "An exception in a line."
    if isinstance(e, ModuleNotFoundError):
        return f"not installed ({e.name})"
    text = str(e).strip()
    return f"{type(e).__name__}: {text.splitlines()[0][:110]}" if text else type(e).__name__


def free_memory():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------ are the numbers right?


def off(a, b):
    "||a - b|| / ||b||, in float64."
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def drawn_case(work, dtype):
    "Activations, weights and chosen latents; latent 0 is on in every token."
    n, m, k = min(work.n, 2048), min(work.d_sae, 4096), work.k
    g = torch.Generator(work.device).manual_seed(1)

    def draw(*s):
        return torch.randn(*s, generator=g, device=work.device).to(dtype)

    X, Y, W = draw(n, work.d_in), draw(n, work.d_in), draw(m, work.d_in)
    z = X.float() @ W.float().T
    z[:, 0] = 1e9
    z = z.to(dtype)
    vals, cols = S.topk(z, k)
    assert torch.equal(vals.sort(-1, descending=True).values, z.topk(k).values), "topk: values"
    assert torch.equal(z.gather(1, cols), vals), "topk: places"
    places = S.Places(cols.flatten(), torch.arange(0, n * k + 1, k, device=work.device), m, k)
    return places, X, Y, W, draw(n * k), draw(n * k)


def kernel_errors(places, X, Y, W, v, u):
    "Error of every product against its dense formula in float64."

    def dense(v):
        size = (len(places), places.d_sae)
        zeros = torch.zeros(size, dtype=torch.float64, device=v.device)
        return zeros.index_put((places.rows, places.cols), v.double())

    G, H, stats = S.spmm_t2(places, v, X, u, Y, W=W.float())
    G0, H0, W0 = dense(v).T @ X.double(), dense(u).T @ Y.double(), W.double()
    squares = ((G0 * G0).sum(1), (G0 * W0).sum(1), (W0 * W0).sum(1), (H0 * H0).sum(1))
    errors = {
        "spmm": off(S.spmm(places, v, W), dense(v) @ W0),
        "spmm_t": off(S.spmm_t(places, v, X), G0),
        "sampled": off(S.sampled(places, X, W), (X.double() @ W0.T)[places.rows, places.cols]),
        "spmm_t2": max(off(G, G0), off(H, H0)),
        "stats": max(off(s, t) for s, t in zip(stats, squares)),
        "latent_sums": off(S.latent_sums(places, v), dense(v).sum(0)),
    }
    again = S.spmm_t2(places, v, X, u, Y)
    errors["repeats"] = 0.0 if torch.equal(again[0], G) and torch.equal(again[1], H) else 1.0
    return errors


def check_kernels(work):
    "Each kernel against its dense formula in float64, on numbers of this run."
    out, long = {}, S.kernel_settings.long
    S.kernel_settings.long = min(
        long, min(work.n, 2048) // 2
    )  # the latent that is always on is cut into pieces
    for dtype, tight in ((torch.float32, 2e-5), (torch.bfloat16, 8e-3)):
        precision = str(dtype)[6:]
        out[precision] = errors = kernel_errors(*drawn_case(work, dtype))
        listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        verdict = "ok" if max(errors.values()) < tight else "WRONG"
        print(f"kernels against float64, {precision}: {listed} | {verdict}", flush=True)
    S.kernel_settings.long = long
    return out


def first_gradients(arm, x):
    "Gradients of the first step, the decoder's projected."
    arm.gradients(x)
    gradients = [w.grad for w in arm.weights]
    if arm.one_pass:
        project_(gradients[2], arm.weights[2].data)
    return gradients


def step_errors(arm, work, reference, steps):
    "Gradients of the first step, losses and weights of the first few, beside the dense step's."
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    gradients = first_gradients(arm, work.x[0])
    errors = {f"grad {name}": off(g, r) for name, g, r in zip(names, gradients, reference)}
    arm.forget_gradients()
    dense = DenseTies(work)
    losses = [(float(arm.step(x)), float(dense.step(x))) for x in work.batches(steps)]
    errors["loss"] = max(abs(ours / theirs - 1) for ours, theirs in losses)

    def moved(o):
        return torch.cat([(w.data - start).flatten() for w, start in zip(o.weights, work.tensors())])

    errors["weights' way"] = off(moved(arm), moved(dense))
    return errors


def check_steps(arms, work, steps=3):
    "Our arms beside the dense step; the rounding of bfloat16 is the tolerance."
    reference = first_gradients(DenseTies(work), work.x[0])
    loss_limit = 5e-3 if S.interpreted else 1e-3  # the interpreter cuts bfloat16 off where a GPU rounds
    out = {}
    for name, cls in arms.items():
        errors = step_errors(cls(work), work, reference, steps)
        worst = max(v for k, v in errors.items() if "grad" in k)
        ok = worst <= 0.03 and errors["loss"] <= loss_limit
        out[name] = dict(errors, ok=ok)
        listed = ", ".join(f"{k} {v:.1e}" for k, v in errors.items())
        print(f"{name} against dense: {listed} | {'ok' if ok else 'WRONG'}", flush=True)
    return out


# ------------------------------------------------------------------ parts and tiles


def parts(work):
    "The pieces of our step, each by itself, and torch.topk beside ours."
    arm = OnePass(work)
    arm.step(work.x[0])
    (E, b, D, c), (E16, D16) = (w.data for w in arm.weights), arm.low
    m, factor = arm.moments, torch.ones((), device=work.device)
    seen = (work.x[0] - c).bfloat16()
    z = torch.addmm(b.bfloat16(), seen, E16.T)
    vals, cols = S.topk(z, work.k)

    def place():
        return S.Places(cols.flatten(), arm.starts, work.d_sae, work.k)

    places, v = place(), vals.flatten()
    gD, gE, stats = S.spmm_t2(places, v, seen, v, seen, W=D)
    print_busiest(places, work)
    how = (1, factor, 0.0, BETAS)
    return {
        "topk": lambda _: S.topk(z, work.k),
        "torch.topk": lambda _: z.topk(work.k, dim=-1, sorted=False),
        "order by latent": lambda _: place().by_latent,
        "spmm": lambda _: S.spmm(places, v, D16),
        "sampled": lambda _: S.sampled(places, seen, D16),
        "both weight gradients": lambda _: S.spmm_t2(places, v, seen, v, seen, W=D),
        "one weight gradient": lambda _: S.spmm_t(places, v, seen, dtype=torch.float32),
        "Adam, encoder": lambda _: S.adam_rows(E, gE, m[0], m[1], *how, low=E16),
        "Adam, decoder": lambda _: S.adam_rows(D, gD, m[2], m[3], *how, along=stats[1], low=D16),
    }


def print_busiest(places, work):
    n_on = places.by_latent[1].diff().float()
    on, busiest = int((n_on > 0).sum()), float(n_on.max()) / work.n
    print(f"latents on in this batch {on} of {work.d_sae}; busiest in {busiest:.0%} of tokens", flush=True)


ROW_TILES = ((8, 16, 32), (128, 256, 512), (4, 8))
TRIALS = (  # tiles of which kernel, timed by which part, over which choices
    ("segments", "both weight gradients", ROW_TILES),
    ("segments", "spmm", ROW_TILES),
    ("sampled", "sampled", ROW_TILES),
    ("groups", "topk", ((1024, 4096, 16384), (2, 4, 8))),
    ("adam", "Adam, decoder", ((256, 512, 1024), (2, 4, 8))),
)


def fits(kernel, tile):
    "Whether the registers hold a tile of entries and columns."
    return kernel not in ("segments", "sampled") or tile[0] * tile[1] // (32 * tile[2]) <= 64


def tune(work, reps, deadline):
    "Other tiles for the kernels; prints the best of each, changes nothing."
    kept, steps = dict(S.kernel_settings.tiles), parts(work)
    for kernel, part, choices in TRIALS:
        ms = {}
        for tile in itertools.product(*choices):
            if time.time() > deadline:
                break
            if not fits(kernel, tile):
                continue
            S.kernel_settings.tiles[kernel] = tile
            try:
                steps[part](None)
                wait()
                ms[tile] = statistics.median(timed(steps[part], work.x[:1], reps) for _ in range(3))
            except Exception as e:
                print(kernel, tile, reason(e))
        S.kernel_settings.tiles.update(kept)
        now = f"now {kept[kernel]} {ms.get(kept[kernel], float('nan')):.3f} ms"
        best = ", ".join(f"{tile} {t:.3f}" for tile, t in sorted(ms.items(), key=lambda i: i[1])[:4])
        print(f"d_sae {work.d_sae}, {part}: {now}; best {best}", flush=True)


# ------------------------------------------------------------------ without a GPU: does everything build?


class Hopper:
    "Stands for the driver of a GPU of compute capability 9.0."

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def call_everything(dtype, d, n=16, m=4096, k=64):
    "Every kernel with the arguments that a step gives it."
    z, X, W = torch.randn(n, m).to(dtype), torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    vals, cols = z.topk(k)
    v = vals.flatten()
    S.topk(z, 16)
    for per in (k, 0):
        places = S.Places(cols.flatten(), torch.arange(0, n * k + 1, k), m, per)
        S.spmm(places, v, W)
        S.spmm_t(places, v, X)
        S.spmm_t2(places, v, X, v, X, W=W.float())
        S.sampled(places, X, W)
        S.latent_sums(places, v)
    p, low = torch.zeros(n, d), torch.zeros(n, d, dtype=torch.bfloat16)
    for along in (None, p[:, 0].contiguous()):
        S.adam_rows(p, p, p, p, 1, torch.ones(()), along=along, low=low)


def built(kernel, tool):
    "Registers, bytes that did not fit into them, and loads of 16 bytes of a compiled kernel."
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()

        def dump(what):
            return subprocess.run([tool, what, f.name], capture_output=True, text=True).stdout

        use = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage")))
        wide = len(re.findall(r"LDG\.E\.128", dump("-sass")))
    return int(use["REG"]), int(use["STACK"]) + int(use["LOCAL"]), wide


def compile_all():
    "Builds each kernel as a step at full size would call it; prints registers and bytes spilled."
    import triton

    triton.runtime.driver.set_active(Hopper())
    made = {}

    def build(t, kernel, grid, *args, **options):
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        made.setdefault((kernel.__name__, str(t.dtype)[6:], *options.items()), compiled)

    S.kernel_settings.launcher = build
    for dtype, d in ((torch.bfloat16, 2304), (torch.float32, 2304), (torch.bfloat16, 1000)):
        call_everything(dtype, d)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    uses = {}
    for (name, dtype, *_), kernel in made.items():
        uses.setdefault((name, dtype), []).append(built(kernel, tool))
    print(f"triton {triton.__version__}, compute capability 9.0: {len(made)} kernels built")
    for (name, dtype), use in sorted(uses.items()):
        registers, spilled, wide = zip(*use)
        print(
            f"{name:10s} {dtype:9s} registers <= {max(registers):3d}   spilled {max(spilled)} bytes"
            f"   16-byte loads {min(wide)} to {max(wide)}"
        )


# ------------------------------------------------------------------ the table


def size_line(size, r, floor):
    line = f"\n{size}: d_in {r['d_in']}, d_sae {r['d_sae']}, {r['n']} tokens, k {r['k']}"
    if not floor:
        return line
    return line + f"; encoder product {2e-9 * r['n'] * r['d_in'] * r['d_sae'] / floor:.1f} TFLOP/s"


def arm_line(name, arm, n, floor, dense):
    if arm.get("ms") is None:
        return f"  {name:22s} {arm.get('note', '')}"

    def times(t):
        return f"{arm['ms'] / t:8.2f}" if t else " " * 8

    gib = "" if arm["gib"] is None else f"{arm['gib']:.2f}"
    return (
        f"  {name:22s} {arm['ms']:9.3f} {arm['low']:9.3f} {arm['high']:9.3f} {n / arm['ms'] * 1e3:12,.0f}"
        f" {times(floor)} {times(dense)} {gib:>7s} {arm.get('loss', float('nan')):10.4f}"
        f"  {arm.get('note', '')}"
    )


def table(results):
    for size, r in results["sizes"].items():
        floor = r["arms"].get("encoder product", {}).get("ms")
        dense = r["arms"].get("dense", {}).get("ms")
        print(size_line(size, r, floor))
        print(
            f"  {'arm':22s} {'ms':>9s} {'low':>9s} {'high':>9s} {'tokens/s':>12s}"
            f" {'x floor':>8s} {'x dense':>8s} {'GiB':>7s} {'loss':>10s}  note"
        )
        for name, arm in r["arms"].items():
            print(arm_line(name, arm, r["n"], floor, dense))
        for name, ms in r.get("parts", {}).items():
            print(f"    part: {name:24s} {ms:9.3f} ms" + (f" {ms / floor:8.2f} x floor" if floor else ""))


# ------------------------------------------------------------------ the run


def warmed_up(name, work, row, steps):
    "An arm's step after a few of them; `row` takes peak memory and loss."
    cuda = work.device.startswith("cuda")
    wait()
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    arm = ARMS[name](work)
    for x in work.batches(steps):
        loss = arm.step(x)
    wait()
    row["gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
    if name != "encoder product":
        row["loss"] = float(loss)
    return arm.step


def run_arms(r, work, how, deadline):
    "Warm every arm up, then let them take turns; `r` takes what they did."
    steps = {}
    for name, row in r["arms"].items():
        if time.time() > deadline:
            break
        try:
            steps[name] = warmed_up(name, work, row, how["warm"])
        except Exception as e:
            row["note"] = reason(e)
            free_memory()
    ms, why = interleave(steps, work.x, how["rounds"], how["reps"], deadline)
    for name, t in ms.items():
        if t:
            r["arms"][name].update(note="", ms=statistics.median(t), low=min(t), high=max(t), rounds=t)
        if name in why or len(t) < how["rounds"]:
            r["arms"][name]["note"] = why.get(name, f"{len(t)} of {how['rounds']} rounds: out of time")


def run_parts(r, work, how, deadline):
    "Time the pieces of our step."
    steps = parts(work)
    for go in steps.values():
        go(None)
    ms = interleave(steps, work.x[:1], how["rounds"], how["reps"], deadline)[0]
    r["parts"] = {name: statistics.median(t) for name, t in ms.items() if t}


def run_size(r, how, device, tuning, deadline):
    "Check, then time, one size of dictionary; `r` takes the results."
    try:
        work = Work(r["d_in"], r["d_sae"], r["n"], r["k"], device)
    except Exception as e:
        r["note"] = reason(e)
        return print(f"d_sae {r['d_sae']}: {r['note']}", flush=True)
    try:
        r["kernels"] = check_kernels(work)
        ours = {name: cls for name, cls in ARMS.items() if name in r["arms"] and issubclass(cls, Ours)}
        r["steps"] = check_steps(ours, work)
    except Exception as e:
        print(f"check failed, d_sae {r['d_sae']}: {reason(e)}", flush=True)
        r["check"] = reason(e)
    free_memory()
    try:
        if tuning:
            tune(work, how["reps"], time.time() + 0.4 * (deadline - time.time()))
        run_arms(r, work, how, deadline)
        free_memory()
        run_parts(r, work, how, deadline)
    except Exception as e:
        r["note"] = reason(e)
        print(f"d_sae {r['d_sae']}: {r['note']}", flush=True)
    for name, check in r.get("steps", {}).items():
        if not check["ok"] and name in r["arms"]:
            r["arms"][name]["note"] = "WRONG: differs from the dense step"
    free_memory()


FULL = dict(d_in=2304, n=8192, k=64, sizes=(16384, 65536), rounds=9, warm=3, reps=5)
TOY = dict(d_in=256, n=512, k=16, sizes=(2048, 8192), rounds=7, warm=2, reps=2)
INTERPRETED = dict(d_in=72, n=24, k=2, sizes=(128, 256), rounds=2, warm=2, reps=1)
RECIPE = (
    "float32 weights, gradients and moments; bfloat16 products and activations; "
    "projected decoder gradient, clip 1, fused Adam, unit decoder rows"
)


def machine(device):
    "What this ran on."
    kernels = "plain torch"
    if S.interpreted:
        kernels = "Triton's interpreter"
    if device == "cuda" and S.triton:
        kernels = "Triton"
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "torch": torch.__version__,
        "triton": S.triton.__version__ if S.triton else "not installed",
        "kernels": kernels,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def sizes_to_run(args):
    "How to run, and a place for the results of every size."
    how = FULL
    if args.cpu:
        how = INTERPRETED if S.interpreted else TOY
    how = dict(how)
    if args.quick:
        how.update(sizes=how["sizes"][:1], rounds=3)
    if args.sizes:
        how["sizes"] = tuple(map(int, args.sizes.split(",")))
    names = [name.replace(";", ",") for name in args.arms.split(",")]
    sizes = {}
    for d_sae in how["sizes"]:
        arms = {name: dict(note="not measured: out of time") for name in names}
        size = dict(d_in=how["d_in"], d_sae=d_sae, n=how["n"], k=how["k"])
        sizes[f"d_sae {d_sae}"] = dict(size, arms=arms, parts={})
    return how, sizes


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--quick", action="store_true", help="three rounds, the smaller dictionary only")
    add("--cpu", action="store_true", help="toy sizes on the CPU")
    add("--compile", action="store_true", help="build the kernels for compute capability 9.0, no GPU needed")
    add("--tune", action="store_true", help="try other tile sizes first")
    add("--out", help="results as JSON")
    add("--limit", type=float, default=480, help="seconds after which what is left is skipped")
    every = ",".join(ARMS).replace(", ", "; ")
    add("--arms", default=every, help="which, separated by commas (a comma within a name is written ;)")
    add("--sizes", default="", help="d_sae, separated by commas")
    return p.parse_args()


def report(results, out):
    "Keep the results, and print them."
    if out:
        Path(out).write_text(json.dumps(results, indent=1))
    print("\n" + "\n".join(f"{k}: {v}" for k, v in results["about"].items()) + "\nrecipe: " + RECIPE)
    table(results)


def main():
    args = arguments()
    if args.compile:
        return compile_all()
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("no GPU here: --cpu runs everything at toy sizes, --compile builds the kernels")
    start = time.time()
    deadline = start + args.limit * 0.9
    device = "cpu" if args.cpu else "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    how, sizes = sizes_to_run(args)
    results = {"about": machine(device), "recipe": RECIPE, "sizes": sizes}
    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGTERM, ring)
    signal.alarm(int(args.limit))
    try:
        for r in sizes.values():
            if time.time() <= deadline:
                run_size(r, how, device, args.tune, deadline)
    except OutOfTime:
        print("out of time: what is missing was not measured")
    finally:
        signal.alarm(0)
        results["seconds"] = time.time() - start
        report(results, args.out)


if __name__ == "__main__":
    main()

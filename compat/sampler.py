"""SAELens's generator of synthetic activations, and ours, on the same worlds.

python compat/sampler.py worlds FOLDER           # here: what decides each world
PEER/bin/python compat/sampler.py draws FOLDER   # where SAELens 6.54.12 is: writes fixtures/sampler.json
python compat/sampler.py compare                 # here: what differs, in standard errors
python compat/sampler.py speed PEER/bin/python   # here: writes fixtures/sampler-speed.json
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

FIXTURE = Path(__file__).parent / "fixtures" / "sampler.json"
SPEED = Path(__file__).parent / "fixtures" / "sampler-speed.json"
SMALL = dict(name="1k", n_true=256, d_in=64, roots=2)
WORLDS = {
    "small": SMALL,
    "tied": dict(SMALL, tie=0.2),  # so strong that half of the loadings are shortened
    "1k": dict(name="1k"),
    "16k": dict(name="16k", apart_steps=0),  # for the clock alone
}
N_THEIRS, N_OURS, PIECE = 1_024_000, 204_800, 2_048


def world_of(name, kind=None):
    "One of the worlds; `kind` is a class that stands in for SynthWorld."
    from sae_nb.truth.synth import SynthWorld

    options = dict(WORLDS[name])
    tie = dict(tie=options.pop("tie", SynthWorld.tie))
    return type("World", (kind or SynthWorld,), tie)(**options)


# ------------------------------------------------------------------ both


def pairs_of(parent, roots):
    "Pairs of features by what they are to each other: kind -> [n, 2]; the first two never come."
    chance = random.Random("pairs of features")
    kids = [i for i in range(len(parent)) if parent[i] >= 0]
    alone = [i for i in range(roots, len(parent)) if parent[i] < 0]
    families = [[k for k in kids if parent[k] == p] for p in sorted({parent[k] for k in kids})]
    often = range(len(parent) // 3)  # the rare ones never meet
    out = {
        "child without parent": [(parent[k], k) for k in kids],
        "two siblings": [tuple(chance.sample(family, 2)) for family in families],
        "roots": [(i, j) for i in range(roots) for j in range(i)],
        "alone": [tuple(sorted(chance.sample(alone[:60], 2))) for _ in range(200)],
        "any two": [tuple(sorted(chance.sample(often, 2))) for _ in range(800)],
    }
    return {kind: np.array(sorted(set(p))) for kind, p in out.items()}


class Tally:
    "Sums over tokens from which all comparisons are made."

    def __init__(self, size, parent, level):
        self.size, self.n_true = np.asarray(size, dtype=np.float64), len(parent)
        self.level = np.asarray(level)
        self.pairs = pairs_of([int(p) for p in parent], int((self.level == 0).sum()))
        self.n, self.sums = 0, {}

    def _sum(self, name, values):
        self.sums[name] = self.sums.get(name, 0) + np.asarray(values)

    def add(self, token, feature, value, x):
        "What is on, entry by entry, and activations [n, d_in]."
        token, feature, value = token.numpy(), feature.numpy(), value.double().numpy()
        n = len(x)
        self.n += n
        on = np.zeros((self.n_true, n), dtype=bool)
        on[feature, token] = True
        bits = np.packbits(on, axis=1)
        self._sum("on", np.bitwise_count(bits).sum(1))
        for kind, (a, b) in ((kind, p.T) for kind, p in self.pairs.items()):
            both = bits[a] & bits[b] if kind != "child without parent" else ~bits[a] & bits[b]
            self._sum(kind, np.bitwise_count(both).sum(1))
        for level in np.unique(self.level):
            together = np.bincount(token[self.level[feature] == level], minlength=n)
            counts = np.bincount(np.minimum(together, 11), minlength=12)
            self._sum(f"tokens by features on, level {level}", counts)
        sizes = powers(value / self.size[feature] - 1)
        self._sum("sizes", [np.bincount(feature, v, self.n_true) for v in sizes])
        self._sum("activations", [v.sum(0) for v in powers(x.double().numpy())])


def powers(v):
    "First to fourth."
    square = v * v
    return v, square, square * v, square * square


def counts_differ(a, b, n_a, n_b, least=40):
    "Two tables of counts, in standard errors; where there are too few to say, nothing."
    enough = a + b >= least
    share = (a + b)[enough] / (n_a + n_b)
    spread = np.sqrt(share * (1 - share) * (1 / n_a + 1 / n_b))
    certain = spread == 0  # on in every token on both sides
    return ((a / n_a - b / n_b)[enough] / np.where(certain, 1, spread))[~certain]


def moments_differ(a, b, n_a, n_b):
    "Means and variances from sums of four powers [4, m], in standard errors; n per column."
    means, variances, errors = [], [], []
    for sums, n in ((a, n_a), (b, n_b)):
        m1, m2, m3, m4 = sums / n
        var = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        means.append(m1), variances.append(var), errors.append((var / n, (fourth - var**2) / n))
    (mean_a, var_a), (mean_b, var_b) = errors
    return (means[0] - means[1]) / np.sqrt(mean_a + mean_b), (variances[0] - variances[1]) / np.sqrt(
        var_a + var_b
    )


def differences(a, b, n_a, n_b):
    "What is compared -> differences in standard errors, of two dictionaries of sums."
    tables = [name for name in a if name not in ("sizes", "activations")]
    out = {name: counts_differ(a[name], b[name], n_a, n_b) for name in tables}
    for name, least in (("mean size", 50), ("variance of size", 400)):
        some = (a["on"] >= least) & (b["on"] >= least)
        both = moments_differ(*(s["sizes"][:, some] for s in (a, b)), a["on"][some], b["on"][some])
        out[name] = both[name != "mean size"]
    both = moments_differ(a["activations"], b["activations"], n_a, n_b)
    return out | {"mean activation": both[0], "variance of activation": both[1]}


def limit(n, chance=1e-3):
    "What the largest of `n` standard normal numbers exceeds by so small a chance."
    return NormalDist().inv_cdf(1 - chance / (2 * n))


# ------------------------------------------------------------------ ours


def worlds(folder, names=WORLDS):
    "Write what decides each world."
    from safetensors.torch import save_file

    from sae_nb.toy import generator

    for name in names:
        w = world_of(name)
        kept = ("parent", "level", "raised", "ties", "size", "sd", "directions", "b")
        told = dict(roots=w.roots, tie=w.tie, seed=generator(w.seed, "truth").initial_seed())
        numbers = {key: getattr(w, key).clone() for key in kept}
        save_file(numbers, Path(folder) / f"{name}.safetensors", {k: str(v) for k, v in told.items()})


def fingerprint(numbers):
    "Few numbers that no two worlds share."
    decisive = ("raised", "ties", "sd", "directions", "b")
    return [round(float(numbers[key].double().abs().sum()), 4) for key in decisive]


def ours(name, kind=None, n=N_OURS):
    "The sums of our sampler's draws."
    from sae_nb.toy import generator

    w = world_of(name, kind)
    tally = Tally(w.size, w.parent, w.level)
    for i in range(n // PIECE):
        f = w.draw(PIECE, generator(1, "test", i))
        tally.add(f.token, f.feature, f.value, f.times(w.directions) + w.b)
    return tally


def gaps(name, kind=None, n=N_OURS):
    "What is compared -> differences in standard errors, on one world."
    theirs = json.loads(FIXTURE.read_text())["worlds"][name]
    w = world_of(name)
    if not np.allclose(fingerprint({k: getattr(w, k) for k in vars(w)}), theirs["fingerprint"], rtol=1e-4):
        raise ValueError(f"{FIXTURE.name} is of another world {name}; {__file__} says how to draw anew")
    tally = ours(name, kind, n)
    sums = {key: np.array(v, dtype=np.float64) for key, v in theirs["sums"].items()}
    return differences(tally.sums, sums, tally.n, theirs["n"])


def verdict(z):
    "Largest difference, what so many may reach, their spread, and how many there are."
    flat = np.concatenate(list(z.values()))
    return dict(
        largest=float(np.abs(flat).max()), limit=limit(len(flat)), spread=float(flat.std()), n=len(flat)
    )


def compare():
    for name in json.loads(FIXTURE.read_text())["worlds"]:
        z = gaps(name)
        for what, v in z.items():
            worst = f"largest {np.abs(v).max():.1f}, spread {v.std():.2f}" if len(v) else ""
            print(f"{name:6} {what:36} {len(v):5} {worst}")
        print(name, {key: round(v, 2) for key, v in verdict(z).items()})


# ------------------------------------------------------------------ theirs


def their_world(path):
    "SAELens's own model of one world: its rates, tree and sizes from its settings; the rest is handed over."
    from sae_lens import synthetic as s
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        v, told = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    n, d = v["directions"].shape
    cfg = s.SyntheticModelConfig(
        num_features=n,
        hidden_dim=d,
        firing_probability=s.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=s.HierarchyConfig(
            total_root_nodes=int(told["roots"]),
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        mean_firing_magnitudes=s.LinearMagnitudeConfig(start=5.0, end=4.0),
        bias=0.5,
        seed=0,
    )
    dictionary = s.FeatureDictionary(n, d, bias=0.5, initializer=None)
    dictionary.feature_vectors.data, dictionary.bias.data = v["directions"], v["b"]
    ties = s.generate_random_low_rank_correlation_matrix(
        n, v["ties"].shape[1], float(told["tie"]), seed=int(told["seed"])
    )
    model = s.SyntheticModel(cfg, feature_dict=dictionary, correlation_matrix=ties)
    model.activation_generator.std_firing_magnitudes = v["sd"]
    return model, v


def parents_of(model, n):
    "Parent of every feature as their tree has it."
    parent = torch.full((n,), -1)
    todo = list(model.hierarchy.roots)
    for node in todo:
        for child in node.children:
            parent[child.feature_index] = node.feature_index
            todo.append(child)
    return parent


def draws(folder):
    "Sums of draws from SAELens's generator, on every world but the largest."
    import sae_lens

    versions = {"sae-lens": sae_lens.__version__, "torch": torch.__version__, "numpy": np.__version__}
    out = dict(versions=versions, worlds={})
    for name in (name for name in WORLDS if name != "16k"):
        model, v = their_world(Path(folder) / f"{name}.safetensors")
        g = model.activation_generator
        own = dict(raised=g.firing_probabilities, size=g.mean_firing_magnitudes)
        own |= dict(ties=model.correlation_matrix.correlation_factor, parent=parents_of(model, len(v["sd"])))
        same = {key: float((value - v[key]).abs().max()) for key, value in own.items()}
        torch.manual_seed(0)
        tally = Tally(v["size"], v["parent"], v["level"])
        for _ in range(N_THEIRS // PIECE):
            x, f = model.sample_with_features(PIECE)
            token, feature = f.nonzero(as_tuple=True)
            tally.add(token, feature, f[token, feature], x)
        sums = {k: t.tolist() if t.dtype.kind in "iu" else t.round(4).tolist() for k, t in tally.sums.items()}
        out["worlds"][name] = dict(n=tally.n, differ_by=same, fingerprint=fingerprint(v), sums=sums)
    text = json.dumps(out, separators=(",", ":"))
    FIXTURE.write_text(text.replace('],"', '],\n"').replace('},"', '},\n"') + "\n")


# ------------------------------------------------------------------ the clock


def serve(folder):
    "Draw batches when told to by a line `world n`, and say how much processor time they took."
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    models = {}
    for line in sys.stdin:
        name, n = line.split()
        if name not in models:
            models[name] = their_world(Path(folder) / f"{name}.safetensors")[0]
        start = time.process_time()
        for _ in range(int(n)):
            models[name].sample_with_features(1_024)
        answers.write(f"{(time.process_time() - start) / int(n)}\n")


def timed(do, n):
    "Processor seconds of one of `n` calls."

    def arm():
        start = time.process_time()
        for _ in range(n):
            do()
        return (time.process_time() - start) / n

    return arm


def training(world, warm=60):
    "A step of BatchTopK on batches that were drawn before."
    from sae_nb.core import Batch
    from sae_nb.sae import build
    from sae_nb.train import TrainConfig, Trainee

    cfg = TrainConfig(tokens=1_024 * 10**6, batch=1_024, lr=3e-4)
    trainee = Trainee(build("batchtopk", world.d_in, world.d_sae, k=25), cfg.resolve())
    batches = [Batch(world.sample(1_024)[0]) for _ in range(20)]
    numbers = iter(range(10**6))

    def step():
        i = next(numbers)
        trainee.step(batches[i % len(batches)], i)

    for _ in range(warm):
        step()
    return step


def speed(python, rounds=15):
    "Drawing 1,024 tokens: ours over theirs, and over our own training step; medians and quartiles of rounds."
    from sae_nb.core import write_json
    from sae_nb.speed.bench import interleave, ratios

    torch.set_num_threads(1)
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        worlds(folder, ("1k", "16k"))
        command = [python, __file__, "serve", folder]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        peer = subprocess.Popen(command, env=dict(os.environ, OMP_NUM_THREADS="1"), **pipes)

        def theirs(name, n):
            peer.stdin.write(f"{name} {n}\n")
            return float(peer.stdout.readline())

        for name, n in (("1k", 8), ("16k", 1)):
            world = world_of(name)
            arms = dict(theirs=lambda name=name, n=n: theirs(name, n))
            arms["ours"] = timed(lambda world=world: world.sample(1_024), 8)
            if name == "16k":
                arms["step"] = timed(training(world), 1)
            times = interleave(arms, rounds, warmup=2, clock=None)
            for other in list(arms)[::2]:
                ratio = ratios(times, other).loc["ours", ["ratio", "low", "high"]]
                out[f"{name}, over {other}"] = dict(ratio.round(4), rounds=rounds)
        peer.stdin.close()
        peer.wait()
    write_json(SPEED, out)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    commands = dict(worlds=worlds, draws=draws, compare=compare, speed=speed, serve=serve)
    commands[sys.argv[1]](*sys.argv[2:])

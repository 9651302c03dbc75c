"""Numbers that a change of the house must not change.

    OMP_NUM_THREADS=1 python compat/fixture.py record FILE      # in one checkout
    OMP_NUM_THREADS=1 python compat/fixture.py compare A B      # what two such files say differently

`record` trains every variant and every preset for 50 steps on the toy (where steps are dense) and on a
short stream of the embedded world (where they are sparse), and keeps a hash of the weights and the last row
of the history. It then runs the run notebook with every evaluator at short settings on both, and the main
command of the README, and keeps what they write. Hashes agree between two checkouts on one machine with one
number of threads; between machines compare the histories.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS, LATENTS, K = 50, 1024, 16


def settings(variant, preset):
    "Constructor arguments: sparsity aimed at K, whatever this variant calls it."
    from sae_nb.sae import options, preset_options

    args = preset_options(variant, preset) if preset else {}
    has = options(variant, args.get("base"))
    if "k" in has:
        args.setdefault("k", K)
    if "error" in has:
        args.setdefault("error", "norm")
    fixed = "c" if "c" in has else "l0_coeff" if "l0_coeff" in has else "l1_coeff"
    if "target_l0" in has and fixed not in args:
        args.setdefault("target_l0", float(K))
    return args


def everyone():
    "(variant, preset) of everything there is."
    from sae_nb.core import names
    from sae_nb.sae import presets

    for variant in names("variants"):
        for preset in ["", *presets.get(variant, {})]:
            yield variant, preset


def toy_stream(rows):
    from sae_nb.toy import Toy

    toy = Toy(d_in=64, n_true=256, n_active=8, seed=0)
    return toy.stream(4, T=32) if rows else toy.stream(128)


def world_stream(rows):
    from sae_nb.acts import Stream
    from sae_nb.lm import load_lm

    try:
        from sae_nb.data import WorldSource
    except ImportError:
        from sae_nb.acts import WorldSource
    lm = load_lm("world", "cpu", "float32")
    return Stream(lm, WorldSource(128, 0), lm.default_hook, 1024, rows, 64, seed=0)


def train_all(open_stream, batch, extra):
    "name -> hash of the weights and the last row of the history."
    from sae_nb.sae import build
    from sae_nb.train import TrainConfig, Trainee, train, weight_hash

    out = {}
    cfg = TrainConfig(
        tokens=STEPS * batch,
        batch=batch,
        lr=4e-3,
        log_every=10,
        checkpoint_every=0,
        dead_after_tokens=20 * batch,
    ).resolve()
    for rows in (False, True):
        stream = open_stream(rows)
        trainees = []
        for variant, preset in everyone():
            sae = build(
                variant,
                stream.d_in,
                LATENTS if stream.d_in > 64 else 512,
                seed=0,
                **settings(variant, preset),
            )
            if sae.sequential == rows:
                trainees.append(Trainee(sae, cfg, extra, f"{variant} {preset}".strip()))
        for some in (trainees[i : i + 8] for i in range(0, len(trainees), 8)):
            train(some, open_stream(rows), quiet=True)
            for t in some:
                out[t.name] = dict(weights=weight_hash(t.sae), failed=t.failed, **t.history[-1])
            print(f"   {len(out)} trained", flush=True)
    return out


def papermill(out, fast, **parameters):
    "Run the notebook; return every JSON that it leaves in the run's folder."
    env = (
        dict(os.environ, SAE_NB_FAST="1")
        if fast
        else {k: v for k, v in os.environ.items() if k != "SAE_NB_FAST"}
    )
    name = "fixture-" + out
    shutil.rmtree(Path("runs") / name, ignore_errors=True)
    words = [w for k, v in {**parameters, "name": name}.items() for w in ("-p", k, str(v))]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "papermill", "nbs/run.ipynb", f"{folder}/run.ipynb", *words]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    files = {p.relative_to(Path("runs") / name): p for p in sorted((Path("runs") / name).rglob("*.json"))}
    kept = {
        str(k): json.loads(p.read_text())
        for k, p in files.items()
        if k.name == "metrics.json" or k.parts[0] == "evals"
    }
    shutil.rmtree(Path("runs") / name)
    return kept


def record(path, parts):
    result = {}
    if "toy" in parts:
        result["toy"] = train_all(toy_stream, 128, ["auxk"])
    if "world" in parts:
        result["world"] = train_all(world_stream, 1024, ["auxk"])
    if "evals" in parts:
        result["evals"] = papermill("evals", True, variant="topk", evals="all")
        result["toy evals"] = papermill("toy", True, variant="topk", model="toy", evals="all")
    if "main" in parts:
        result["main"] = papermill("main", False, variant="ortho")
    Path(path).write_text(json.dumps(result, indent=1))


# what is new with every evaluation, or the name of a room
PASSING = {"eval_id", "datetime_epoch_millis", "content", "sae_bench_commit_hash"}


def differences(a, b, where=()):
    "Lines that say where two nested results differ."
    if isinstance(a, dict) and isinstance(b, dict):
        for k in [*a, *(k for k in b if k not in a)]:
            if k in PASSING:
                continue
            if k not in a or k not in b:
                yield f"{'/'.join((*where, str(k)))}: only in the {'first' if k in a else 'second'}"
            else:
                yield from differences(a[k], b[k], (*where, str(k)))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (u, v) in enumerate(zip(a, b)):
            yield from differences(u, v, (*where, str(i)))
    elif a != b:
        yield f"{'/'.join(where)}: {str(a)[:60]} | {str(b)[:60]}"


def count(o):
    "Numbers and words in a nested result."
    if isinstance(o, dict):
        return sum(map(count, o.values()))
    return sum(map(count, o)) if isinstance(o, list) else 1


def compare(first, second):
    a, b = (json.loads(Path(p).read_text()) for p in (first, second))
    lines = list(differences({k: v for k, v in a.items() if k in b}, b))
    print("\n".join(lines[:200]))
    print(f"{count(b):,} numbers and words compared in {', '.join(b)}: {len(lines)} differ")
    return bool(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--parts", default="toy,world,evals,main", help="of: toy, world, evals, main")
    given = parser.parse_args()
    if given.what == "compare":
        sys.exit(compare(*given.files))
    record(given.files[0], given.parts.split(","))

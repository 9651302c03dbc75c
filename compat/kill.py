"""Kill a run at random moments, let it finish, and compare its folder with that of a run nobody disturbed.

    python compat/kill.py                      every case, ten kills each
    python compat/kill.py evaluations 5 7      one case, five kills, moments drawn with seed 7

A case is a set of parameters of the main command. A run is started, killed after a random part of the time
that the undisturbed one took (SIGKILL: nothing can be tidied up), started again, and so on; the last one may
finish. Weights, history and metrics must be the same to the bit, and so must what evaluations found.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = dict(variant="topk", d_sae=128, k=8, tokens=40_960, checkpoint=4, eval_rows=32)
CASES = {
    "training": SMALL | dict(evals="core", tokens=122_880),
    "evaluations": SMALL | dict(evals="all", eval_nulls="random"),
}
SCRIPT = "import json, sys; from sae_nb.experiment import experiment; experiment(json.loads(sys.argv[1]))"


def start(home, params):
    "The main command in a folder of its own, as a process."
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[1]), SAE_NB_FAST="1")
    said = open(home / "said.txt", "a")
    command = [sys.executable, "-c", SCRIPT, json.dumps(params | dict(name="run"))]
    return subprocess.Popen(command, cwd=home, env=env, stdout=said, stderr=said)


def finish(home, params):
    "Run to the end, and say how long it took."
    began = time.time()
    if start(home, params).wait():
        raise SystemExit((home / "said.txt").read_text()[-2000:])
    return time.time() - began


def what_lies(home):
    "name -> contents of what a run leaves, without what is new each time."
    run, out = next((home / "runs").glob("*/sae.safetensors")).parent, {}
    for name in ("sae.safetensors", "history.csv", "metrics.json"):
        out[name] = (run / name).read_bytes()
    for path in sorted((run / "evals").glob("*.json")):
        env = json.loads(path.read_text())
        env["eval_result_unstructured"].pop("sealed")  # a digest of number and date as well
        out[path.name] = {key: v for key, v in env.items() if key not in ("eval_id", "datetime_epoch_millis")}
    out["folders"] = sorted(path.name for path in (run / "evals").iterdir())
    return out


def disturbed(home, params, moments):
    "Start and kill, once for each moment, then finish; how many were killed before they ended by themselves."
    killed = 0
    for moment in moments:
        process = start(home, params)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    finish(home, params)
    return killed


def try_case(case, kills, seed):
    "One line: how many kills, and what differs."
    params, chance = CASES[case], random.Random(f"kill {case} {seed}")
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        took = finish(Path(a), params)
        killed = disturbed(Path(b), params, [chance.uniform(0.2, 0.9) * took for _ in range(kills)])
        one, two = what_lies(Path(a)), what_lies(Path(b))
    differs = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    compared = f"{len(one)} things compared, differing: {', '.join(differs) or 'none'}"
    print(f"{case}: {killed} kills in runs of {took:.0f} s; {compared}", flush=True)
    return not differs


if __name__ == "__main__":
    case, kills, seed = (sys.argv[1:] + ["", "", ""])[:3]
    same = [try_case(name, int(kills or 10), seed or 0) for name in ([case] if case else CASES)]
    sys.exit(not all(same))

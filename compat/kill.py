"""Kill a run at random moments, let it finish, and compare its folder with that of a run nobody disturbed.

    python compat/kill.py                      every case, ten kills each
    python compat/kill.py evaluations 5 7      one case, five kills, moments drawn with seed 7

A case is a set of parameters of the main command. A run is started, killed after a random part of the time
that the undisturbed one took (SIGKILL: nothing can be tidied up), started again, and so on until it ends.
Then comes the next one, until as many have died as were asked for. Everything a run leaves must be the same
to the bit, but for numbers and dates of evaluations. The comparison is tried as well: one byte of every file
is changed in turn, and each must be said.

    python compat/kill.py comparison           only that, on one small run
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


FILES = ("config.json", "status.json", "sae.safetensors", "history.csv", "metrics.json")


def found(path):
    "What an evaluation found, without what is new each time; the bytes of a file that is no result."
    try:
        env = json.loads(path.read_text())
        env["eval_result_unstructured"].pop("sealed")  # a digest of number and date as well
        return {key: v for key, v in env.items() if key not in ("eval_id", "datetime_epoch_millis")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return path.read_bytes()


def what_lies(home):
    "name -> contents of what a run leaves, without what is new each time."
    run = home / "runs" / "fast-run"
    out = {name: (run / name).read_bytes() for name in FILES if (run / name).exists()}
    out.update({path.name: found(path) for path in sorted((run / "evals").glob("*.json"))})
    out["folders"] = sorted(path.name for path in run.rglob("*"))
    return out


def differing(one, two):
    "Names of what is not the same."
    return [name for name in {**one, **two} if one.get(name) != two.get(name)]


def changed(raw):
    "The bytes of a file with one other digit: in a result, one of a number that was found."
    at = max(len(raw) // 2, raw.find(b"eval_result_metrics"))
    at = next((i for i in range(at, len(raw)) if raw[i : i + 1].isdigit()), len(raw) // 2)
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def unseen(home):
    "Files that can be changed in one byte, or deleted, without a word of `differing`."
    before, missed = what_lies(home), []
    for path in [path for path in (home / "runs" / "fast-run").rglob("*") if path.is_file()]:
        raw = path.read_bytes()
        path.write_bytes(changed(raw))
        said = path.name in differing(before, what_lies(home))
        path.unlink()
        said_gone = path.name in differing(before, what_lies(home))
        path.write_bytes(raw)
        if not (said and said_gone):
            missed.append(path.name)
    return missed


def disturbed(home, params, moment, most):
    "Start and kill until the run ends by itself or `most` have died, then finish; how many died."
    killed = 0
    while killed < most:
        process = start(home, params)
        try:
            process.wait(moment())
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    finish(home, params)
    return killed


def try_case(case, kills, seed):
    "One line: how many kills, of how many runs, and what differs."
    params, chance = CASES[case], random.Random(f"kill {case} {seed}")
    killed, differs = 0, set()
    with tempfile.TemporaryDirectory() as a:
        took, runs = finish(Path(a), params), 0
        while killed < kills:  # a run that goes on from a checkpoint may end before its next moment
            with tempfile.TemporaryDirectory() as b:
                killed += disturbed(Path(b), params, lambda: chance.uniform(0.1, 0.9) * took, kills - killed)
                one, two = what_lies(Path(a)), what_lies(Path(b))
                differs |= {*differing(one, two)} | {
                    f"a change of {name} is not seen" for name in unseen(Path(b))
                }
                runs += 1
    compared = f"{len(one)} things compared, differing: {', '.join(sorted(differs)) or 'none'}"
    print(f"{case}: {killed} kills, {runs} runs of {took:.0f} s; {compared}", flush=True)
    return not differs


def try_comparison():
    "One line: of how many files a change is seen."
    with tempfile.TemporaryDirectory() as a:
        finish(Path(a), CASES["training"])
        lies, missed = what_lies(Path(a)), unseen(Path(a))
    print(f"comparison: {len(lies)} things, changes unseen in: {', '.join(missed) or 'none'}", flush=True)
    return not missed


if __name__ == "__main__":
    if sys.argv[1:] == ["comparison"]:
        sys.exit(not try_comparison())
    case, kills, seed = (sys.argv[1:] + ["", "", ""])[:3]
    same = [try_case(name, int(kills or 10), seed or 0) for name in ([case] if case else CASES)]
    sys.exit(not all(same))

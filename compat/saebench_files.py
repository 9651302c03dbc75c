"""SAEBench's own finder, schema and plots' reader on a folder that `saebench_results` wrote.

python saebench_files.py ours FOLDER                # here: two small SAEs, eight evaluations, the folder
python saebench_files.py theirs FOLDER FIXTURES     # inside SAEBench's environment
"""

import json
import os
import sys
from collections import Counter
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

OUTPUTS = dict(  # folder -> (module, class)
    absorption=("absorption", "AbsorptionEvalOutput"),
    autointerp=("autointerp", "AutoInterpEvalOutput"),
    core=("core", "CoreEvalOutput"),
    ravel=("ravel", "RAVELEvalOutput"),
    scr=("scr_and_tpp", "ScrEvalOutput"),
    sparse_probing=("sparse_probing", "SparseProbingEvalOutput"),
    tpp=("scr_and_tpp", "TppEvalOutput"),
    unlearning=("unlearning", "UnlearningEvalOutput"),
)


def judge(messages):
    "Describes every latent by the same word, and recognises it in the first excerpts."
    return "This unit is active on nouns" if "Find what" in messages[0]["content"] else "1, 2"


def ours(folder):
    "Train two SAEs on the embedded world, evaluate them with small settings, and write the folder."
    from sae_nb.evals.autointerp.autointerp import AutoInterp
    from sae_nb.evals.autointerp.judge import LocalJudge
    from sae_nb.evals.suite import evaluate
    from sae_nb.experiment import evaluation_context, experiment, make_plan, open_data
    from sae_nb.reports.saebench_folder import saebench_results
    from sae_nb.sae import load

    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.ini").write_text("lib_name = sae_nb")
    os.chdir(folder)
    os.environ["SAE_NB_FAST"] = "1"
    kinds = "core,sparse_probing,absorption,scr,tpp,unlearning,ravel"
    for variant in ("topk", "batchtopk"):
        given = dict(variant=variant, k=8, d_sae=256, tokens=51_200, name=variant, eval_nulls="")
        (run,) = experiment(dict(given, evals=kinds)).plan.runs
        plan = make_plan(dict(given, evals="autointerp"))
        options = {**AutoInterp.world, **AutoInterp.fast, "n_latents": 4}
        evaluator = AutoInterp(judge=LocalJudge(judge, "the same for all"), **options)
        evaluate(evaluator, load(run.folder), evaluation_context(plan, open_data(plan)), run.folder, run.name)
        run.folder.rename(run.folder.with_name(variant))
    saebench_results("runs", "eval_results")


def complaints(file):
    "What SAEBench's schema says against a file."
    from pydantic import TypeAdapter, ValidationError

    module, name = OUTPUTS[file.parent.name]
    output = getattr(import_module(f"sae_bench.evals.{module}.eval_output"), name)
    try:
        TypeAdapter(output).validate_json(file.read_text())
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return []


def theirs(folder, fixtures):
    "What SAEBench finds, what its schema says, and what its plots would show."
    from sae_bench.sae_bench_utils.graphing_utils import find_eval_results_files, get_eval_results

    files = [Path(file) for file in sorted(find_eval_results_files([folder]))]
    wrong = {f"{file.parent.name}/{file.name}": said for file in files if (said := complaints(file))}
    plotted = [file for file in files if file.parent.name != "ravel"]  # its plots know no RAVEL
    read = {}
    for kind in sorted({file.parent.name for file in plotted}):
        numbers = get_eval_results([str(file) for file in plotted if file.parent.name == kind])
        read[kind] = dict(
            keys=sorted(numbers), classes=sorted({v["sae_class"] for v in numbers.values()}), numbers={}
        )
        for key, own in sorted(numbers.items()):
            first = {n: v for n, v in own.items() if isinstance(v, float) and n != "train_tokens"}
            read[kind]["numbers"][key] = dict(sorted(first.items())[:3])
    found = dict(Counter(file.parent.name for file in files))
    out = dict(version=version("sae-bench"), found=dict(sorted(found.items())), wrong=wrong, plots=read)
    Path(fixtures, "saebench-files.json").write_text(json.dumps(out, indent=1) + "\n")
    print(out["found"])
    for name, said in wrong.items():
        print(name, *said[:6], sep="\n   ")


if __name__ == "__main__":
    dict(ours=ours, theirs=theirs)[sys.argv[1]](*sys.argv[2:])

"""From a text to a trained SAE by one library, in a process of its own, inside that library's environment.

    python road.py {sae_nb,sae_lens,dictionary_learning} SETTINGS.json

The settings name a language model in a folder (`model`), a file with a text on every line (`text`), where
to read the model (`hook`), the size of the work (`tokens`, `d_sae`, `k`, `batch`, `ctx`, `buffer`), `seed`,
`lr` (null: the library's own), the language model's `dtype` (float32 or bfloat16) and an empty folder
(`out`). In it lie afterwards the SAE, in the library's own format, and `road.json`: what it took. The
README beside this file says which choices were made, and why.
"""

import json
import os
import resource
import sys
import time
import types
from pathlib import Path

began = time.perf_counter()
layers = dict(llama="model.layers", gpt2="transformer.h")  # model_type -> where transformers keeps the blocks
passes = 16  # texts in a pass of the language model, in the libraries that have to be told
norm_batches = 8  # batches that the scale is measured on, in the libraries that draw them from the stream


def block_of(s):
    "The module whose output is the hook point: its name, and the width."
    layer = s["hook"].removeprefix("blocks.").removesuffix(".hook_resid_post")
    config = json.loads((Path(s["model"]) / "config.json").read_text())
    return f"{layers[config['model_type']]}.{int(layer)}", config.get("hidden_size") or config["n_embd"]


def texts(path):
    "The texts of the file, again and again."
    while True:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


class Stages(dict):
    "name -> seconds spent in it."

    def note(self, name):
        "What has passed and is in no other stage."
        self[name] = time.perf_counter() - began - sum(self.values())

    def around(self, name, function):
        "The function, timed."

        def timed(*args, **kw):
            start = time.perf_counter()
            try:
                return function(*args, **kw)
            finally:
                self[name] = self.get(name, 0.0) + time.perf_counter() - start

        return timed


stages = Stages()


def counting():
    "How many steps optimisers have taken: a list that grows."
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = []
    register_optimizer_step_post_hook(lambda *a: steps.append(1))
    return steps


def sae_nb(s):
    "The calls of `nbs/run.ipynb` on its parameters; whatever is not named here is the default."
    out = Path(s["out"])
    os.chdir(out)  # where runs/ is put
    from sae_nb import acts, experiment

    acts.harvest = stages.around("reading", acts.harvest)
    names = ("model", "text", "hook", "tokens", "d_sae", "k", "batch", "ctx", "buffer", "seed", "dtype")
    given = {name: s[name] for name in names}
    if s["lr"] is not None:
        given["lr"] = s["lr"]
    plan = experiment.make_plan(dict(given, variant="topk", evals="", name="sae"))
    stages.note("imports")
    for stage, function in (("model", "_open_lm"), ("text", "_open_text")):
        setattr(experiment, function, stages.around(stage, getattr(experiment, function)))
    data = experiment.open_data(plan)
    experiment.train_runs(plan, data)
    experiment.evaluate_runs(plan, data)
    os.rename(out / "runs" / "sae", out / "sae")
    with open(out / "sae" / "history.csv") as lines:
        steps = int(list(lines)[-1].split(",")[0])
    return steps, data.stream.standing()["rows_read"] * s["ctx"]


def sae_lens(s):
    "`LanguageModelSAETrainingRunner` on the model as transformers has it."
    import datasets
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

    stages.note("imports")
    block, width = block_of(s)
    scaled = dict(normalize_activations="expected_average_only_in", dtype="float32", device="cpu")
    cfg = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=width, d_sae=s["d_sae"], k=s["k"], **scaled),
        model_name=s["model"],
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs=dict(dtype=s["dtype"]),
        hook_name=block,
        dataset_path=s["text"],
        is_dataset_tokenized=False,
        context_size=s["ctx"],
        exclude_special_tokens=True,
        training_tokens=s["tokens"],
        train_batch_size_tokens=s["batch"],
        store_batch_size_prompts=passes,
        n_batches_in_buffer=s["buffer"],
        n_batches_for_norm_estimate=norm_batches,
        checkpoint_path=None,
        output_path=str(Path(s["out"]) / "sae"),
        logger=LoggingConfig(log_to_wandb=False),
        seed=s["seed"],
        verbose=False,
        **({} if s["lr"] is None else dict(lr=s["lr"])),
    )
    data = datasets.load_dataset("json", data_files=s["text"], split="train", streaming=True)
    steps = counting()
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=data)
    stages.note("model")
    store, read = runner.activations_store, []
    harvest = stages.around("reading", store.get_activations)
    store.get_activations = lambda tokens: (read.append(tokens.numel()), harvest(tokens))[1]
    runner.run()
    return len(steps), sum(read)


def pieces(s, tokenizer, read):
    "Texts of about one context, BOS in front: the buffer cuts each after `ctx` tokens and drops the rest."
    size = 6 * s["ctx"]
    for text in texts(s["text"]):
        for i in range(0, max(1, len(text) - size // 2), size):
            read.append(s["ctx"])
            yield (tokenizer.bos_token or "") + text[i : i + size]


def dictionary_learning(s):
    "`trainSAE` with `TopKTrainer` and `ActivationBuffer`."
    import torch
    from nnsight import LanguageModel

    sys.modules["wandb"] = types.ModuleType("wandb")  # imported, and not used where nothing is logged
    from dictionary_learning import training
    from dictionary_learning.buffer import ActivationBuffer
    from dictionary_learning.trainers.top_k import TopKTrainer

    stages.note("imports")
    block, width = block_of(s)
    how = dict(device_map="cpu", dispatch=True, dtype=getattr(torch, s["dtype"]), patch_llama_scan=False)
    model = LanguageModel(s["model"], tokenizer_kwargs=dict(padding_side="right"), **how)
    stages.note("model")
    module = model
    for part in block.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    read = []
    buffer = ActivationBuffer(
        pieces(s, model.tokenizer, read),
        model,
        module,
        d_submodule=width,
        n_ctxs=s["buffer"],
        ctx_len=s["ctx"],
        refresh_batch_size=passes,
        out_batch_size=s["batch"],
        device="cpu",
        remove_bos=True,
    )
    buffer.refresh = stages.around("reading", buffer.refresh)
    measure = training.get_norm_factor
    training.get_norm_factor = lambda data, steps: measure(data, norm_batches)
    n = s["tokens"] // s["batch"]
    how = dict(steps=n, activation_dim=width, dict_size=s["d_sae"], k=s["k"], lr=s["lr"], seed=s["seed"])
    how.update(trainer=TopKTrainer, warmup_steps=n // 20, decay_start=n - n // 5, layer=0, lm_name=s["model"])
    steps = counting()
    out = str(Path(s["out"]) / "all")
    training.trainSAE(
        buffer, [dict(how, device="cpu")], n, save_dir=out, normalize_activations=True, device="cpu"
    )
    os.rename(Path(out) / "trainer_0", Path(s["out"]) / "sae")
    return len(steps), sum(read)


libraries = dict(sae_nb=sae_nb, sae_lens=sae_lens, dictionary_learning=dictionary_learning)
packages = dict(sae_nb="sae_nb", sae_lens="sae-lens", dictionary_learning="dictionary-learning")


def peak_gib():
    "The most memory this process has held."
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kb = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    return kb / 2**20


def travel(library, s):
    "Take the road, and write what it took."
    steps, read = libraries[library](s)
    stages.note("training")
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    took = dict(
        seconds=time.perf_counter() - began,
        processor=sum(u.ru_utime + u.ru_stime for u in (own, children)),
        peak_gib=peak_gib(),
    )
    import importlib.metadata

    import torch

    took.update(
        library=library, version=importlib.metadata.version(packages[library]), torch=torch.__version__
    )
    took.update(
        threads=torch.get_num_threads(), steps=steps, tokens=steps * s["batch"], read=read, stages=stages
    )
    (Path(s["out"]) / "road.json").write_text(json.dumps(took))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in libraries:
        sys.exit(f"usage: road.py {{{','.join(libraries)}}} SETTINGS.json")
    travel(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))

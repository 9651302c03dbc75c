"""SAEBench's core and sparse probing on SAEs of a real model, beside this repository's.

python compat/saebench_real.py ours FOLDER                          # here; FOLDER/runs holds trained SAEs
/tmp/saebench/bin/python compat/saebench_real.py theirs FOLDER      # inside SAEBench's environment
python compat/saebench_real.py compare FOLDER                       # here; writes fixtures/saebench-real.json

Text and labelled sets are read from the folder that SAE_NB_DATA names. They stay in FOLDER; the fixture holds
numbers alone, and classes are numbered. What is in FOLDER already is not measured again.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAXTYPING_DISABLE"] = "1"
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
FIXTURE = Path(__file__).parent / "fixtures" / "saebench-real.json"
MODEL, HOOK, LAYER = "smollm2", "blocks.12.hook_resid_post", 12
ROWS, CTX, BATCH = 64, 128, 16
PROBING = dict(
    probe_train_set_size=120, probe_test_set_size=80, context_length=32, k_values=[1, 2, 5, 10, 20]
)
DRAWS = 8  # of negatives, to see what they alone make


# ------------------------------------------------------------------ ours


def rows(lm):
    "Held-out rows that are one piece of one document each: the other side's attention knows no documents."
    from sae_nb.data import open_text

    tokens, docs = open_text(Path(os.environ["SAE_NB_DATA"], "text"), lm, CTX, 0, "").heldout(10**6)
    whole = (docs == 1).all(1)
    print(f"{int(whole.sum())} of {len(tokens)} held-out rows are one piece")
    return tokens[whole][:ROWS], docs[whole][:ROWS]


def core_numbers(lm, sae, tokens, docs, spliced=True):
    "Our core evaluation, and how many tokens count; the model need not be run behind the hook."
    from sae_nb.evals.base import Context
    from sae_nb.evals.core import Core
    from sae_nb.lm import what_counts

    mask = what_counts(lm, HOOK, tokens, docs)
    batches = list(zip(*(t.split(BATCH) for t in (tokens, docs, mask))))
    n = len(batches)
    core = Core(n_eval_reconstruction_batches=n * spliced, n_eval_sparsity_variance_batches=n, null_batches=0)
    return core(sae, Context(model=lm, hook=HOOK, batches=batches)), int((mask > 0).sum())


def ours_core(lm, sae, tokens, docs):
    "Every token counts, as in SAEBench; and without attention sinks, as in a run of this repository."
    from sae_nb.acts import sink_limit
    from sae_nb.data import count_mask

    lm.limits.pop(HOOK, None)
    out = {}
    everything, n = core_numbers(lm, sae, tokens, docs)
    out["every token"] = dict(tokens=n, envelope=everything)
    x = torch.cat([lm.acts(part, HOOK) for part in tokens.split(BATCH)])
    limit, _ = sink_limit(x, count_mask(tokens, docs, lm.special_ids))
    if limit is not None:
        lm.limits[HOOK] = limit
        without, n = core_numbers(lm, sae, tokens, docs, spliced=False)
        out["without sinks"] = dict(tokens=n, envelope=without)
        lm.limits.pop(HOOK)
    return out


def probing():
    "Our sparse probing, on files."
    from sae_nb.evals.sparse_probing import SparseProbing

    files = sorted(Path(os.environ["SAE_NB_DATA"]).glob("*.csv"))
    more = dict(best_epoch=True, scale_free=False, max_pool=False, shuffles=0, draws=20)
    return SparseProbing(dataset_names=[str(file) for file in files], **PROBING, **more)


def written(path, lm, which):
    "The texts of a set, in the order of its rows, and a check that they are those."
    from sae_nb.evals.texts import _own

    sizes = PROBING["probe_train_set_size"] // 2, PROBING["probe_test_set_size"] // 2
    out = []
    for part, rows in zip((which.train, which.test), _own(path, *sizes, 42)[0]):
        texts = [text for text, *_ in rows]
        assert len(texts) == len(part) and torch.equal(
            lm.encode(texts, PROBING["context_length"])[0], part.tokens
        )
        by_class = [[t for t, label in zip(texts, part.labels) if label == c] for c in part.classes]
        out.append(dict(enumerate(by_class)))
    return dict(zip(("train", "test"), out))


def handed_over(lm, evaluator, sets):
    "Texts, tokens and negatives of every set, for the other side."
    from sae_nb.core import rng

    texts, tensors = {}, {}
    for path, ts in zip(evaluator.config.dataset_names, sets):
        name = Path(ts.name).stem
        texts[name] = written(path, lm, ts)
        tensors |= {f"{name}/train": ts.train.tokens, f"{name}/test": ts.test.tokens}
        for i, task in enumerate(ts.tasks):
            for part in ("train", "y", "test", "y_test"):
                tensors[f"{name}/{i}/{part}"] = getattr(task, part)
    seed = rng("best epoch", evaluator.config.random_seed).initial_seed()
    return texts, tensors, seed


def by_class(envelope):
    "Accuracies, set by set and class by class, the classes numbered."
    out = {}
    for name, metrics in envelope["eval_result_unstructured"].items():
        if name.endswith("_results"):
            set_name = Path(name.removesuffix("_results")).stem
            out[set_name] = {metric: list(values.values()) for metric, values in metrics.items()}
    return out


def drawn_again(lm, evaluator, sets, sae, store):
    "Mean accuracies with other negatives and the same texts: seed -> {metric: number}."
    from sae_nb.evals.sparse_probing import Result, SparseProbing, metric, task_set, ways

    quick = SparseProbing(**{**vars(evaluator.config), "best_epoch": False, "lower_vram_usage": True})
    out = []
    for seed in range(DRAWS):
        again = [task_set(ts.train, ts.test, seed, 0) for ts in sets]
        found = {}
        for row, of in dict(sae=sae, llm=None).items():
            plan = [way for way in ways(row, quick.config) if way.name.startswith("top")]
            pieces = [quick.row(row, of, lm, HOOK, ts, store, store) for ts in again]
            result = Result(again, {row: (ways(row, quick.config), pieces)})
            found |= {metric(row, way.name): result.mean(row, way.name) for way in plan}
        out.append(found)
    return out


def kept(path, make, *args):
    "Make what a file holds, if it is not there."
    if not path.exists():
        text = json.dumps(make(*args))
        path.write_text(text)


def told(folder, lm, evaluator, sets, tokens):
    "What the other side needs, in files."
    from sae_nb.lm import _find

    texts, tensors, seed = handed_over(lm, evaluator, sets)
    some = tokens[:4]
    shown = dict(tokens=tokens, acts=lm.acts(some, HOOK), logits=lm.logits(some))
    save_file(shown, folder / "rows.safetensors")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "probing.safetensors")
    (folder / "given.json").write_text(json.dumps(dict(model=str(_find(MODEL)), texts=texts, seed=seed)))


def our_answers(lm, sae, evaluator, sets, store, rows):
    "Everything we measure of one SAE."
    from sae_nb.evals.base import Context

    probed = evaluator(sae, Context(model=lm, hook=HOOK, store=store))
    again = drawn_again(lm, evaluator, sets, sae, store)
    said = dict(d_sae=sae.d_sae, args=sae.args)
    core = ours_core(lm, sae, *rows)
    return dict(described=said, core=core, probing=probed, by_class=by_class(probed), again=again)


@torch.no_grad()
def ours(folder):
    "Export every trained SAE, evaluate it, and write down what the other side needs."
    from sae_nb.evals.store import Store
    from sae_nb.formats.base import export
    from sae_nb.lm import load_lm
    from sae_nb.sae import load

    lm, store, evaluator = load_lm(MODEL), Store(), probing()
    tokens, docs = rows(lm)
    sets = evaluator.sets(lm, store)
    told(folder, lm, evaluator, sets, tokens)
    for run in sorted((file.parent for file in folder.glob("runs/*/sae.safetensors")), reverse=True):
        sae = load(run)
        if not (folder / "saes" / sae.variant).exists():
            export(sae, folder / "saes" / sae.variant, "saelens")
        made = (lm, sae, evaluator, sets, store, (tokens, docs))
        kept(folder / f"ours-{sae.variant}.json", our_answers, *made)


# ------------------------------------------------------------------ theirs


def lens_config(c):
    "The config of a Llama in TransformerLens's words."
    from transformer_lens import HookedTransformerConfig

    return HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=512,  # of 8,192: each block keeps a square table of this size
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        gated_mlp=True,
        act_fn=c.hidden_act,
        d_vocab=c.vocab_size,
        eps=c.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_base=c.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        default_prepend_bos=True,
        model_name=MODEL,
        device="cpu",
    )


def the_lens(folder):
    "The model as a HookedTransformer, nothing folded."
    from transformer_lens import HookedTransformer
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    cfg = lens_config(hf.config)
    lens = HookedTransformer(cfg, AutoTokenizer.from_pretrained(folder))
    asis = dict(fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    lens.load_and_process_state_dict(convert_llama_weights(hf, cfg), **asis)
    return lens.eval()


@torch.no_grad()
def same_model(lens, rows):
    "Largest differences from our activations and logits, as shares of the largest of each row."
    some = rows["tokens"][:4]
    logits, cache = lens.run_with_cache(some, names_filter=HOOK, prepend_bos=False)
    out = {}
    for name, theirs in dict(acts=cache[HOOK], logits=logits).items():
        gap, size = (t.abs().amax(-1)[:, 1:] for t in (theirs - rows[name], rows[name]))
        out[name] = (gap / size).max().item()
    return out


def their_core(sae, name, tokens):
    "What SAEBench's core evaluation writes."
    import tempfile
    from types import SimpleNamespace

    import sae_bench.evals.core.main as core
    from saebench import Store

    core.ActivationsStore = SimpleNamespace(from_sae=lambda *a, **k: Store(tokens))
    n = len(tokens) // BATCH
    options = dict(exclude_special_tokens_from_reconstruction=True, context_size=CTX, device="cpu")
    with tempfile.TemporaryDirectory() as d:
        core.multiple_evals([(name, sae)], n, n, BATCH, True, True, output_folder=d, **options)
        return json.loads(next(Path(d).glob("*.json")).read_text())


def their_activations(lens, sae, name, tokens):
    "The half of SAEBench's core evaluation that runs the model up to the hook alone."
    import sae_bench.evals.core.main as core
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from saebench import Store

    load_and_format_sae(name, sae, "cpu")
    asked = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    config = core.CoreEvalConfig(
        batch_size_prompts=BATCH,
        n_eval_sparsity_variance_batches=len(tokens) // BATCH,
        context_size=CTX,
        **{f"compute_{what}": True for what in (*asked, "featurewise_weight_based_metrics")},
    )
    special = {getattr(lens.tokenizer, f"{which}_token_id") for which in ("pad", "eos", "bos")}
    found, latents = core.run_evals(sae, Store(tokens), lens, config, ignore_tokens=special)
    found |= dict(misc_metrics=core.calculate_misc_metrics(latents))
    found.pop("token_stats")
    latents = core.convert_feature_metrics(core.replace_nans_with_negative_one(latents))
    return dict(eval_result_metrics=found, eval_result_details=[vars(latent) for latent in latents])


def once(function):
    "The same activations for the same tokens."
    known = {}

    def remembering(inputs, *rest, **more):
        key = str([(c, hash(t["input_ids"].numpy().tobytes())) for c, t in inputs.items()])
        if key not in known:
            known[key] = function(inputs, *rest, **more)
        return dict(known[key])  # the evaluation empties the dictionary

    return remembering


def their_run_eval(saes, texts):
    "SAEBench's whole evaluation: its own tokens, its own negatives."
    import tempfile

    import sae_bench.evals.sparse_probing.main as main
    import sae_bench.sae_bench_utils.dataset_info as info
    import sae_bench.sae_bench_utils.dataset_utils as du

    for name, parts in texts.items():
        info.chosen_classes_per_dataset[name] = list(parts["train"])
    du.get_multi_label_train_test_data = lambda name, *a: (texts[name]["train"], texts[name]["test"])
    config = main.SparseProbingEvalConfig(
        dataset_names=list(texts), model_name=MODEL, llm_dtype="float32", llm_batch_size=60, **PROBING
    )
    with tempfile.TemporaryDirectory() as d:
        found = main.run_eval(config, list(saes.items()), "cpu", d, artifacts_path=d)
    return {name: found[f"{name}_custom_sae"] for name in saes}


def handed(tokens, texts, pad):
    "Tokens of each class as SAEBench has them, padded to the full length."
    tokens = torch.nn.functional.pad(tokens, (0, PROBING["context_length"] - tokens.shape[1]), value=pad)
    return dict(zip(texts, ({"input_ids": t} for t in tokens.split([len(t) for t in texts.values()]))))


def one_class(train, test, task, seed):
    "Accuracies on given texts with given negatives, and the columns that were chosen."
    import sae_bench.evals.sparse_probing.probe_training as pt

    X, Xt = train[task["train"]], test[task["test"]]
    y, yt = task["y"].int(), task["y_test"].int()
    out = {}
    for k in PROBING["k_values"]:
        mask = pt.get_top_k_mean_diff_mask(X, y, k)
        some, others = (pt.apply_topk_mask_reduce_dim(part, mask) for part in (X, Xt))
        out[f"top_{k}"] = float(pt.train_sklearn_probe(some, y, others, yt)[1])
        if k == 5:
            out["columns"] = (~mask).nonzero()[:, 0].tolist()
    torch.set_grad_enabled(True)
    torch.manual_seed(seed)
    out["best_epoch"] = pt.train_probe_gpu(X, y, Xt, yt, X.shape[1], batch_size=250, epochs=100, lr=1e-2)[1]
    return out


def their_fixed(lens, saes, texts, tensors, seed):
    "SAEBench's pooling, ranking and probes on our tokens and negatives: row -> set -> one answer per class."
    import sae_bench.sae_bench_utils.activation_collection as ac

    out = {name: {} for name in (*saes, "llm")}
    for name, parts in texts.items():
        acts = [
            ac.get_all_llm_activations(
                handed(tensors[f"{name}/{part}"], parts[part], lens.tokenizer.pad_token_id),
                lens,
                60,
                LAYER,
                HOOK,
                mask_bos_pad_eos_tokens=True,
            )
            for part in ("train", "test")
        ]
        pooled = {
            who: [ac.get_sae_meaned_activations(a, sae, 125) for a in acts] for who, sae in saes.items()
        }
        pooled["llm"] = [ac.create_meaned_model_activations(a) for a in acts]
        for who, (train, test) in pooled.items():
            train, test = (torch.cat(list(part.values())) for part in (train, test))
            tasks = [
                {key: tensors[f"{name}/{i}/{key}"] for key in ("train", "y", "test", "y_test")}
                for i in range(len(parts["train"]))
            ]
            out[who][name] = [one_class(train, test, task, seed) for task in tasks]
    return out


def same_tokens(lens, texts, tensors):
    "How many rows SAEBench tokenises as we do."
    import sae_bench.sae_bench_utils.dataset_utils as du

    same = total = 0
    pad = lens.tokenizer.pad_token_id
    for name, parts in texts.items():
        for part in ("train", "test"):
            own = du.tokenize_data_dictionary(parts[part], lens.tokenizer, PROBING["context_length"], "cpu")
            for c, given in handed(tensors[f"{name}/{part}"], parts[part], pad).items():
                same += int((own[c]["input_ids"] == given["input_ids"]).all(1).sum())
                total += len(given["input_ids"])
    return dict(same=same, of=total)


def theirs(folder):
    "SAEBench's own functions on the exported SAEs, loaded by SAELens."
    from importlib.metadata import version
    from types import SimpleNamespace

    import sae_bench.evals.core.main as core
    import sae_bench.evals.sparse_probing.main as main
    import sae_bench.sae_bench_utils.activation_collection as ac
    from sae_lens import SAE

    given, rows = json.loads((folder / "given.json").read_text()), load_file(folder / "rows.safetensors")
    tensors = load_file(folder / "probing.safetensors")
    lens = the_lens(given["model"])
    core.HookedTransformer = main.HookedTransformer = SimpleNamespace(
        from_pretrained_no_processing=lambda *a, **k: lens
    )
    ac.get_all_llm_activations = once(ac.get_all_llm_activations)
    packages = ("sae-bench", "sae-lens", "transformer-lens", "transformers", "torch", "scikit-learn", "numpy")
    out = dict(versions={package: version(package) for package in packages}, model=same_model(lens, rows))
    print(out["model"])
    out["tokens"] = same_tokens(lens, given["texts"], tensors)
    print(out["tokens"])
    (folder / "theirs.json").write_text(json.dumps(out))
    for at in sorted((folder / "saes").iterdir(), reverse=True):
        sae = SAE.load_from_disk(at)
        of = {at.name: sae}
        kept(folder / f"fixed-{at.name}.json", their_fixed, lens, of, given["texts"], tensors, given["seed"])
        kept(folder / f"run_eval-{at.name}.json", their_run_eval, of, given["texts"])
        kept(folder / f"activations-{at.name}.json", their_activations, lens, sae, at.name, rows["tokens"])
        kept(folder / f"core-{at.name}.json", their_core, sae, at.name, rows["tokens"])


# ------------------------------------------------------------------ compare


OTHERWISE = (
    "explained_variance",
    "mse",
    "relative_reconstruction_bias",
)  # ours under the name with _saebench


def metrics(envelope):
    "The metrics of all categories, and further numbers."
    found = [*envelope["eval_result_metrics"].values(), envelope["eval_result_unstructured"].get("extra", {})]
    return {name: value for category in found for name, value in category.items()}


def pair(ours, theirs):
    "Both numbers and their relative difference."
    return dict(ours=ours, theirs=theirs, difference=abs(ours - theirs) / max(abs(theirs), 1e-12))


def core_pairs(ours, theirs):
    "Every metric that both have."
    own, other = metrics(ours), metrics(dict(theirs, eval_result_unstructured={}))
    return {
        name: pair(own[f"{name}_saebench" if name in OTHERWISE else name], v) for name, v in other.items()
    }


def latent_pairs(ours, theirs):
    "Every number of each latent: the largest difference, and how many differ by more than 1e-6."
    out = {}
    for name in theirs[0]:
        a, b = (torch.tensor([-1.0 if o[name] is None else o[name] for o in side]) for side in (ours, theirs))
        gap = (a - b).abs()
        out[name] = dict(largest=gap.max().item(), differ=int((gap > 1e-6).sum()), of=len(gap))
    return out


def mean(values):
    return sum(values) / len(values)


def probed(ours, theirs, row):
    "Accuracies on the same texts and negatives: means over sets, the largest difference of a class, columns."
    names = [key for key in next(iter(theirs.values()))[0] if key != "columns"]
    out = {}
    for name in names:
        metric = f"{row}_test_accuracy_saebench" if name == "best_epoch" else f"{row}_{name}_test_accuracy"
        own = [ours["by_class"][s][metric] for s in theirs]
        other = [[task[name] for task in tasks] for tasks in theirs.values()]
        gaps = [abs(a - b) for x, y in zip(own, other) for a, b in zip(x, y)]
        out[name] = pair(mean(list(map(mean, own))), mean(list(map(mean, other))))
        out[name] |= dict(largest_of_a_class=max(gaps), classes_that_differ=sum(gap > 1e-6 for gap in gaps))
    return out


def columns(ours, theirs):
    "Classes whose five best latents are not the same."
    own = ours["probing"]["eval_result_unstructured"]["latents"]
    own = {Path(name).stem: [set(first) for first in classes.values()] for name, classes in own.items()}
    return sum(a != set(task["columns"]) for s in own for a, task in zip(own[s], theirs[s]))


def whole(ours, theirs):
    "SAEBench's run_eval beside ours with ten draws of negatives."
    out = {}
    for name, value in metrics(dict(theirs, eval_result_unstructured={})).items():
        if value is not None and name in ours["again"][0]:
            drawn = [again[name] for again in ours["again"]]
            out[name] = dict(theirs=value, ours=mean(drawn), least=min(drawn), most=max(drawn))
    return out


def seven_digits(o):
    "Numbers to seven digits."
    if isinstance(o, dict):
        return {k: seven_digits(v) for k, v in o.items()}
    return float(f"{o:.7g}") if isinstance(o, float) else o


def without_sinks(ours):
    "What our numbers become when attention sinks do not count, and SAEBench's formulas with them."
    every, other = (ours["core"].get(which) for which in ("every token", "without sinks"))
    if other is None:
        return {}
    names = ("explained_variance", "explained_variance_saebench", "mse", "mse_saebench", "cossim", "l0", "l1")
    every_numbers, numbers = metrics(every["envelope"]), metrics(other["envelope"])
    out = {name: dict(every=every_numbers[name], without=numbers[name]) for name in names}
    return dict(out, tokens=dict(every=every["tokens"], without=other["tokens"]))


def of_core(ours, theirs):
    "The core evaluation of one SAE."
    every = ours["core"]["every token"]["envelope"]
    return dict(
        core=core_pairs(every, theirs),
        latents=latent_pairs(every["eval_result_details"], theirs["eval_result_details"]),
        explained_variance_centred=metrics(every)["explained_variance"],
        without_sinks=without_sinks(ours),
    )


def of_fixed(ours, theirs):
    "Sparse probing of one SAE on the same negatives."
    (name,) = theirs.keys() - {"llm"}
    rows = {part: probed(ours, theirs[who], part) for part, who in dict(sae=name, llm="llm").items()}
    return dict(fixed=rows, classes_with_other_columns=columns(ours, theirs[name]))


def undrawn(ours, theirs):
    "The largest difference on sets of two classes, of which all texts are used: nothing is drawn."
    gaps = []
    for name, metrics_of in theirs["eval_result_unstructured"].items():
        for metric, by_class in metrics_of.items():
            own = ours["by_class"][name.removesuffix("_results")].get(metric, [])
            if "top_" in metric and len(own) == 2:
                gaps += [abs(a - b) for a, b in zip(own, by_class.values())]
    return dict(largest=max(gaps), numbers=len(gaps))


def of_run_eval(ours, theirs):
    "Sparse probing of one SAE, each side with its own negatives."
    (found,) = theirs.values()
    return dict(run_eval=whole(ours, found), run_eval_nothing_drawn=undrawn(ours, found))


PARTS = dict(activations=of_core, core=of_core, fixed=of_fixed, run_eval=of_run_eval)


def shown(row):
    "Both numbers of everything, in lines."
    parts = {f"fixed {part}": found for part, found in row.get("fixed", {}).items()}
    for part, found in (dict(core=row.get("core", {})) | parts).items():
        for name, both in found.items():
            print(f"   {part} {name:36} {both['ours']:12.6g} {both['theirs']:12.6g} {both['difference']:.1e}")
    for name, found in row.get("run_eval", {}).items():
        print(
            f"   run_eval {name:32} {found['ours']:12.6g} {found['theirs']:12.6g}",
            found["least"],
            found["most"],
        )


def compare(folder):
    "Hold what both sides have measured beside each other, and keep it."
    out = dict(json.loads((folder / "theirs.json").read_text()), saes={})
    for file in sorted(folder.glob("ours-*.json"), reverse=True):
        name, ours = file.stem.removeprefix("ours-"), json.loads(file.read_text())
        row = dict(ours["described"])
        for part, make in PARTS.items():
            if (answers := folder / f"{part}-{name}.json").exists():
                row |= make(ours, json.loads(answers.read_text()))
        out["saes"][name] = row
        print(name)
        shown(row)
    FIXTURE.write_text(json.dumps(seven_digits(out), indent=1) + "\n")


if __name__ == "__main__":
    what, folder = sys.argv[1:]
    folder = Path(folder).resolve()
    dict(ours=ours, theirs=theirs, compare=compare)[what](folder)

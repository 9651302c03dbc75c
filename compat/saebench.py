"""SAEBench's own functions on the inputs of `inputs.py`.

Run inside SAEBench's environment: python saebench.py INPUTS FIXTURES
"""

import hashlib
import json
import os
import random
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAXTYPING_DISABLE"] = "1"  # the probes fail under the shape checks of newer jaxtyping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sae_bench.evals.absorption.common as common
import sae_bench.evals.absorption.feature_absorption as fa
import sae_bench.evals.absorption.feature_absorption_calculator as calc
import sae_bench.evals.absorption.k_sparse_probing as ks
import sae_bench.evals.absorption.main as absorption
import sae_bench.evals.core.main as core
import sae_bench.evals.sparse_probing.main as probing
import sae_bench.evals.sparse_probing.probe_training as pt
import sae_bench.sae_bench_utils.activation_collection as ac
import sae_bench.sae_bench_utils.dataset_info as info
import sae_bench.sae_bench_utils.dataset_utils as du
import torch
from sae_bench.custom_saes.relu_sae import ReluSAE
from sae_bench.custom_saes.topk_sae import TopKSAE
from sae_bench.evals.absorption.probing import LinearProbe
from sae_bench.evals.absorption.vocab import get_alpha_tokens
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_neox_weights
from transformers import AutoModelForCausalLM, AutoTokenizer


def model_config(c):
    "The config of a GPT-NeoX in TransformerLens's words."
    h = c.hidden_size // c.num_attention_heads
    return HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=c.max_position_embeddings,
        d_head=h,
        n_heads=c.num_attention_heads,
        d_mlp=c.intermediate_size,
        act_fn=c.hidden_act,
        d_vocab=c.vocab_size,
        eps=c.layer_norm_eps,
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=round(h * c.rope_parameters["partial_rotary_factor"]),
        rotary_base=c.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        parallel_attn_mlp=c.use_parallel_residual,
        default_prepend_bos=True,
        model_name="world",
        device="cpu",
    )


def the_model(folder):
    "The world's GPT-NeoX as a HookedTransformer, nothing folded."
    hf, tok = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    cfg = model_config(hf.config)
    model = HookedTransformer(cfg, tok)
    model.load_and_process_state_dict(
        convert_neox_weights(hf, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


def the_sae(path, meta):
    "One of SAEBench's own SAE classes with our weights."
    weights = load_file(path)
    where = ("world", meta["layer"], torch.device("cpu"), torch.float32)
    size = weights["W_enc"].shape
    sae = TopKSAE(*size, meta["k"], *where) if path.stem == "topk" else ReluSAE(*size, *where)
    sae.load_state_dict(weights, strict=False)
    return sae


def fixed(seed=42):
    "Every generator SAEBench draws from."
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Store:
    "Stands for the activation store: hands out the rows it was given, for each phase from the first one."

    def __init__(self, tokens):
        self.tokens, self.at, self.context_size, self.store_batch_size_prompts = tokens, 0, tokens.shape[1], 8

    def get_batch_tokens(self, n):
        self.at += n
        return self.tokens[self.at - n : self.at]

    def reset_input_dataset(self):
        self.at = 0

    def shuffle_input_dataset(self, seed):
        pass


def core_envelope(name, sae, **options):
    "What SAEBench's core evaluation writes."
    with tempfile.TemporaryDirectory() as d:
        # 3 batches each, of 8 rows; both parts; then the folder
        core.multiple_evals(
            [(name, sae)], 3, 3, 8, True, True, context_size=128, output_folder=d, device="cpu", **options
        )
        return json.loads(next(Path(d).glob("*.json")).read_text())


def run_core(model, saes, tensors, meta):
    "The whole core evaluation, with the model and the rows handed in."
    core.HookedTransformer = SimpleNamespace(from_pretrained_no_processing=lambda *a, **k: model)
    core.ActivationsStore = SimpleNamespace(from_sae=lambda *a, **k: Store(tensors["tokens"]))
    out = {}
    for name in ("topk", "relu"):
        envelope = core_envelope(name, saes[name], exclude_special_tokens_from_reconstruction=True)
        latents = envelope["eval_result_details"]
        numbers = [k for k in latents[0] if k != "index"]
        everywhere, all_tokens = {}, core_envelope(name, saes[name])["eval_result_metrics"]
        for category in ("model_behavior_preservation", "model_performance_preservation"):
            everywhere.update(all_tokens[category])
        out[name] = dict(
            envelope["eval_result_metrics"],
            latents_mean={k: float(np.mean([latent[k] for latent in latents])) for k in numbers},
            latents_first=latents[:4],
            everywhere=everywhere,
        )
    return out


KS = [1, 2, 5, 10, 20]


def fixed_sets(pooled, tensors):
    "On sets that nothing was drawn for: accuracies, chosen columns, a probe on all columns with seed 0."
    train, test = (torch.cat(list(s.values())) for s in pooled)
    out = {}
    for c in pooled[0]:
        X, y, Xt, yt = (
            train[tensors[f"train_{c}"]],
            tensors[f"train_{c}_y"],
            test[tensors[f"test_{c}"]],
            tensors[f"test_{c}_y"],
        )
        out[c] = o = {}
        for k in KS:
            m = pt.get_top_k_mean_diff_mask(X, y, k)
            o[f"top_{k}"] = pt.train_sklearn_probe(
                pt.apply_topk_mask_reduce_dim(X, m), y, pt.apply_topk_mask_reduce_dim(Xt, m), yt
            )[1]
        o["columns"] = (~m).nonzero()[:, 0].tolist()
        torch.set_grad_enabled(True)
        torch.manual_seed(0)
        o["all"] = pt.train_probe_gpu(X, y, Xt, yt, X.shape[1], batch_size=250, epochs=100, lr=1e-2)[1]
    return out


def run_probing(model, saes, tensors, meta):
    "Pooling, ranking and probes on fixed sets; then the whole evaluation, its negatives drawn with seed 42."
    task, splits, saes = meta["task"], [meta["train"], meta["test"]], {n: saes[n] for n in ("topk", "relu")}
    tokens = [du.tokenize_data_dictionary(s, model.tokenizer, 128, "cpu") for s in splits]
    acts = [
        ac.get_all_llm_activations(s, model, 64, meta["layer"], meta["hook"], mask_bos_pad_eos_tokens=True)
        for s in tokens
    ]
    pooled = dict(
        llm=[ac.create_meaned_model_activations(s) for s in acts],
        **{n: [ac.get_sae_meaned_activations(s, sae, 125) for s in acts] for n, sae in saes.items()},
    )
    out = {
        n: dict(
            pooled_norm={c: v.norm(dim=1).mean().item() for c, v in p[0].items()},
            fixed=fixed_sets(p, tensors),
        )
        for n, p in pooled.items()
    }
    info.chosen_classes_per_dataset[task] = list(splits[0])
    du.get_multi_label_train_test_data = lambda *a: tuple(splits)
    probing.HookedTransformer = SimpleNamespace(from_pretrained_no_processing=lambda *a, **k: model)
    config = probing.SparseProbingEvalConfig(
        dataset_names=[task], model_name="world", llm_dtype="float32", llm_batch_size=64, k_values=KS
    )
    for n, sae in saes.items():
        with tempfile.TemporaryDirectory() as d:
            r = probing.run_eval(config, [(n, sae)], "cpu", d, artifacts_path=d)
        out[n]["run_eval"] = next(iter(r.values()))["eval_result_metrics"]
    return out


def made_up(t):
    "The absorption formulas on latents made up so that every branch occurs."
    x, f = t["made_x"], t["made_f"]
    model = SimpleNamespace(
        to_tokens=lambda p: [[0]],
        run_with_cache=lambda p, names_filter: (None, {names_filter[0]: x[:, None]}),
    )
    c = calc.FeatureAbsorptionCalculator(model, [], word_token_pos=-1, batch_size=len(x))
    sae = SimpleNamespace(device=x.device, W_dec=t["made_W_dec"], encode=lambda x: f)
    rs = c.calculate_absorption(
        sae, ["w"] * len(x), t["made_probe"], t["made_main"].tolist(), 0, False
    ).word_results
    return dict(
        fraction=[float(o.absorption_fraction) for o in rs], full=[int(o.is_full_absorption) for o in rs]
    )


def k_sparse_table(name, sae, t, meta, probe, d):
    "k-sparse probes (seed 0) and splits, a row per letter; split and ground-truth probe are handed in."
    labelled, test = list(zip(meta["words"], t["labels"].tolist())), t["test"]

    def pick(mask):
        return [word for word, keep in zip(labelled, mask.tolist()) if keep], t["word_acts"][mask]

    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    k_probes = ks.train_k_sparse_probes(sae, *pick(~test), range(1, 11), batch_size=64, precalc_sae_acts=True)
    raw = ks.eval_probe_and_sae_k_sparse_raw_scores(sae, probe, k_probes, *pick(test))
    raw.to_parquet(d / ks.get_sparse_probing_raw_results_filename(name, meta["layer"]))
    df = ks.build_metrics_df(raw, ks.sae_k_sparse_metadata(sae, probe, k_probes, name, meta["layer"]), 10)
    ks.add_feature_splits_to_metrics_df(df, 10)
    return df


def by_letter(name, sae, model, t, meta, probe, d):
    "Splits and absorption of every letter, with the prompts handed in too."
    df = k_sparse_table(name, sae, t, meta, probe, d)
    c = calc.FeatureAbsorptionCalculator(model, meta["words"], word_token_pos=meta["pos"])
    stats = fa.get_stats_and_likely_false_negative_tokens(df, name, meta["layer"], d)
    scores = fa.calculate_projection_and_cos_sims(c, sae, probe, meta["layer"], stats)
    by = absorption._aggregate_results_df(scores).set_index("letter")
    out = {}
    for row in df.to_dict("records"):
        letter = row["letter"]
        out[letter] = dict(
            f1_probe=row["f1_probe"],
            f1=[row[f"f1_sparse_sae_{k}"] for k in range(1, 11)],
            latents=row["sparse_sae_k_10_feats"].tolist(),
            n_split=len(row["split_feats"]),
        )
        if letter in by.index:
            for k in ("num_probe_true_positives", "mean_absorption_fraction", "full_absorption_rate"):
                out[letter][k] = float(by.loc[letter, k])
    return out


def whole_absorption(model, saes, d):
    "The whole evaluation, seed 42: its own split, prompts and probes, in the world's wording."
    absorption.HookedTransformer = SimpleNamespace(from_pretrained_no_processing=lambda *a, **k: model)
    sparse, probes = d / "k_sparse_probing", d / "probes"
    absorption.run_k_sparse_probing_experiment = partial(
        ks.run_k_sparse_probing_experiment, probes_dir=probes, experiment_dir=sparse
    )
    absorption.run_feature_absortion_experiment = partial(
        fa.run_feature_absortion_experiment,
        probes_dir=probes,
        experiment_dir=d / "feature_absortion",
        sparse_probing_experiment_dir=sparse,
    )
    config = absorption.AbsorptionEvalConfig(
        model_name="world",
        prompt_template=". {word} has the first letter :",
        llm_batch_size=64,
        k_sparse_probe_batch_size=64,
        precalc_k_sparse_probe_sae_acts=True,
        min_feats_for_eval=10,
    )
    r = absorption.run_eval(config, list(saes.items()), "cpu", str(d))
    return {n: r[f"{n}_custom_sae"]["eval_result_metrics"]["mean"] for n in saes if f"{n}_custom_sae" in r}


def asking(model):
    "Which words SAEBench would ask about, and how it asks."
    words = sorted(get_alpha_tokens(model.tokenizer))
    prompt = calc.create_icl_prompt(
        "cat",
        ["dog"],
        "{word} has the first letter:",
        max_icl_examples=1,
        prepend_separator_to_first_example=True,
    )
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()
    return dict(words=len(words), digest=digest, prompt=prompt.base, answer=prompt.answer)


def run_absorption(model, saes, tensors, meta):
    "Formulas, stages and the whole evaluation."
    saes = {n: saes[n] for n in ("relu", "planted")}
    probe, own = LinearProbe(tensors["probe_W"].shape[1], 26), calc.create_icl_prompt
    probe.load_state_dict({"fc.weight": tensors["probe_W"], "fc.bias": tensors["probe_b"]})
    prompt_of = dict(zip(meta["words"], meta["prompts"]))
    # words the model learned to spell
    common.get_alpha_tokens = fa.get_alpha_tokens = lambda tokenizer: list(meta["words"])
    with tempfile.TemporaryDirectory() as d:
        d, here = Path(d), os.getcwd()
        calc.create_icl_prompt = lambda word, **k: calc.SpellingPrompt(prompt_of[word], word[0].upper(), word)
        out = {n: by_letter(n, s, model, tensors, meta, probe, d) for n, s in saes.items()}
        calc.create_icl_prompt = own
        out["asking"] = asking(model)
        out["made_up"] = made_up(tensors)
        os.chdir(d)
        fixed()
        try:
            out["run_eval"] = whole_absorption(model, saes, d)
        finally:
            os.chdir(here)
    return out


def seven_digits(o):
    "Numbers to seven digits."
    if isinstance(o, dict):
        return {k: seven_digits(v) for k, v in o.items()}
    if isinstance(o, list):
        return [seven_digits(v) for v in o]
    return float(f"{o:.7g}") if isinstance(o, float) else o


def as_json(answers):
    "JSON with a line per SAE or stage, so that changes can be read."
    lines = []
    for name, answer in answers.items():
        text = json.dumps(answer)
        if name != "versions":
            text = "{\n " + ",\n ".join(f'"{k}": {json.dumps(v)}' for k, v in answer.items()) + "}"
        lines.append(f'"{name}": {text}')
    return "{" + ",\n".join(lines) + "}\n"


def check_model(model, tensors, hook):
    "Both sides have to have the same activations."
    acts = model.run_with_cache(tensors["tokens"], names_filter=hook, prepend_bos=False)[1][hook]
    same = (acts - tensors["acts"])[tensors["tokens"] > 2].abs().max().item()
    assert same < 1e-3, f"the two models differ by {same}"
    print(f"activations differ by at most {same:.1e}")


def main(inputs, fixtures, *only):
    inputs, fixtures = Path(inputs).resolve(), Path(fixtures).resolve()
    meta, tensors = json.loads((inputs / "texts.json").read_text()), load_file(inputs / "tensors.safetensors")
    model = the_model(meta["model"])
    saes = {n: the_sae(inputs / f"{n}.safetensors", meta) for n in ("topk", "relu", "planted")}
    check_model(model, tensors, meta["hook"])
    packages = ("sae-bench", "sae-lens", "transformer-lens", "torch", "scikit-learn", "numpy")
    versions = {package: version(package) for package in packages}
    for what, run in dict(core=run_core, probing=run_probing, absorption=run_absorption).items():
        if only and what not in only:
            continue
        fixed()
        answers = seven_digits(dict(versions=versions, **run(model, saes, tensors, meta)))
        (fixtures / f"saebench-{what}.json").write_text(as_json(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])

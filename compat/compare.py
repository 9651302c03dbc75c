"""Our numbers beside SAEBench's on the inputs of `inputs.py`.

For each number the largest difference, relative where numbers exceed one.
"""

import hashlib
import json
from pathlib import Path

import inputs
import torch

from sae_nb.evals.absorption import (
    absorption_fraction,
    ascii_words,
    ask,
    contributions,
    f1,
    full_absorption,
    k_sparse,
    word_scores,
)
from sae_nb.evals.base import Context
from sae_nb.evals.codes import pooled
from sae_nb.evals.core import Core
from sae_nb.evals.sparse_probing import best_epoch, sparse_probe, top_k
from sae_nb.evals.store import Store
from sae_nb.lm import load_lm
from sae_nb.metrics import unit
from sae_nb.world import sets as world


def fixture(evaluation):
    "What SAEBench answered."
    return json.loads((Path(__file__).parent / f"fixtures/saebench-{evaluation}.json").read_text())


def gap(ours, theirs):
    return abs(ours - theirs) / max(1.0, abs(theirs))


class Gaps(dict):
    "The largest difference of each number."

    def add(self, name, difference):
        self[name] = max(difference, self.get(name, 0.0))


# ------------------------------------------------------------------ core


CATEGORIES = ("preservation", "quality", "shrinkage", "sparsity", "stats", "misc_metrics")


def run_core(sae, lm, **options):
    "Our core evaluation on the rows of `inputs`."
    rows = inputs.core(lm)
    batches = [tuple(t[i : i + 8] for t in rows) for i in (0, 8, 16)]
    counts = dict(n_eval_reconstruction_batches=3, n_eval_sparsity_variance_batches=3, null_batches=0)
    return Core(**counts, **options)(sae, Context(model=lm, hook=inputs.HOOK, batches=batches))


def metrics(envelope):
    "The metrics of all categories."
    out = {}
    for category in envelope["eval_result_metrics"].values():
        out.update(category)
    return out


def metric_gaps(envelope, theirs):
    "Every metric; those that are wrong there under the names our formulas do not use."
    ours, extra = metrics(envelope), envelope["eval_result_unstructured"]["extra"]
    for name in ("explained_variance", "mse", "relative_reconstruction_bias"):
        ours[name] = extra[f"{name}_saebench"]
    gaps = Gaps()
    for category, values in theirs.items():
        if category.endswith(CATEGORIES):
            for name, value in values.items():
                gaps[name] = gap(ours[name], value)
    return gaps


def latent_gaps(latents, theirs):
    "The latents one by one, and on average."

    def value(latent, name):
        return -1.0 if latent[name] is None else latent[name]  # SAEBench's number for one that never fired

    gaps = Gaps()
    for name, mean in theirs["latents_mean"].items():
        ours = sum(value(latent, name) for latent in latents) / len(latents)
        gaps[f"{name} of the latents"] = gap(ours, mean)
    for latent, first in zip(latents, theirs["latents_first"]):
        for name, number in first.items():
            gaps.add("first latents", gap(value(latent, name), number))
    return gaps


def core(lm):
    "Every metric, and the latents."
    for name, sae in inputs.saes(lm).items():
        theirs = fixture("core")[name]
        envelope = run_core(sae, lm)
        everywhere = metrics(run_core(sae, lm, exclude_special_tokens_from_reconstruction=False))
        gaps = Gaps(metric_gaps(envelope, theirs))
        gaps.update(latent_gaps(envelope["eval_result_details"], theirs))
        for metric, value in theirs["everywhere"].items():
            gaps.add("with BOS and the end replaced too", gap(everywhere[metric], value))
        yield f"core {name}", gaps


# ------------------------------------------------------------------ sparse probing


def pool(docs, sae, lm):
    "Mean codes of each class's texts."
    return {c: pooled(sae, lm, inputs.HOOK, *world.encode(texts, 128), Store()) for c, texts in docs.items()}


def class_gaps(gaps, train, test, c, theirs):
    "One class against the others."
    (X, y), (X_test, y_test) = inputs.binary(train, c), inputs.binary(test, c)
    y, y_test = y.bool(), y_test.bool()
    chosen = set(top_k(X, y, 20).tolist())
    guess = best_epoch(X, y, X_test, y_test, torch.Generator().manual_seed(0))
    gaps.add("columns chosen", len(chosen ^ set(theirs["columns"])))
    gaps.add("best epoch", gap((guess == y_test).float().mean().item(), theirs["all"]))
    for k in (1, 2, 5, 10, 20):
        gaps.add(f"top_{k}", gap(sparse_probe(X, y, X_test, y_test, k), theirs[f"top_{k}"]))


def probing(lm):
    "Pooling, ranking and probes."
    for name, sae in dict(inputs.saes(lm), llm=None).items():
        theirs, gaps = fixture("probing")[name], Gaps()
        train, test = (pool(docs, sae, lm) for docs in inputs.probing())
        for c, fixed in theirs["fixed"].items():
            gaps.add("pooled", gap(train[c].norm(dim=1).mean().item(), theirs["pooled_norm"][c]))
            class_gaps(gaps, train, test, c, fixed)
        yield f"sparse probing {name}", gaps


# ------------------------------------------------------------------ absorption


def formula_gaps(theirs):
    "The formulas on latents made up."
    made = inputs.words_made_up()
    main, projection = made["main"].tolist(), made["x"] @ unit(made["probe"][None])[0]
    s, c = contributions(made["f"], made["W_dec"], made["probe"], as_unit=True)
    ours = dict(
        fraction=absorption_fraction(s, c, projection, main),
        full=full_absorption(made["f"], s, c, projection, main),
    )
    return {name: (v.float() - torch.tensor(theirs[name])).abs().max().item() for name, v in ours.items()}


def asking_gaps(lm, theirs):
    "Which words are asked about, and how."
    words = sorted(ascii_words(lm.tokenizer, lm.special_ids))
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()
    prompts = ask(["cat"], "{word} has the first letter:", 1, pool=["dog", "dog"])
    return dict(words=float(digest != theirs["digest"]), prompt=float(prompts != [theirs["prompt"]]))


def letter_gaps(gaps, sae, f, x, y, says, test, w, theirs):
    "Splits and scores of one letter, with SAEBench's ranking of the latents; `says`: the probe's logits."
    ranked = f[:, theirs["latents"]]
    best = k_sparse(ranked[~test], y[~test], ranked[test], y[test])
    gaps.add("F1 of the probe", gap(f1(says[test], y[test]).item(), theirs["f1_probe"]))
    gaps.add("F1 of the main latents", max(gap(u, v) for u, v in zip(best, theirs["f1"])))
    gaps.add("split features", abs(len(best) - theirs["n_split"]))
    sure = test & y & (says > 0)
    n = int(sure.sum())
    if not n:
        return
    scores = word_scores(f[sure], x[sure], sae.W_dec, w, theirs["latents"][: len(best)])
    fraction, full = scores["fraction_saebench"] / n, scores["full_saebench"] / n
    gaps.add("true positives", gap(n, theirs["num_probe_true_positives"]))
    gaps.add("fraction of a letter", gap(fraction, theirs["mean_absorption_fraction"]))
    gaps.add("full absorption of a letter", gap(full, theirs["full_absorption_rate"]))


@torch.no_grad()
def absorption(lm):
    "The formulas, the questions, then every letter."
    theirs = fixture("absorption")
    yield "absorption formulas", formula_gaps(theirs["made_up"])
    yield "absorption asking", asking_gaps(lm, theirs["asking"])
    _, labels, test, _, x = inputs.letters(lm)
    W, b = inputs.probe(x[~test], labels[~test])
    saes = dict(relu=inputs.saes(lm)["relu"], planted=inputs.planted(x, labels, test, W, b))
    for name, sae in saes.items():
        f, gaps = sae.encode(x), Gaps()
        for letter, answer in enumerate(theirs[name].values()):
            says = x @ W[letter] + b[letter]
            letter_gaps(gaps, sae, f, x, labels == letter, says, test, W[letter], answer)
        yield f"absorption {name}", gaps


def main():
    torch.set_num_threads(1)
    lm = load_lm("world")
    for evaluation in (core, probing, absorption):
        for what, gaps in evaluation(lm):
            for name, difference in sorted(gaps.items(), key=lambda item: item[1]):
                print(f"{what:24} {name:34} {difference:.1e}{'   <---' if difference > 1e-3 else ''}")


if __name__ == "__main__":
    main()

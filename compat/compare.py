"Our numbers beside SAEBench's on the inputs of `inputs.py`: the largest difference of each, relative where numbers exceed one."

import hashlib
import json
from pathlib import Path

import inputs as I
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


def fixture(what):
    return json.loads((Path(__file__).parent / f"fixtures/saebench-{what}.json").read_text())


def gap(a, b):
    return abs(a - b) / max(1.0, abs(b))


categories = ("preservation", "quality", "shrinkage", "sparsity", "stats", "misc_metrics")


def core(lm):
    "Every metric and the latents; explained variance and mse under the names our formulas do not use."
    t, d, m = I.core(lm)
    for name, sae in I.saes(lm).items():
        batches = [(t[i : i + 8], d[i : i + 8], m[i : i + 8]) for i in (0, 8, 16)]

        def run(batches=batches, sae=sae, **options):
            counts = dict(n_eval_reconstruction_batches=3, n_eval_sparsity_variance_batches=3)
            ctx = Context(model=lm, hook=I.HOOK, batches=batches)
            return Core(**counts, null_batches=0, **options)(sae, ctx)

        r, theirs = run(), fixture("core")[name]
        ours = {k: v for c in r["eval_result_metrics"].values() for k, v in c.items()}
        ours.update(
            {
                k: r["eval_result_unstructured"]["extra"][f"{k}_saebench"]
                for k in ("explained_variance", "mse")
            }
        )
        gaps = {
            k: gap(ours[k], v) for c, ms in theirs.items() if c.endswith(categories) for k, v in ms.items()
        }

        def of(o, k):
            return -1.0 if o[k] is None else o[k]  # what SAEBench writes for a latent that never fired

        gaps.update(
            {
                f"{k} of the latents": gap(sum(of(o, k) for o in r["eval_result_details"]) / sae.d_sae, v)
                for k, v in theirs["latents_mean"].items()
            }
        )
        gaps["first latents"] = max(
            gap(of(o, k), v)
            for o, p in zip(r["eval_result_details"], theirs["latents_first"])
            for k, v in p.items()
        )
        all_tokens = {
            k: v
            for c in run(exclude_special_tokens_from_reconstruction=False)["eval_result_metrics"].values()
            for k, v in c.items()
        }
        gaps["with BOS and the end replaced too"] = max(
            gap(all_tokens[k], v) for k, v in theirs["everywhere"].items()
        )
        yield f"core {name}", gaps


def pool(docs, sae, lm):
    "Mean codes of each class's texts."
    return {c: pooled(sae, lm, I.HOOK, *world.encode(v, 128), Store()) for c, v in docs.items()}


def probing(lm):
    "Pooling, ranking and probes."
    for name, sae in dict(I.saes(lm), llm=None).items():
        (train, test), theirs, gaps = (pool(s, sae, lm) for s in I.probing()), fixture("probing")[name], {}

        def worse(k, v):
            return gaps.update({k: max(v, gaps.get(k, 0.0))})

        for c, o in theirs["fixed"].items():
            (X, y), (Xt, yt) = I.binary(train, c), I.binary(test, c)
            y, yt = y.bool(), yt.bool()
            worse("pooled", gap(train[c].norm(dim=1).mean().item(), theirs["pooled_norm"][c]))
            worse("columns chosen", len(set(top_k(X, y, 20).tolist()) ^ set(o["columns"])))
            worse(
                "best epoch",
                gap(
                    (best_epoch(X, y, Xt, yt, torch.Generator().manual_seed(0)) == yt).float().mean().item(),
                    o["all"],
                ),
            )
            for k in (1, 2, 5, 10, 20):
                worse(f"top_{k}", gap(sparse_probe(X, y, Xt, yt, k), o[f"top_{k}"]))
        yield f"sparse probing {name}", gaps


@torch.no_grad()
def absorption(lm):
    "The formulas on latents made up, then splits and scores of every letter with SAEBench's ranking of the latents."
    theirs, m = fixture("absorption"), I.words_made_up()
    main, p = m["main"].tolist(), m["x"] @ unit(m["probe"][None])[0]
    s, c = contributions(m["f"], m["W_dec"], m["probe"], as_unit=True)
    fraction, full = absorption_fraction(s, c, p, main), full_absorption(m["f"], s, c, p, main)

    def worst(a, k):
        return (a.float() - torch.tensor(theirs["made_up"][k])).abs().max().item()

    yield ("absorption formulas", dict(fraction=worst(fraction, "fraction"), full=worst(full, "full")))
    o, words = theirs["asking"], sorted(ascii_words(lm.tokenizer, lm.special_ids))
    yield (
        "absorption asking",
        dict(
            words=float(hashlib.sha256("\n".join(words).encode()).hexdigest() != o["digest"]),
            prompt=float(
                ask(["cat"], "{word} has the first letter:", 1, pool=["dog", "dog"]) != [o["prompt"]]
            ),
        ),
    )
    _, labels, test, _, x = I.letters(lm)
    W, b = I.probe(x[~test], labels[~test])
    for name, sae in dict(relu=I.saes(lm)["relu"], planted=I.planted(x, labels, test, W, b)).items():
        f, gaps = sae.encode(x), {}

        def worse(k, v):
            return gaps.update({k: max(v, gaps.get(k, 0.0))})

        for l, o in enumerate(theirs[name].values()):
            y, says = labels == l, x @ W[l] + b[l] > 0
            best = k_sparse(f[~test][:, o["latents"]], y[~test], f[test][:, o["latents"]], y[test])
            worse("F1 of the probe", gap(f1(x[test] @ W[l] + b[l], y[test]).item(), o["f1_probe"]))
            worse("F1 of the main latents", max(gap(u, v) for u, v in zip(best, o["f1"])))
            worse("split features", abs(len(best) - o["n_split"]))
            sure = test & y & says
            if not sure.any():
                continue
            r = word_scores(f[sure], x[sure], sae.W_dec, W[l], o["latents"][: len(best)])
            worse("true positives", gap(int(sure.sum()), o["num_probe_true_positives"]))
            worse(
                "fraction of a letter",
                gap(r["fraction_saebench"] / int(sure.sum()), o["mean_absorption_fraction"]),
            )
            worse(
                "full absorption of a letter",
                gap(r["full_saebench"] / int(sure.sum()), o["full_absorption_rate"]),
            )
        yield f"absorption {name}", gaps


if __name__ == "__main__":
    torch.set_num_threads(1)
    lm = load_lm("world")
    for f in (core, probing, absorption):
        for what, gaps in f(lm):
            for k, v in sorted(gaps.items(), key=lambda o: o[1]):
                print(f"{what:24} {k:34} {v:.1e}{'   <---' if v > 1e-3 else ''}")

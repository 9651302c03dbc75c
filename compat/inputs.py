"""Inputs on which SAEBench and this repository are compared.

Everything follows from seeds and the model in the package.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sae_nb.data import WorldSource, count_mask
from sae_nb.lm import load_lm
from sae_nb.metrics import unit
from sae_nb.sae import build
from sae_nb.world import sets as world

HOOK, LAYER, TASK, POS = "blocks.2.hook_resid_post", 2, "professions1", -6


def gen(seed):
    return torch.Generator().manual_seed(seed)


def centred(lm, n=64):
    "Mean of the activations of some training documents, and the documents' centred activations."
    tokens, docs = WorldSource().take(n)
    x = lm.acts(tokens, HOOK)[count_mask(tokens, docs, lm.special_ids) > 0]
    return x.mean(0), x - x.mean(0)


@torch.no_grad()
def saes(lm):
    "Two SAEs nobody trained: TopK whose rows are activations; ReLU with random rows (some fire on zero)."
    mean, x = centred(lm)
    topk, relu = build("topk", lm.d_model, 512, k=16), build("standard", lm.d_model, 256)
    topk.W_dec.copy_(unit(x[torch.randperm(len(x), generator=gen(1))[:512]]))
    topk.W_enc.copy_(0.17 * topk.W_dec.T)
    topk.b_enc.copy_(0.1 * torch.randn(512, generator=gen(2)))
    topk.b_dec.copy_(mean)
    relu.W_dec.copy_(unit(torch.randn(256, lm.d_model, generator=gen(3))))
    relu.W_enc.copy_(0.4 * (relu.W_dec.T + 0.05 * torch.randn(lm.d_model, 256, generator=gen(4))))
    relu.b_enc.copy_(1.5 * torch.randn(256, generator=gen(5)) - 2.0)
    return dict(topk=topk.eval(), relu=relu.eval())


def core(lm, n=24):
    "Held-out rows: tokens, document numbers, and what counts."
    tokens, docs = WorldSource().heldout(n)
    return tokens, docs, count_mask(tokens, docs, lm.special_ids)


def probing(n_train=100, n_test=50):
    "Texts of each class of one task, for training and for testing."
    out = []
    for seed, n in ((7, n_train), (8, n_test)):
        docs, ys = world.probe_set(TASK, n, seed)
        out.append({c: [d for d, y in zip(docs, ys) if y == c] for c in sorted(set(ys))})
    return out


def binary(by_class, c):
    "One class against the first texts of the others, as many in all: [2n, ...] and labels."
    pos, others = by_class[c], [v for k, v in by_class.items() if k != c]
    neg = torch.cat([v[: -(-len(pos) // len(others))] for v in others])[: len(pos)]
    return torch.cat([pos, neg]), torch.tensor([1] * len(pos) + [0] * len(neg))


def letters(lm):
    "First-letter prompts: words, labels 0-25, which are for testing, prompts, activations of the word."
    words = list(world.LEXICON)
    prompts = [p for p, _ in world.letter_prompts(words)]
    test = torch.arange(len(words)) % 5 == 0
    tokens, _ = world.encode(prompts, 128, eos=False)
    last = (tokens != lm.pad).sum(1)
    acts = torch.cat([lm.acts(t, HOOK) for t in tokens.split(128)])
    labels = torch.tensor([ord(word[0]) - 97 for word in words])
    return words, labels, test, prompts, acts[torch.arange(len(words)), last + POS]


def probe(acts, labels):
    "Least-squares probe of the letters, in closed form: directions [26, d] and biases [26]."
    mean = acts.double().mean(0)
    X, Y = acts.double() - mean, torch.nn.functional.one_hot(labels, 26).double()
    W = torch.linalg.solve(X.T @ X + 10.0 * torch.eye(X.shape[1], dtype=X.dtype), X.T @ (Y - Y.mean(0))).T
    return W.float(), (Y.mean(0) - 0.3 - W @ mean).float()


@torch.no_grad()
def planted(acts, labels, test, W, b):
    "A ReLU SAE with one latent per letter, which falls silent on some words that have a latent of their own."
    sae, mean = build("standard", acts.shape[1], 256), acts.mean(0)
    words = test.nonzero()[::3, 0]
    x, letter = acts[words] - mean, labels[words]
    D, own = unit(x), slice(26, 26 + len(words))
    sae.W_dec.copy_(unit(torch.randn(256, len(mean), generator=gen(6))))
    sae.W_dec[:26], sae.W_dec[own] = unit(W), D
    sae.W_enc.copy_(0.3 * sae.W_dec.T)
    sae.b_enc.fill_(-1.0)
    sae.b_dec.copy_(mean)
    sae.W_enc[:, :26], sae.b_enc[:26] = 10 * W.T, 10 * (b + W @ mean)
    sae.W_enc[:, own], sae.b_enc[own] = D.T, -0.7 * x.norm(dim=1)
    z = sae.pre(acts[words]).gather(1, letter[:, None]).relu()
    too_much = D.T * (1.2 * z[:, 0] / x.norm(dim=1))  # takes each word's letter below zero
    sae.W_enc[:, :26] -= too_much @ torch.nn.functional.one_hot(letter, 26).float()
    return sae.eval()


def words_made_up(n=100, d=8, d_sae=32):
    "Inputs of the absorption formulas such that every branch of them occurs."

    def r(i, *s):
        return torch.randn(*s, generator=gen(i))

    W, probe = unit(r(11, d_sae, d)), unit(r(12, 1, d))[0]
    W[:6] = unit(W[:6] + 1.2 * probe)
    f = r(13, n, d_sae).relu() * (r(14, n, d_sae) > 0.8)
    f[::3, :2] = 0.0
    f[::5, 0] = 2.0
    return dict(x=f @ W + 0.3 * r(15, n, d), f=f, W_dec=W, probe=probe, main=torch.tensor([0, 1]))


def save_saes(folder, saes):
    "Weights of every SAE."
    for name, sae in saes.items():
        weights = {k: getattr(sae, k).detach().contiguous() for k in ("W_enc", "W_dec", "b_enc", "b_dec")}
        save_file(weights, folder / f"{name}.safetensors")


def binary_places(splits):
    "Which texts of each split stand for and against each class, as places in the list of all texts."
    out = {}
    for split, docs in splits.items():
        sizes = [len(texts) for texts in docs.values()]
        places = dict(zip(docs, torch.arange(sum(sizes)).split(sizes)))
        for c in docs:
            out[f"{split}_{c}"], out[f"{split}_{c}_y"] = binary(places, c)
    return out


def main(folder):
    "Write what SAEBench's side reads."
    folder, lm = Path(folder), load_lm("world")
    folder.mkdir(parents=True, exist_ok=True)
    tokens, _, _ = core(lm)
    words, labels, test, prompts, acts = letters(lm)
    W, b = probe(acts[~test], labels[~test])
    save_saes(folder, dict(saes(lm), planted=planted(acts, labels, test, W, b)))
    tensors = dict(tokens=tokens, acts=lm.acts(tokens, HOOK), word_acts=acts, labels=labels, test=test)
    tensors.update(probe_W=W, probe_b=b)
    tensors.update({f"made_{k}": v for k, v in words_made_up().items()})
    splits = {}
    for split, docs in zip(("train", "test"), probing()):
        splits[split] = {c: [" ".join(d.words) for d in texts] for c, texts in docs.items()}
    tensors.update(binary_places(splits))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "tensors.safetensors")
    settings = dict(hook=HOOK, layer=LAYER, task=TASK, pos=POS, k=16, model=str(world.WORLD_DIR.resolve()))
    texts = dict(**splits, words=words, prompts=prompts, **settings)
    (folder / "texts.json").write_text(json.dumps(texts))


if __name__ == "__main__":
    main(sys.argv[1])

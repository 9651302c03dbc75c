"Inputs on which SAEBench and this repository are compared: everything follows from seeds and the model in the package."

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
    "Two SAEs nobody trained: TopK whose rows are activations, and ReLU with random rows, some of which fire on zero."
    mean, x = centred(lm)
    a, b = build("topk", lm.d_model, 512, k=16), build("standard", lm.d_model, 256)
    a.W_dec.copy_(unit(x[torch.randperm(len(x), generator=gen(1))[:512]]))
    a.W_enc.copy_(0.17 * a.W_dec.T)
    a.b_enc.copy_(0.1 * torch.randn(512, generator=gen(2)))
    a.b_dec.copy_(mean)
    b.W_dec.copy_(unit(torch.randn(256, lm.d_model, generator=gen(3))))
    b.W_enc.copy_(0.4 * (b.W_dec.T + 0.05 * torch.randn(lm.d_model, 256, generator=gen(4))))
    b.b_enc.copy_(1.5 * torch.randn(256, generator=gen(5)) - 2.0)
    return dict(topk=a.eval(), relu=b.eval())


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
    "First-letter prompts of every word: words, labels 0-25, which are for testing, prompts, activations of the word."
    words = list(world.LEXICON)
    prompts = [p for p, _ in world.letter_prompts(words)]
    test = torch.arange(len(words)) % 5 == 0
    tokens, _ = world.encode(prompts, 128, eos=False)
    last = (tokens != lm.pad).sum(1)
    acts = torch.cat([lm.acts(t, HOOK) for t in tokens.split(128)])
    return (
        words,
        torch.tensor([ord(w[0]) - 97 for w in words]),
        test,
        prompts,
        acts[torch.arange(len(words)), last + POS],
    )


def probe(acts, labels):
    "Least-squares probe of the letters, in closed form: directions [26, d] and biases [26]."
    mean = acts.double().mean(0)
    X, Y = acts.double() - mean, torch.nn.functional.one_hot(labels, 26).double()
    W = torch.linalg.solve(X.T @ X + 10.0 * torch.eye(X.shape[1], dtype=X.dtype), X.T @ (Y - Y.mean(0))).T
    return W.float(), (Y.mean(0) - 0.3 - W @ mean).float()


@torch.no_grad()
def planted(acts, labels, test, W, b):
    "A ReLU SAE with one latent per letter, which falls silent on some words that have a latent of their own."
    s, mean, w = build("standard", acts.shape[1], 256), acts.mean(0), test.nonzero()[::3, 0]
    x = acts[w] - mean
    D, own = unit(x), slice(26, 26 + len(w))
    s.W_dec.copy_(unit(torch.randn(256, len(mean), generator=gen(6))))
    s.W_dec[:26], s.W_dec[own] = unit(W), D
    s.W_enc.copy_(0.3 * s.W_dec.T)
    s.b_enc.fill_(-1.0)
    s.b_dec.copy_(mean)
    s.W_enc[:, :26], s.b_enc[:26] = 10 * W.T, 10 * (b + W @ mean)
    s.W_enc[:, own], s.b_enc[own] = D.T, -0.7 * x.norm(dim=1)
    z = s.pre(acts[w]).gather(1, labels[w, None]).relu()
    s.W_enc[:, :26] -= (D.T * (1.2 * z[:, 0] / x.norm(dim=1))) @ torch.nn.functional.one_hot(
        labels[w], 26
    ).float()
    return s.eval()


def words_made_up(n=100, d=8, d_sae=32):
    "Activations, latents, decoder, probe direction and main latents such that every branch of the absorption formulas occurs."

    def r(i, *s):
        return torch.randn(*s, generator=gen(i))

    W, probe = unit(r(11, d_sae, d)), unit(r(12, 1, d))[0]
    W[:6] = unit(W[:6] + 1.2 * probe)
    f = r(13, n, d_sae).relu() * (r(14, n, d_sae) > 0.8)
    f[::3, :2] = 0.0
    f[::5, 0] = 2.0
    return dict(x=f @ W + 0.3 * r(15, n, d), f=f, W_dec=W, probe=probe, main=torch.tensor([0, 1]))


def main(folder):
    "Write what SAEBench's side reads."
    folder, lm = Path(folder), load_lm("world")
    folder.mkdir(parents=True, exist_ok=True)
    tokens, docs, mask = core(lm)
    words, labels, test, prompts, acts = letters(lm)
    W, b = probe(acts[~test], labels[~test])
    for n, s in dict(saes(lm), planted=planted(acts, labels, test, W, b)).items():
        save_file(
            {k: getattr(s, k).detach().contiguous() for k in ("W_enc", "W_dec", "b_enc", "b_dec")},
            folder / f"{n}.safetensors",
        )
    ts = dict(
        tokens=tokens,
        acts=lm.acts(tokens, HOOK),
        word_acts=acts,
        labels=labels,
        test=test,
        probe_W=W,
        probe_b=b,
        **{f"made_{k}": v for k, v in words_made_up().items()},
    )
    train, held = ({c: [" ".join(d.words) for d in v] for c, v in s.items()} for s in probing())
    for n, s in dict(train=train, test=held).items():
        at = dict(zip(s, torch.arange(sum(map(len, s.values()))).split([len(v) for v in s.values()])))
        for c in s:
            ts[f"{n}_{c}"], ts[f"{n}_{c}_y"] = binary(at, c)
    save_file({k: v.contiguous() for k, v in ts.items()}, folder / "tensors.safetensors")
    (folder / "texts.json").write_text(
        json.dumps(
            dict(
                train=train,
                test=held,
                words=words,
                prompts=prompts,
                hook=HOOK,
                layer=LAYER,
                task=TASK,
                pos=POS,
                k=16,
                model=str(world.WORLD_DIR.resolve()),
            )
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])

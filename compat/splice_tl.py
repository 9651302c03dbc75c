"""Splices of this repository beside those of SAELens in TransformerLens.

python compat/splice_tl.py ours FOLDER              # here: models, exported SAEs, tokens, and our answers
PEER/bin/python compat/splice_tl.py theirs FOLDER   # where SAELens and TransformerLens 3 are
python compat/splice_tl.py compare FOLDER           # here: what differs; writes fixtures/splice_tl.json

Two models: the one in the package (GPT-NeoX, trained), in HookedSAETransformer and in SAETransformerBridge,
and a Llama with random weights in the bridge, which wraps the model of transformers as it is.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
FIXTURE = Path(__file__).parent / "fixtures" / "splice_tl.json"
SPECIAL = [0, 1, 2, 3]  # of the world's tokenizer; the first token of each row is 1
LATENT, AMOUNT = dict(topk=41, relu=7, llama=5), 6.0


# ------------------------------------------------------------------ ours


def llama():
    "A small Llama with random weights, larger than any initialisation draws them."
    cfg = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(cfg)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.15)
    return model


def models():
    "name -> (model, its SAEs, rows of tokens)."
    from inputs import saes

    from sae_nb.lm import LM, load_lm
    from sae_nb.sae import build
    from sae_nb.world.documents import documents

    world = load_lm("world")
    texts = [doc.text for doc in documents(7, n=80) if len(doc) > 64][:32]
    own = saes(world)
    for sae in own.values():
        sae.meta = dict(model="world", hook="blocks.2.hook_resid_post")
    yield "world", world, own, world.encode(texts, ctx=64)[0]
    sae = build("batchtopk", 32, 64, k=6, seed=1)
    sae.run(
        LM(llama(), None).acts(torch.arange(1, 65)[None], "blocks.1.hook_resid_post")
    )  # sets its threshold
    sae.meta = dict(model="llama", hook="blocks.1.hook_resid_post")
    rows = torch.randint(3, 100, (8, 32), generator=torch.Generator().manual_seed(1))
    yield "llama", LM(llama(), None, "llama"), dict(llama=sae.eval()), rows


@torch.no_grad()
def ours(folder):
    "Everything the other side needs, and what this repository makes of it."
    import sae_nb.models.splice  # noqa: F401  adds `spliced` to a language model
    from sae_nb.formats.base import export

    for model, lm, saes, rows in models():
        lm.model.save_pretrained(folder / model)
        if lm.tokenizer:
            lm.tokenizer.save_pretrained(folder / "tokenizer")  # the bridge wants one, and never uses it
        save_file(dict(rows=rows), folder / f"{model}.safetensors")
        for name, sae in saes.items():
            export(sae, folder / f"{model}-{name}", "saelens")
            answers = our_answers(lm, sae, LATENT[name], rows)
            save_file(answers, folder / f"{model}-{name}.ours.safetensors")


def our_answers(lm, sae, latent, rows):
    hook = sae.meta["hook"]
    out = dict(latents=sae.encode(lm.acts(rows, hook)), plain=lm.logits(rows))
    asked = dict(
        spliced=dict(error=False),
        with_error=dict(),
        ablated=dict(ablate=[latent]),
        ablated_without_error=dict(ablate=[latent], error=False),
        set_to=dict(set={latent: AMOUNT}),
    )
    for name, how in asked.items():
        with lm.spliced(sae, everywhere=True, **how):
            out[name] = lm.logits(rows)
    if lm.special_ids:
        with lm.spliced(sae, error=False):
            out["without_special"] = lm.logits(rows)
    return {name: t.contiguous() for name, t in out.items()}


# ------------------------------------------------------------------ theirs


def hooked(folder):
    "The world's model as a HookedSAETransformer, nothing folded."
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights

    hf = transformers.AutoModelForCausalLM.from_pretrained(folder / "world").eval()
    c = hf.config
    head = c.hidden_size // c.num_attention_heads
    cfg = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=c.max_position_embeddings,
        d_head=head,
        n_heads=c.num_attention_heads,
        d_mlp=c.intermediate_size,
        act_fn=c.hidden_act,
        d_vocab=c.vocab_size,
        eps=c.layer_norm_eps,
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=round(head * c.rope_parameters["partial_rotary_factor"]),
        rotary_base=c.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        parallel_attn_mlp=c.use_parallel_residual,
        model_name="world",
        device="cpu",
    )
    model = HookedSAETransformer(cfg)
    asis = dict(fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    model.load_and_process_state_dict(convert_neox_weights(hf, cfg), **asis)
    return model.eval()


def bridge(folder, model):
    "A model of transformers in SAELens' wrapper for TransformerLens 3."
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    hf = transformers.AutoModelForCausalLM.from_pretrained(folder / model, attn_implementation="eager").eval()
    words = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return SAETransformerBridge.boot_transformers(model, hf_model=hf, tokenizer=words, device="cpu")


@torch.no_grad()
def their_answers(model, sae, latent, rows, special):
    hook = sae.cfg.metadata.hook_name
    inside = f"{hook}.hook_sae_acts_post"
    if hasattr(model, "get_sae_hook_name"):
        inside = model.get_sae_hook_name(sae)

    def to(amount):
        def edit(f, hook):
            f = f.clone()
            f[..., latent] = amount
            return f

        return [(inside, edit)]

    def run(error, hooks=(), **how):
        with model.saes(saes=[sae], use_error_term=error, **how):
            return model.run_with_hooks(rows, return_type="logits", fwd_hooks=list(hooks))

    _, cache = model.run_with_cache(rows)
    x = cache[model._resolve_hook_name(hook) if hasattr(model, "_resolve_hook_name") else hook]
    out = dict(latents=sae.encode(x), plain=model(rows, return_type="logits"))
    out |= dict(spliced=run(False), with_error=run(True))
    out |= dict(
        ablated=run(True, to(0.0)), ablated_without_error=run(False, to(0.0)), set_to=run(True, to(AMOUNT))
    )
    if special:
        out["without_special"] = run(False, exclude_special_tokens=SPECIAL)
    return {name: t.contiguous() for name, t in out.items()}


def theirs(folder):
    "The exported SAEs in their models."
    import importlib.metadata

    from sae_lens import SAE

    for name, model, make in (
        ("HookedSAETransformer", "world", lambda: hooked(folder)),
        ("SAETransformerBridge", "world", lambda: bridge(folder, "world")),
        ("SAETransformerBridge", "llama", lambda: bridge(folder, "llama")),
    ):
        lens = make()
        rows = load_file(folder / f"{model}.safetensors")["rows"]
        for at in sorted(path for path in folder.glob(f"{model}-*") if path.is_dir()):
            sae = SAE.load_from_disk(at)
            special = name == "HookedSAETransformer"
            answers = their_answers(lens, sae, LATENT[at.name.split("-")[1]], rows, special)
            save_file(answers, folder / f"{at.name}.{name}.safetensors")
    said = {
        name: importlib.metadata.version(name)
        for name in ("sae-lens", "transformer-lens", "transformers", "torch")
    }
    (folder / "versions.json").write_text(json.dumps(said))


# ------------------------------------------------------------------ compare


def next_token_loss(logits, rows):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()


def compare(folder):
    "The largest difference of each answer, and the losses."
    out = dict(versions=json.loads((folder / "versions.json").read_text()), pairs={})
    for file in sorted(folder.glob("*.*.safetensors")):
        at, who, _ = file.name.split(".")
        if who == "ours":
            continue
        a, b = load_file(folder / f"{at}.ours.safetensors"), load_file(file)
        rows = load_file(folder / f"{at.split('-')[0]}.safetensors")["rows"]
        row = dict(flips=int(((a["latents"] > 0) != (b["latents"] > 0)).sum()))
        for name in b:
            row[name] = ((a[name] - b[name]).abs().max() / a[name].abs().max()).item()
        for name in ("plain", "spliced", "ablated"):
            row[f"loss_{name}"] = [next_token_loss(side[name], rows) for side in (a, b)]
        row["moved_by_ablation"] = (a["ablated"] - a["plain"]).abs().max().item()
        if "without_special" in b:
            row["moved_by_special"] = (a["spliced"] - a["without_special"]).abs().max().item()
        out["pairs"][f"{at} in {who}"] = row
        print(f"{at} in {who}", json.dumps(row))
    FIXTURE.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    what, folder = sys.argv[1:]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dict(ours=ours, theirs=theirs, compare=compare)[what](folder)

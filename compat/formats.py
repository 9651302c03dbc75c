"""Files of other libraries, opened by them and by this repository.

python compat/formats.py ours FOLDER                    # here: small SAEs, exported in every format
PEER/bin/python compat/formats.py theirs NAME FOLDER    # where it is installed: saelens, gemma_scope (read by
                                                        # SAELens), dictionary_learning or sparsify
python compat/formats.py compare FOLDER                 # here: what differs; writes agreement.json

`theirs` opens what was exported with the library's own loader and keeps its latents and reconstructions.
It also makes SAEs of every class of its own from a seed, saves them as the library does, and writes
fixtures/formats/NAME.
"""

import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures" / "formats"
THRESHOLDS = dict(
    batchtopk=dict(k=3),
    batchtopk_half=dict(variant="batchtopk", k=3, thresholds="half"),
    matryoshka=dict(k=3, prefixes=(4, 12, 24)),
    best=dict(k=3),
    tsae=dict(k=3),
    jumprelu=dict(target_l0=3.0),
    self_correcting=dict(c=1.0),
    token_weights=dict(k=3, thresholds="per_latent", tilt=0.1),
    tied=dict(k=3, tied="half"),
)
COUNTS = {"topk": dict(k=3), "ortho": dict(k=3, fraction=0.05), "tied/topk": dict(k=3)}
RELU = dict(standard=dict(target_l0=3.0), p_anneal=dict(target_l0=3.0))
GATED = dict(gated=dict(target_l0=3.0))
TRANSCODERS = dict(
    transcoder=dict(variant="topk", k=3, d_out=16),
    skip_transcoder=dict(variant="topk", k=3, d_out=16, skip_connection=True),
)
PLACES = {name: dict(variant="topk", k=3, hook=f"blocks.3.hook_{name}") for name in ("z", "mlp_in")}
OURS = dict(
    saelens={**THRESHOLDS, **COUNTS, **RELU, **GATED, **PLACES},
    dictionary_learning={**THRESHOLDS, **COUNTS, **RELU, **GATED, **PLACES},
    sparsify={**COUNTS, **TRANSCODERS},
    gemma_scope={**THRESHOLDS, **RELU},
)


# ------------------------------------------------------------------ ours


def ours(folder):
    "Small SAEs: as this repository keeps them, exported, and tokens to try them on."
    from sae_nb.formats.base import example_tokens, export
    from sae_nb.sae import save

    x = torch.cat([example_tokens(at).flatten(0, 1) for at in range(1000, 1008)])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(x=x), folder / "tokens.safetensors")
    for library, variants in OURS.items():
        for name in variants:
            sae = ours_of(library, name)
            at = name.replace("/", "-")
            save(sae, folder / "ours" / at)
            export(sae, folder / library / at, library)


def ours_of(library, name, steps=40):
    "One of the small SAEs; after fewer `steps` its files have the same form and other numbers."
    from sae_nb.formats.base import example

    options = {"variant": name, **OURS[library][name]}
    hook = options.pop("hook", "blocks.3.hook_resid_post")
    sae = example(steps=steps, **options)
    sae.meta = dict(model="gpt2", hook=hook)
    return sae


def form(folder):
    "What is in an exported folder but for numbers: configurations whole, and each tensor's type and shape."
    from sae_nb.formats.dictionary_learning import read_pt

    readers = {".json": lambda at: json.loads(at.read_text()), ".pt": read_pt, ".safetensors": load_file}
    readers[".npz"] = lambda at: {name: torch.from_numpy(a) for name, a in np.load(at).items()}
    out = {}
    for at in sorted(folder.iterdir()):
        held = readers[at.suffix](at)
        if at.suffix != ".json":
            held = {name: f"{t.dtype} {list(t.shape)}" for name, t in sorted(held.items())}
        out[at.name] = held
    return out


def changed(library):
    "Of what does this repository write other files today than those that the library opened?"
    from sae_nb.formats.base import export

    said = json.loads((FIXTURES / "agreement.json").read_text())["form"][library]
    out = [f"{name} was never opened" for name in OURS[library] if name not in said]
    for name in said:
        with tempfile.TemporaryDirectory() as d:
            if form(export(ours_of(library, name, steps=1), Path(d), library)) != said[name]:
                out.append(f"{name} is written differently")
    return out


def compare(folder):
    "On and off, latents and reconstructions of every pair."
    from sae_nb.formats.base import differ
    from sae_nb.sae import load

    x = load_file(folder / "tokens.safetensors")["x"]
    out = dict(tokens=len(x), versions={}, differ={}, form={})
    for library, variants in OURS.items():
        for variant in variants:
            name = variant.replace("/", "-")
            file = folder / library / f"{name}.theirs.safetensors"
            if not file.exists():
                print(f"{library:20} {variant:16} not opened yet")
                continue
            theirs = load_file(file)
            d = differ(load(folder / "ours" / name), (theirs["latents"], theirs["rebuilt"]), x)
            out["differ"].setdefault(library, {})[variant] = d
            out["form"].setdefault(library, {})[variant] = form(folder / library / name)
            print(f"{library:20} {variant:16} {theirs_kind(folder / library / name):24}", d)
        versions = folder / f"{library}.versions.json"
        if versions.exists():
            out["versions"][library] = json.loads(versions.read_text())
    FIXTURES.mkdir(parents=True, exist_ok=True)
    (FIXTURES / "agreement.json").write_text(json.dumps(out, indent=1) + "\n")


def kept(library):
    "Folders of a library's own and what it makes of them: name, folder, tokens, (latents, reconstructions)."
    answers = load_file(FIXTURES / library / "answers.safetensors")
    for at in sorted(path for path in (FIXTURES / library).iterdir() if path.is_dir()):
        with tempfile.TemporaryDirectory() as d:
            shutil.copytree(at, d, dirs_exist_ok=True)
            if (Path(d) / "ae.safetensors").exists():
                torch.save(load_file(Path(d) / "ae.safetensors"), Path(d) / "ae.pt")
                (Path(d) / "ae.safetensors").unlink()
            yield (
                at.name,
                d,
                answers["x"],
                tuple(answers[f"{at.name}.{part}"] for part in ("latents", "rebuilt")),
            )


def agreement(library):
    "How the library and this repository agree on what was exported: the largest number of each kind."
    said = json.loads((FIXTURES / "agreement.json").read_text())
    rows = said["differ"][library].values()
    worst = {name: max(row[name] for row in rows) for name in ("flips", "latents", "rebuilt")}
    return {**said["versions"][library], "variants": len(rows), "tokens": said["tokens"], **worst}


class Harmful:
    "What it does when it is unpickled shows on disk."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def theirs_kind(folder):
    "What the other library calls it."
    if (folder / "params.npz").exists():
        return "params.npz"
    if (folder / "config.json").exists():
        return json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    cfg = json.loads((folder / "cfg.json").read_text())
    return cfg.get("architecture") or cfg["activation"]


# ------------------------------------------------------------------ theirs


def coded(sae, x):
    "Latents and reconstructions."
    f = sae.encode(x)
    return f, sae.decode(f)


class SAELens:
    package = "sae-lens"

    def open(self, folder):
        from sae_lens import SAE

        return SAE.load_from_disk(folder)

    def answers(self, sae, x):
        "At `hook_z` it takes heads apart and puts them together."
        if sae.cfg.reshape_activations != "hook_z":
            return coded(sae, x)
        f, rebuilt = coded(sae, x.unflatten(-1, (4, -1)))
        return f, rebuilt.flatten(-2)

    def own(self):
        "name -> an SAE of this library."
        import sae_lens.saes as s
        from sae_lens.saes.gated_sae import GatedSAEConfig
        from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
        from sae_lens.saes.standard_sae import StandardSAEConfig
        from sae_lens.saes.topk_sae import TopKSAEConfig

        size = dict(d_in=16, d_sae=24)
        raw = dict(size, apply_b_dec_to_input=False)
        made = dict(
            standard=s.StandardSAE(StandardSAEConfig(**size)),
            topk=s.TopKSAE(TopKSAEConfig(**size, k=3)),
            topk_rescaled=s.TopKSAE(TopKSAEConfig(**raw, k=3, rescale_acts_by_decoder_norm=True)),
            jumprelu=s.JumpReLUSAE(JumpReLUSAEConfig(**raw)),
            gated=s.GatedSAE(GatedSAEConfig(**raw)),
        )
        for sae in made.values():
            sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2", "blocks.3.hook_resid_post"
        return made

    def keep(self, sae, folder, name):
        sae.save_model(folder)


class GemmaScope:
    "Gemma Scope's files as SAELens reads them."

    package = "sae-lens"

    def open(self, folder):
        from unittest import mock

        from sae_lens.loading import pretrained_sae_loaders as loaders
        from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

        at = "google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_3"
        with mock.patch.object(loaders, "hf_hub_download", lambda **_: folder / "params.npz"):
            cfg, state, _ = loaders.gemma_2_sae_huggingface_loader(*at, cfg_overrides=dict(d_in=16, d_sae=24))
        sae = JumpReLUSAE(JumpReLUSAEConfig.from_dict(loaders.handle_config_defaulting(cfg)))
        sae.process_state_dict_for_loading(state)
        sae.load_state_dict(state)
        return sae

    answers = SAELens.answers

    def own(self):
        return {}


class DictionaryLearning:
    package = "dictionary-learning"

    def __init__(self):
        "Names that its modules import for text and language models, and nothing here uses."
        for module, name in (
            ("nnsight", "LanguageModel"),
            ("datasets", "load_dataset"),
            ("zstandard", "ZstdDecompressor"),
        ):
            setattr(sys.modules.setdefault(module, types.ModuleType(module)), name, object)

    def open(self, folder):
        from dictionary_learning.utils import load_dictionary

        return load_dictionary(str(folder), "cpu")[0]

    def answers(self, ae, x):
        return coded(ae, x)

    def own(self):
        from dictionary_learning import dictionary as d
        from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

        nested = matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(16, 24, 3, [4, 8, 12])
        made = [d.AutoEncoder(16, 24), d.GatedAutoEncoder(16, 24)]
        made += [d.JumpReluAutoEncoder(16, 24), top_k.AutoEncoderTopK(16, 24, 3)]
        made += [batch_top_k.BatchTopKSAE(16, 24, 3), nested, d.AutoEncoderNew(16, 24)]
        for ae in made:
            if "threshold" in dict(ae.named_buffers()):
                ae.threshold.fill_(2.5)
        return {type(ae).__name__: ae for ae in made}

    def keep(self, ae, folder, name):
        "As its training loop does, and as safetensors, which all but one stay (`tidy`)."
        trainer = dict(
            dict_class=name, activation_dim=16, dict_size=24, layer=3, lm_name="EleutherAI/pythia-70m"
        )
        trainer |= dict(
            submodule_name="resid_post_layer_3", **({"k": ae.k.item()} if hasattr(ae, "k") else {})
        )
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: v.cpu().contiguous().clone() for key, v in ae.state_dict().items()}
        torch.save(state, folder / "ae.pt")
        if name != "BatchTopKSAE":
            save_file(state, folder / "ae.safetensors")
        (folder / "config.json").write_text(json.dumps(dict(trainer=trainer), indent=4) + "\n")

    def tidy(self, folder):
        "Its tests write `ae.pt` anew from the tensors."
        if (folder / "ae.safetensors").exists():
            (folder / "ae.pt").unlink()


class Sparsify:
    package = "eai-sparsify"

    def open(self, folder):
        from sparsify import SparseCoder

        return SparseCoder.load_from_disk(folder)

    def answers(self, sae, x):
        top, idx, _ = sae.encode(x)
        f = torch.zeros(len(x), sae.num_latents).scatter(1, idx, top)
        whole = sae.cfg.transcode  # of an SAE it would keep 4 k latents where `multi_topk` is on
        return f, sae(x).sae_out if whole else sae.decode(top, idx)

    def own(self):
        from sparsify import SparseCoder, SparseCoderConfig

        kinds = dict(
            topk=dict(multi_topk=True),
            transcoder=dict(transcode=True),
            skip_transcoder=dict(transcode=True, skip_connection=True),
        )
        size = dict(num_latents=24, k=3)
        return {name: SparseCoder(16, SparseCoderConfig(**size, **how)) for name, how in kinds.items()}

    def keep(self, sae, folder, name):
        sae.save_to_disk(folder)


LIBRARIES = dict(
    saelens=SAELens, gemma_scope=GemmaScope, dictionary_learning=DictionaryLearning, sparsify=Sparsify
)


@torch.no_grad()
def draw(sae, g):
    "Weights that leave about an eighth of the latents on, rows of any length."
    for name, p in sorted(sae.named_parameters()):
        if name == "threshold":
            p.copy_(2 + torch.rand(p.shape, generator=g))
        elif name in ("r_mag", "bias", "b_dec", "decoder_bias", "decoder.bias", "b_mag", "mag_bias"):
            p.copy_(0.5 * torch.randn(p.shape, generator=g))
        elif p.dim() == 1:
            p.copy_(torch.randn(p.shape, generator=g) - (0 if "threshold" in sae.state_dict() else 2))
        else:
            p.copy_(0.6 * torch.randn(p.shape, generator=g))


@torch.no_grad()
def theirs(library, folder):
    import importlib.metadata

    lib = LIBRARIES[library]()
    x = load_file(folder / "tokens.safetensors")["x"]
    for at in sorted(path for path in (folder / library).iterdir() if path.is_dir()):
        f, rebuilt = lib.answers(lib.open(at), x)
        kept = dict(latents=f.contiguous(), rebuilt=rebuilt.contiguous())
        save_file(kept, folder / library / f"{at.name}.theirs.safetensors")
    versions = {name: importlib.metadata.version(name) for name in (lib.package, "torch")}
    (folder / f"{library}.versions.json").write_text(json.dumps(versions))
    answers, own = dict(x=x[:64].contiguous()), lib.own()
    g = torch.Generator().manual_seed(0)
    for name, sae in own.items():
        draw(sae, g)
        at = FIXTURES / library / name
        lib.keep(sae, at, name)
        f, rebuilt = lib.answers(lib.open(at), answers["x"])
        print(f"{library:20} {name:24} {(f > 0).sum().item() / len(f):.2f} latents per token")
        answers |= {f"{name}.latents": f.contiguous(), f"{name}.rebuilt": rebuilt.contiguous()}
        if hasattr(lib, "tidy"):
            lib.tidy(at)
    if own:
        save_file(answers, FIXTURES / library / "answers.safetensors")


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    dict(ours=ours, theirs=theirs, compare=compare)[what](*rest[:-1], Path(rest[-1]))

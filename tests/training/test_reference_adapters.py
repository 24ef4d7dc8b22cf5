"""One step of each kind of adapter: the loss and every gradient are those of PEFT around diffusers' transformer."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")

from pixart.checkpoints import load_transformer
from pixart.training.bases import PackedLinear
from pixart.training.teacher import without_adapters
from tests.support import training_reference as reference
from tests.support.one_step import TIMESTEPS, assert_losses, expected_step, predicted, randomize, start, step

SPLIT = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
         "attn.proj": ("attn1.to_out.0",), "cross_attn.q_linear": ("attn2.to_q",), "cross_attn.proj": ("attn2.to_out.0",),
         "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",)}  # fmt: skip
OUTSIDE = {"t_block.1": "adaln_single.linear", "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
           "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2", "y_embedder.y_proj.fc1": "caption_projection.linear_1",
           "y_embedder.y_proj.fc2": "caption_projection.linear_2", "final_layer.linear": "proj_out"}  # fmt: skip
KINDS = {
    "lora": ({"kind": "lora", "rank": 4}, lambda targets: peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets)),
    "alpha": ({"kind": "lora", "rank": 4, "alpha": 6}, lambda targets: peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)),
    "rslora": ({"kind": "lora", "rank": 9, "alpha": 2, "rank_stabilized": True},
               lambda targets: peft.LoraConfig(r=9, lora_alpha=2, use_rslora=True, target_modules=targets)),
    "dora": ({"kind": "dora", "rank": 4}, lambda targets: peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=targets)),
    "loha": ({"kind": "loha", "rank": 3, "alpha": 2}, lambda targets: peft.LoHaConfig(r=3, alpha=2, target_modules=targets)),
    "lokr": ({"kind": "lokr", "rank": 2, "alpha": 3}, lambda targets: peft.LoKrConfig(r=2, alpha=3, target_modules=targets)),
    "lokr-whole": ({"kind": "lokr", "rank": 64, "alpha": 32}, lambda targets: peft.LoKrConfig(r=64, alpha=32, target_modules=targets)),
}  # fmt: skip
ROWS = ("lora_B", "hada_w1_a", "hada_w2_a", "magnitude")  # are split where diffusers' layers are


def sources_of(module: str) -> list[str]:
    """diffusers' names of a native layer, spelled out once more."""
    if module in OUTSIDE:
        return [OUTSIDE[module]]
    _, block, rest = module.split(".", 2)
    return [f"transformer_blocks.{block}.{name}" for name in SPLIT[rest]]


def pieces(name: str, prefix: str) -> list[tuple[str, int, int]]:
    """(name in PEFT's model of diffusers, part, parts) of one of our adapter's parameters; parts is 1 for shared matrices."""
    module, role = next((name[: name.index(f".{mark}")], name[name.index(f".{mark}") :]) for mark in ("lora_", "hada_", "lokr_") if f".{mark}" in name)
    sources = sources_of(module)
    split = any(mark in role for mark in ROWS)
    return [(f"{prefix}{source}{role}", part if split else 0, len(sources) if split else 1) for part, source in enumerate(sources)]


def copied_adapter(network: nn.Module, model: nn.Module, config: Any) -> nn.Module:
    """PEFT's own model of diffusers' transformer, with the values of ours."""
    made = peft.get_peft_model(model.requires_grad_(False), config)
    named = dict(made.named_parameters())
    for name, value in network.named_parameters():
        if value.requires_grad:
            for place, part, parts in pieces(name, "base_model.model."):
                named[place].data = value.detach().chunk(parts)[part].clone()
    return made


def adapter_gradients(network: nn.Module, made: nn.Module) -> dict[str, Tensor]:
    """PEFT's gradients by our names: those of a matrix that fused layers share are summed."""
    theirs = reference.gradients(made.named_parameters())
    found, used = {}, set()
    for name, value in network.named_parameters():
        if value.requires_grad:
            places = pieces(name, "base_model.model.")
            used |= {place for place, _, _ in places}
            parts = [theirs[place] for place, _, _ in places]
            found[name] = torch.cat(parts) if places[0][2] > 1 else sum(parts)
    assert used == theirs.keys()
    return found


def targets_of(names: list[str]) -> list[str]:
    return [source for name in names for source in sources_of(name)]


ON_BASES = [*((kind, None) for kind in KINDS), *((kind, base) for kind in ("lora", "dora", "loha", "lokr") for base in ("fp8", "nf4"))]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "base"), ON_BASES)
def test_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, base: str | None) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    begun = start(tmp_path, monkeypatch)
    settings, config = KINDS[kind]
    layers = ("attn.proj", "cross_attn.q_linear", "mlp.fc2") if kind.startswith("lokr") else ("attn.qkv", "cross_attn.kv_linear", "mlp.fc1")
    method = {"name": "lora", **settings, "base": base, "targets": list(layers), "blocks": [0, 2]}
    network, losses = step(begun, begun.recipe(tmp_path, method=method), randomize)
    packed = {name: module for name, module in network.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == (3 * 7 if base else 0)
    with torch.no_grad():
        for name, layer in packed.items():  # the reference computes with the unpacked weights
            sources = sources_of(name.replace(".base_layer", ""))
            for source, piece in zip(sources, layer.weight.chunk(len(sources))):
                begun.model.get_submodule(source).weight.copy_(piece)
    targets = targets_of([f"blocks.{block}.{layer}" for block in (0, 2) for layer in layers])
    made = copied_adapter(network, begun.model, config(targets))
    assert_losses(losses, expected_step(begun, predicted(begun, made)))
    reference.assert_gradients(reference.gradients(network.named_parameters()), adapter_gradients(network, made))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_linear_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = start(tmp_path, monkeypatch)
    network, losses = step(begun, begun.recipe(tmp_path, method={"name": "lora", "rank": 2, "targets": "all"}), randomize)
    layers = [*OUTSIDE, *(f"blocks.{block}.{layer}" for block in range(3) for layer in SPLIT)]
    made = copied_adapter(network, begun.model, peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets_of(layers)))
    assert_losses(losses, expected_step(begun, predicted(begun, made)))
    reference.assert_gradients(reference.gradients(network.named_parameters()), adapter_gradients(network, made))
    with without_adapters(network), torch.no_grad():
        plain = network(begun.batch.latent, TIMESTEPS, begun.batch.context, begun.batch.mask)
    torch.testing.assert_close(plain, load_transformer(begun.path)(begun.batch.latent, TIMESTEPS, begun.batch.context, begun.batch.mask))
    assert all(value.requires_grad == ("lora_" in name) for name, value in network.named_parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_t5_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentencepiece")
    from tests.support.tiny_pipeline import padded_embeddings
    from tests.support.tiny_text import save_t5_file, tiny_t5

    texts = ("a red circle", "", "green star above the tree", "dog")
    begun = start(tmp_path, monkeypatch, captions=texts)
    t5 = tiny_t5(width=32)
    source = {"name": "scenes", "text_encoder": str(save_t5_file(t5, tmp_path / "t5.safetensors"))}
    method = {"name": "lora", "rank": 4, "text_rank": 2, "targets": "attention+mlp"}
    network, losses = step(begun, begun.recipe(tmp_path, method=method, source=source), randomize)

    names = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    text = peft.get_peft_model(t5.requires_grad_(False), peft.LoraConfig(r=2, lora_alpha=2, target_modules=names))
    own = {name.removeprefix("text_encoder."): value for name, value in network.named_parameters() if name.startswith("text_encoder.")}
    for name, value in text.named_parameters():
        if value.requires_grad:
            value.data = own[name.removeprefix("base_model.model.")].detach().clone()
    layers = [f"blocks.{block}.{layer}" for block in range(3) for layer in SPLIT]
    made = copied_adapter(network.transformer, begun.model, peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets_of(layers)))
    monkeypatch.setattr(torch, "no_grad", torch.enable_grad)  # the support module encodes without gradients
    states, mask = padded_embeddings(text, list(texts), 12)
    begun.captions = {"context": states, "mask": mask}
    assert_losses(losses, expected_step(begun, predicted(begun, made)))
    ours = reference.gradients(network.named_parameters())
    theirs = {f"text_encoder.{name.removeprefix('base_model.model.')}": value for name, value in reference.gradients(text.named_parameters()).items()}
    theirs |= {f"transformer.{name}": value for name, value in adapter_gradients(network.transformer, made).items()}
    reference.assert_gradients(ours, theirs)
    assert any(name.startswith("text_encoder.") and bool(value.any()) for name, value in ours.items())

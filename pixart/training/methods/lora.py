"""A LoRA or one of its kin beside frozen weights, through peft; beside those of T5 too, if asked."""
from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...config import get_variant
from ...errors import ConfigError
from ..adapter_files import PREFIX, TEXT_PREFIX, check_peft_folder, comfy_tensors, layers_of, write_peft_folder
from ..adapters import ALL, KINDS, PRESETS, Adaptation, add_adapters, choose_layers
from ..bases import DTYPES, base_dtype, check_base, pack_matrices
from ..batch import Batch, Source
from ..initialize import is_dry, load_base
from ..recipe import Recipe
from ..results import check_saving, describe
from ..text_trained import TextTrained
from ..write import write_weights
from . import full

if TYPE_CHECKING:
    from ...text.encoder import TextEncoder

TRANSFORMER, TEXT = "transformer.", "text_encoder."  # parts of `TextTrained`
T5_LAYERS = re.compile(r"encoder\.block\.\d+\.layer\.\d+\.\w+\.\w+")


@dataclass(frozen=True)
class Settings:
    """Of the adapter."""

    kind: str = "lora"  # or "dora", "lokr", "loha"
    rank: int = 16
    alpha: float | None = None  # the change is scaled by alpha / rank; null is the rank itself, so by 1
    rank_stabilized: bool = False  # rsLoRA: by alpha / sqrt(rank)
    targets: str | tuple[str, ...] = "attention"  # or "attention+mlp", "all" linear layers, or names like "attn.qkv"
    blocks: tuple[int, ...] | None = None  # only in these
    dropout: float = 0.0  # of the adapter's input; of LoHa and LoKr, of the change's rows
    factor: int = -1  # of LoKr: the size of its first matrix; -1 makes both alike
    base: str | None = None  # the frozen weights are kept in "bf16", "fp16", "fp32", "fp8" or "nf4"; null as the recipe's precision
    text_rank: int = 0  # of an adapter of T5, of the same kind; 0 leaves T5 alone
    save_dtype: str = "fp16"  # of the result; or "bf16", "fp32"
    peft_folder: bool = False  # beside the result, NAME-peft, for diffusers


def check(settings: Settings) -> None:
    """Raises ConfigError for what no run can have."""
    check_saving("original", settings.save_dtype)
    if settings.kind not in KINDS:
        raise ConfigError(f"kind is {settings.kind!r}; expected one of {', '.join(KINDS)}.")
    if settings.rank < 1 or settings.text_rank < 0:
        raise ConfigError(f"rank is {settings.rank} and text_rank {settings.text_rank}; expected 1 or more, and 0 or more.")
    if settings.alpha is not None and not settings.alpha > 0:
        raise ConfigError(f"alpha is {settings.alpha}; expected a number above 0, or null for the rank.")
    if not 0 <= settings.dropout < 1:
        raise ConfigError(f"dropout is {settings.dropout}; expected 0 to below 1.")
    if settings.factor != -1 and (settings.kind != "lokr" or settings.factor < 1):
        raise ConfigError(f"factor is {settings.factor} for the kind {settings.kind!r}; expected -1, or 1 or more for lokr.")
    if settings.rank_stabilized and settings.kind not in ("lora", "dora"):
        raise ConfigError(f"rank_stabilized is for lora and dora; {settings.kind} has no such form.")
    if isinstance(settings.targets, str) and settings.targets not in (*PRESETS, ALL):
        raise ConfigError(f"targets is {settings.targets!r}; expected {', '.join((*PRESETS, ALL))}, or a list of names of layers.")
    if settings.peft_folder:
        check_peft_folder(settings.kind)


class Part(full.Part):
    """Trains adapters alone; `teacher.without_adapters` gives the network that they are beside."""

    def __init__(self, settings: Settings, recipe: Recipe) -> None:
        if not recipe.initialize:
            raise ConfigError("Method lora needs finished weights to start from; set initialize to them.")
        check_base(settings.base, recipe.precision)
        super().__init__(settings, recipe)

    def build(self, source: Source, device: torch.device) -> nn.Module:
        settings = self.settings
        dtype = base_dtype(settings.base, self.recipe.precision)
        network = load_base(self.recipe.initialize, self.recipe.variant, self.config(), dtype, full.attention_of(device))
        targets = choose_layers(network, settings.targets, settings.blocks)
        network = pack_matrices(network, settings.base, device).to(device)
        add_adapters(network, self.adaptation(), targets)
        return self._with_text_encoder(network, device) if settings.text_rank else network

    def adaptation(self, text: bool = False) -> Adaptation:
        """Of the transformer's layers, or of T5's."""
        settings = self.settings
        rank = settings.text_rank if text else settings.rank
        alpha = rank if settings.alpha is None else settings.alpha
        return Adaptation(settings.kind, rank, alpha, settings.rank_stabilized, settings.dropout, settings.factor)

    def _with_text_encoder(self, transformer: nn.Module, device: torch.device) -> TextTrained:
        place = getattr(self.recipe.source.settings, "text_encoder", None)
        if not place:
            raise ConfigError("text_rank trains T5 too; set source.text_encoder (--text-encoder) to it.")
        dtype = base_dtype(self.settings.base, self.recipe.precision)
        encoder = _text_encoder(place, torch.bfloat16 if dtype == torch.float16 else dtype)  # in fp16 T5 overflows
        targets = choose_layers(encoder.model, self._text_targets(), None, text=True)
        pack_matrices(encoder.model, self.settings.base, device, T5_LAYERS)
        add_adapters(encoder.to(device).model, self.adaptation(text=True), targets)
        return TextTrained(transformer, encoder, get_variant(self.recipe.variant).max_tokens)

    def _text_targets(self) -> str:
        """Names are of the transformer's layers; T5 then gets them in its attention."""
        return self.settings.targets if isinstance(self.settings.targets, str) else "attention"

    def blocks(self, network: nn.Module) -> Iterable[nn.Module]:
        if isinstance(network, TextTrained):
            return [*network.transformer.blocks, *network.text_encoder.encoder.block]
        return network.blocks

    def null_rows(self, network: nn.Module) -> Tensor | None:
        return super().null_rows(network.transformer if isinstance(network, TextTrained) else network)

    def conditions(self, network: nn.Module, batch: Batch) -> dict[str, Any]:
        found = super().conditions(network, batch)
        if not isinstance(network, TextTrained):
            return found
        if getattr(batch, "captions", None) is None:
            raise ConfigError(f"The source {self.recipe.source.name!r} gives no captions as texts; T5 can't be trained on it (text_rank).")
        size = {"size": found["size"]} if "size" in found else {}
        return {"captions": batch.captions, **size}

    def write(self, network: nn.Module, averages: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        both, dtype = isinstance(network, TextTrained), DTYPES[self.settings.save_dtype]
        layers = layers_of(averages, TRANSFORMER if both else "")
        tensors = comfy_tensors(layers, self.adaptation(), PREFIX, dtype)
        facts = describe(self.recipe, "lora", metadata)
        text_layers = layers_of(averages, TEXT) if both else {}
        tensors |= comfy_tensors(text_layers, self.adaptation(text=True), TEXT_PREFIX, dtype)
        write_weights(tensors, path, facts, dtype=None)
        if self.settings.peft_folder:
            base = PurePath(self.recipe.initialize).name
            write_peft_folder(layers, self.adaptation(), path.with_name(f"{path.stem}-peft"), base, facts)
            folder = path.with_name(f"{path.stem}-peft-text")
            if not text_layers:
                shutil.rmtree(folder, ignore_errors=True)  # of the run that this one replaces
            else:
                write_peft_folder(text_layers, self.adaptation(text=True), folder, base, facts)


def _text_encoder(place: str, dtype: torch.dtype) -> TextEncoder:
    """T5 with its tokenizer; in a dry run without its numbers."""
    from ...text.encoder import TextEncoder, empty_model, find_tokenizer_of, load_text_encoder, open_weights  # slow to import

    if not is_dry():
        return load_text_encoder(place, dtype=dtype)
    with torch.device("cpu"):
        weights, _ = open_weights(place, dtype)
        tokenizer = find_tokenizer_of(weights, None)
    model = empty_model(weights).to(dtype)
    model.set_input_embeddings(model.shared)
    return TextEncoder(model.eval().requires_grad_(False), tokenizer)

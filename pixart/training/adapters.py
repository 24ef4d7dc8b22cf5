"""LoRA and its kin put beside a network's linear layers by peft: which layers, which kind, and what they weigh in a file."""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import ConfigError

KINDS = ("lora", "dora", "lokr", "loha")
ATTENTION = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj")
MLP = ("mlp.fc1", "mlp.fc2")
TEXT_ATTENTION, TEXT_MLP = ("q", "k", "v", "o"), ("wi", "wi_0", "wi_1", "wo")  # of T5's layers
PRESETS = {"attention": (ATTENTION, TEXT_ATTENTION), "attention+mlp": (ATTENTION + MLP, TEXT_ATTENTION + TEXT_MLP)}
ALL = "all"  # every linear layer
NAME = "default"  # peft's own name for the only adapter


@dataclass(frozen=True)
class Adaptation:
    """One kind of adapter in one strength."""

    kind: str
    rank: int
    alpha: float
    rank_stabilized: bool = False  # rsLoRA, arXiv:2312.03732: alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0
    factor: int = -1  # LoKr: size of the first matrix; -1 makes both alike

    @property
    def scale(self) -> float:
        """Of the change."""
        return self.alpha / (sqrt(self.rank) if self.rank_stabilized else self.rank)

    def config(self, targets: Sequence[str]) -> Any:
        """peft's, for layers by their names."""
        library = load_peft()
        if self.kind in ("lora", "dora"):
            return library.LoraConfig(
                r=self.rank, lora_alpha=self.alpha, use_rslora=self.rank_stabilized, use_dora=self.kind == "dora",
                lora_dropout=self.dropout, target_modules=list(targets),
            )  # fmt: skip
        common = {"r": self.rank, "alpha": self.alpha, "rank_dropout": self.dropout, "target_modules": list(targets)}
        return library.LoHaConfig(**common) if self.kind == "loha" else library.LoKrConfig(decompose_factor=self.factor, **common)


def add_adapters(network: nn.Module, adaptation: Adaptation, targets: Sequence[str]) -> None:
    """Puts a trainable adapter, in fp32, beside each of the named layers, in place; all else is frozen. At first nothing changes."""
    network.requires_grad_(False)
    load_peft().inject_adapter_in_model(adaptation.config(targets), network, NAME)
    for parameter in network.parameters():
        if parameter.requires_grad:  # peft takes the dtype of the layer, in which small steps would be lost
            parameter.data = parameter.data.float()


def choose_layers(network: nn.Module, targets: str | Sequence[str], blocks: Sequence[int] | None, text: bool = False) -> list[str]:
    """Names of the linear layers that get an adapter.

    targets: a preset, or ends of names ("attn.qkv", "blocks.3.mlp.fc1"). blocks: of these alone. text: of a T5, for which
    presets mean its own layers. Raises ConfigError for what doesn't exist.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if targets != ALL and isinstance(targets, str) and targets not in PRESETS:
        raise ConfigError(f"targets is {targets!r}; expected {', '.join((*PRESETS, ALL))}, or a list of names of layers.")
    ends = PRESETS[targets][text] if isinstance(targets, str) and targets != ALL else () if targets == ALL else tuple(targets)
    found = names if targets == ALL else [name for name in names if _ends(name, ends)]
    unknown = [] if isinstance(targets, str) else [end for end in ends if not any(_ends(name, (end,)) for name in names)]
    if unknown:
        known = ", ".join(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in names))
        raise ConfigError(f"targets names {', '.join(unknown)}, but this model has no linear layer of that name; expected some of {known}.")
    if blocks is not None:
        count = 1 + max((int(match[1]) for name in names if (match := re.search(r"(?:^|\.)blocks?\.(\d+)\.", name))), default=-1)
        outside = [block for block in blocks if not 0 <= block < count]
        if outside:
            raise ConfigError(f"blocks has {', '.join(map(str, outside))}; this model has the blocks 0 to {count - 1}.")
        found = [name for name in found if (match := re.search(r"(?:^|\.)blocks?\.(\d+)\.", name)) and int(match[1]) in blocks]
    if not found:
        raise ConfigError("targets and blocks leave no layer to train; name more of either.")
    return found


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def load_peft() -> ModuleType:
    """The library; raises ConfigError saying how to install it."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"A LoRA is trained with the library peft ({error}): `pip install peft`.") from None
    return peft

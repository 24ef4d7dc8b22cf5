"""Training a ControlNet beside a frozen transformer: the same loop, with a hint for every picture."""
from __future__ import annotations

from torch import Tensor, nn

from ..config import TransformerConfig
from ..controlnet import ControlledTransformer, ControlNetConfig, PixArtControlNet, copy_base_blocks
from ..errors import ConfigError
from ..layers import PixArtBlock
from .data import Batch
from .loop import Trainer
from .recipe import Recipe


class TrainedControl(ControlledTransformer):
    """What the loop takes for its transformer; the hint comes as the last positional input."""

    @property
    def blocks(self) -> list[PixArtBlock]:
        """The blocks whose matrices Muon takes."""
        return [block.copied_block for block in self.controlnet.controlnet]

    def forward(self, latent, timestep, context, mask, size, hint) -> Tensor:
        return super().forward(latent, timestep, context, mask, size, hint=hint)


class ControlTrainer(Trainer):
    """Trains `control_blocks` copies of the first blocks of the weights in `initialize`, which stay as they are."""

    def __init__(self, recipe: Recipe) -> None:
        if not recipe.initialize or recipe.align_weight:
            raise ConfigError(
                f"control_blocks is {recipe.control_blocks}: a ControlNet is trained beside finished weights; set initialize to "
                "them, and leave out align_weight."
            )
        super().__init__(recipe)

    def _new_model(self) -> TrainedControl:
        base = super()._new_model()
        controlnet = PixArtControlNet(control_config(base.config, self.recipe.control_blocks), attention=base.blocks[0].attn.attention)
        copy_base_blocks(controlnet, base)
        if self.recipe.compile_blocks:
            for block in controlnet.controlnet:
                block.copied_block.compile(dynamic=True)
        return TrainedControl(base, controlnet)

    def _inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        if batch.hint is None:
            raise ConfigError(f"The data source {self.recipe.source!r} gives no hints; a ControlNet can't be trained on it.")
        return *super()._inputs(batch), batch.hint.to(self.accelerator.device)

    def _trained(self, module: nn.Module) -> nn.Module:
        return module.controlnet


def control_config(base: TransformerConfig, depth: int) -> ControlNetConfig:
    """Sizes of a ControlNet of `depth` blocks for a base."""
    compressed = tuple((block, ratio) for block, ratio in base.compressed_blocks if block < depth)
    return ControlNetConfig(base.hidden_size, depth, base.num_heads, base.mlp_hidden, compressed, base.qk_norm)

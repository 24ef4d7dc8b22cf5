"""The first weights of a run: fresh ones, or those of a file."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionFunction
from ..checkpoints import load_transformer
from ..checkpoints.detect import AUTO
from ..checkpoints.keys import NULL_CAPTION_KEY
from ..config import TransformerConfig
from ..embeddings import position_table
from ..errors import ConfigError
from ..logs import get_logger
from ..model import PixArtTransformer

logger = get_logger(__name__)
OF_FILES = ("compressed_blocks", "compression_mode", "null_caption", "max_tokens", "qk_norm")  # fields in which a variant's weights differ
LAYER_SIZES = ("hidden_size", "depth", "patch_size", "in_channels", "out_channels", "mlp_hidden", "caption_channels", "micro_condition")
SIZE_EMBEDDERS = ("csize_embedder.", "ar_embedder.")  # of alpha-1024 alone
PASS_GAIN = 0.3  # of a latent value in its own channels; small beside the positions, which keep LayerNorm's divisor steady


@torch.no_grad()
def initialize_weights(model: PixArtTransformer) -> None:
    """As PixArt begins: Xavier layers, small embedders, and blocks and output that start as zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    embedders = [model.t_embedder.mlp[0], model.t_embedder.mlp[2], model.t_block[1]]
    embedders += [model.y_embedder.y_proj.fc1, model.y_embedder.y_proj.fc2]
    if model.config.micro_condition:
        embedders += [model.csize_embedder.mlp[0], model.csize_embedder.mlp[2]]
        embedders += [model.ar_embedder.mlp[0], model.ar_embedder.mlp[2]]
    for layer in embedders:
        nn.init.normal_(layer.weight, std=0.02)
    size = model.config.hidden_size
    for block in model.blocks:
        nn.init.normal_(block.scale_shift_table, std=size**-0.5)
        nn.init.zeros_(block.cross_attn.proj.weight)
    nn.init.normal_(model.final_layer.scale_shift_table, std=size**-0.5)
    nn.init.zeros_(model.final_layer.linear.weight)
    nn.init.zeros_(model.final_layer.linear.bias)


def is_dry() -> bool:
    """Whether tensors are made on the meta device now, as in a dry run, which loads no weights."""
    return torch.empty(0).device.type == "meta"


def copy_weights(model: PixArtTransformer, path: str, variant: str) -> list[int]:
    """Starts from a file's weights; raises ConfigError if they are another model's. The null caption may be absent.

    variant: of the file, or "auto": an alpha may then begin a Sigma, whose layers are the same but for the size embedders,
    which are left out, and the null caption, which has other rows. So may a file without KV compression begin one with it:
    the blocks that the model compresses and the file doesn't are returned. Positions are always computed.
    """
    if is_dry() and not Path(path).exists():
        return []
    start, found = _read(path, variant, torch.float32)
    _check_compression(model.config, found, path)
    own = model.state_dict()
    new = sorted(dict(model.config.compressed_blocks).keys() - dict(found.compressed_blocks).keys())
    optional = {key for key in own if key.startswith(tuple(f"blocks.{i}.attn.{part}." for i in new for part in ("sr", "norm")))}
    if variant == AUTO:
        _leave_alphas_own(start, own, path)
    missing = sorted(own.keys() - start.keys() - optional - {NULL_CAPTION_KEY})
    other = sorted(key for key in start.keys() if key not in own or own[key].shape != start[key].shape)
    if missing or other:
        raise ConfigError(
            f"{path} can't begin this run, whose model has other sizes: missing {', '.join(missing[:4]) or 'nothing'}; unknown or of "
            f"another shape: {', '.join(other[:4]) or 'nothing'}. Give weights of the recipe's variant, or change its variant."
        )
    if not is_dry():
        model.load_state_dict(start, strict=False)
    if NULL_CAPTION_KEY in own and NULL_CAPTION_KEY not in start:
        model.y_embedder.y_embedding = None  # zeros would be no empty caption
        model.config = replace(model.config, null_caption=False)
    return [] if is_dry() else new


def _read(path: str, variant: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], TransformerConfig]:
    """A file's weights and sizes; in a dry run the weights stay mapped to the file, in its own dtype."""
    dry = is_dry()
    with torch.device("cpu"):
        loaded = load_transformer(path, variant=variant, dtype=None if dry else dtype)
    return dict(loaded.state_dict()), loaded.config


def _leave_alphas_own(start: dict[str, Tensor], own: Mapping[str, Tensor], path: str) -> None:
    """Takes out, and logs, what a file has and this model's family doesn't: weak to strong, PixArt-Sigma's section 3.3."""
    left = [key for key in start if key.startswith(SIZE_EMBEDDERS) and key not in own]
    if NULL_CAPTION_KEY in start and NULL_CAPTION_KEY in own and len(start[NULL_CAPTION_KEY]) != len(own[NULL_CAPTION_KEY]):
        left.append(NULL_CAPTION_KEY)
    for key in left:
        del start[key]
    if left:
        logger.info("%s begins a model without its %s.", path, ", ".join(sorted({key.partition(".")[0] for key in left})))


def load_base(
    path: str, variant: str, config: TransformerConfig, dtype: torch.dtype, attention: AttentionFunction
) -> PixArtTransformer:
    """Finished weights as they are, in a dtype and frozen, for adapters and ControlNets; with the file's KV compression.

    Raises ConfigError if they are another model's than `config`, that of the recipe's variant.
    """
    if is_dry() and not Path(path).exists():
        return PixArtTransformer(config, attention=attention, dtype=dtype).requires_grad_(False)
    weights, found = _read(path, variant, dtype)
    wanted = replace(config, **{name: getattr(found, name) for name in OF_FILES})
    differing = [name for name in LAYER_SIZES if getattr(found, name) != getattr(wanted, name)]
    if differing:
        named = ", ".join(f"{name} {getattr(found, name)} instead of {getattr(wanted, name)}" for name in differing)
        raise ConfigError(f"{path} is another model than the recipe's variant: {named}. Give weights of that variant, or change it.")
    model = PixArtTransformer(wanted, attention=attention, dtype=dtype, device="meta")
    if not is_dry():
        model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def _check_compression(wanted: TransformerConfig, found: TransformerConfig, path: str) -> None:
    """Raises ConfigError where the file's blocks were trained with compression that the run doesn't have: few modes have weights."""
    blocks, mode = set(found.compressed_blocks), found.compression_mode
    if blocks and not (blocks <= set(wanted.compressed_blocks) and mode == wanted.compression_mode):
        raise ConfigError(
            f"{path} was trained with KV compression, {mode}, of the blocks and ratios {sorted(blocks)}; this run has "
            f"{wanted.compression_mode} of {sorted(wanted.compressed_blocks)}. "
            "Use method kv with the same blocks (method.blocks) and mode, or more blocks."
        )


@torch.no_grad()
def pass_noise_through(model: PixArtTransformer) -> None:
    """Makes a fresh model predict pure noise as itself.

    A noise prediction is almost the input where noise is strong, and must be right to 1 / sigma there
    before composition can be seen in the loss; from zero, small models spend most of their training on
    that identity. So every latent value gets two channels of its own, where the positions are nearly
    zero at any size (the slowest sines), and the output layer is fitted to read them back.
    """
    config = model.config
    weight = model.x_embedder.proj.weight
    values = weight[0].numel()  # of one patch
    quarter = config.hidden_size // 4
    channels = [start + quarter - 1 - i for start in (0, 2 * quarter) for i in range(values)]
    weight.mul_(0.25)
    weight[channels] = PASS_GAIN * torch.eye(values).reshape(values, *weight.shape[1:]).repeat(2, 1, 1, 1)
    nn.init.zeros_(model.final_layer.scale_shift_table)
    for layer in (model.t_embedder.mlp[2], model.t_block[1]):
        nn.init.zeros_(layer.weight)
    for block in model.blocks:
        nn.init.zeros_(block.scale_shift_table)  # closed gates: at first every block is the identity
    _fit_output(model)


def _fit_output(model: PixArtTransformer, grid: tuple[int, int] = (16, 16), batch: int = 64) -> None:
    """Least squares from the normalized embedding of noise to the noise, for the final layer's noise half."""
    config = model.config
    patch, channels = config.patch_size, config.in_channels
    noise = torch.randn(batch, channels, grid[0] * patch, grid[1] * patch)
    positions = position_table(*grid, config.hidden_size, config.position_range)
    hidden = model.x_embedder(noise) + positions
    features = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6).flatten(0, 1)
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    gram = features.T @ features + 1e-3 * torch.eye(features.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(gram, features.T @ _patch_values(noise, patch).double()).float()
    rows = solution.T.reshape(patch * patch, channels, -1)  # (p*p, C, D + 1)
    out = model.final_layer.linear
    out.weight.view(patch * patch, config.out_channels, -1)[:, :channels] = rows[..., :-1]
    out.bias.view(patch * patch, config.out_channels)[:, :channels] = rows[..., -1]


def _patch_values(latent: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B * tokens, p * p * C), in the order of the final layer's output."""
    return latent.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1).flatten(0, 2).flatten(1)

"""What enters the transformer: patches, positions, timestep, caption, and the picture's size."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Positions = tuple[Tensor, Tensor]  # of rows and of columns, see `axis_positions`
FREQUENCY_SIZE = 256  # sinusoid channels of timesteps and sizes, in every PixArt
DEVICES_WITH_FP64 = ("cpu", "cuda", "meta")  # MPS has none, nor have some XPUs


def sinusoid(values: Tensor, size: int = FREQUENCY_SIZE, max_period: float = 10000.0) -> Tensor:
    """values: (N,) -> (N, size) in fp32: cosines, then sines (DiT's `timestep_embedding`)."""
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(max_period) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(
    rows: int, columns: int, hidden_size: int, position_range: float, device: torch.device | str | None = None
) -> Tensor:
    """Fixed 2-D positions, (rows*columns, hidden_size) in fp32.

    Coordinate i of n is i * range / n. The first half of the channels encodes the column (x), the
    second the row (y); each half is sines, then cosines (MAE's `get_2d_sincos_pos_embed`, as PixArt
    calls it). fp32 whatever the model's dtype: in bf16 the table is wrong by up to 0.2.
    """
    by_row, by_column = axis_positions(rows, columns, hidden_size, position_range, device)
    by_row = by_row[:, None].expand(rows, columns, -1)
    by_column = by_column[None, :].expand(rows, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).reshape(rows * columns, hidden_size)


def axis_positions(
    rows: int, columns: int, hidden_size: int, position_range: float, device: torch.device | str | None = None
) -> Positions:
    """The two halves of `position_table`: of each row and of each column, (n, hidden_size/2) in fp32."""
    device = torch.get_default_device() if device is None else torch.device(device)
    frequencies = position_frequencies(hidden_size // 4, device)

    def encode(count: int) -> Tensor:
        coordinate = torch.arange(count, dtype=torch.float32, device=device) * (position_range / count)
        angles = coordinate[:, None] * frequencies[None]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    return encode(rows), encode(columns)


def add_positions(tokens: Tensor, positions: Positions) -> Tensor:
    """tokens: (B, rows*columns, D) -> the same plus `position_table`, which at 4096 px would take 300 MB."""
    by_row, by_column = positions
    image = tokens.unflatten(1, (len(by_row), len(by_column)))
    half = by_row.shape[-1]
    added = torch.cat([image[..., :half] + by_column, image[..., half:] + by_row[:, None]], dim=-1)
    return added.flatten(1, 2)


def position_frequencies(count: int, device: torch.device) -> Tensor:
    """10000^(-i/count), (count,) in fp32; made on the device, as a copy to it would wait and can't be captured."""
    dtype = torch.float64 if device.type in DEVICES_WITH_FP64 else torch.float32
    exponents = torch.arange(count, dtype=dtype, device=device) / count
    return torch.exp(-math.log(10000.0) * exponents).float()


class PatchEmbedder(nn.Module):
    """Latent patches to tokens: a convolution with kernel = stride = patch size."""

    def __init__(self, patch_size, in_channels, hidden_size, operations, **factory) -> None:
        super().__init__()
        self.proj = operations.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size, **factory)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/p * W/p, D)."""
        return self.proj(latent).flatten(2).transpose(1, 2)


class SinusoidEmbedder(nn.Module):
    """Sinusoid of a scalar, then Linear, SiLU, Linear: for the timestep, and per scalar of the size."""

    def __init__(self, hidden_size, operations, **factory) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(FREQUENCY_SIZE, hidden_size, bias=True, **factory),
            nn.SiLU(),
            operations.Linear(hidden_size, hidden_size, bias=True, **factory),
        )

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, D), or (B, S) -> (B, S*D)."""
        embedded = self.mlp(sinusoid(values.reshape(-1)).to(dtype))
        return embedded.reshape(values.shape[0], -1)


class CaptionProjection(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, caption_channels, hidden_size, operations, **factory) -> None:
        super().__init__()
        self.fc1 = operations.Linear(caption_channels, hidden_size, bias=True, **factory)
        self.fc2 = operations.Linear(hidden_size, hidden_size, bias=True, **factory)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(states), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """T5 states to the transformer's width; holds the embedding that replaces dropped captions."""

    def __init__(self, caption_channels, hidden_size, max_tokens, null_caption, operations, **factory) -> None:
        super().__init__()
        self.y_proj = CaptionProjection(caption_channels, hidden_size, operations, **factory)
        # Weights may be kept in fp8; this is handed out as it is, where 3 bits would show
        dtype = factory.get("dtype")
        kept = {**factory, "dtype": torch.bfloat16 if dtype is not None and dtype.itemsize == 1 else dtype}
        null = torch.zeros(max_tokens, caption_channels, **kept) if null_caption else None
        # Not trained, as in the reference; a parameter, so that hosts merge it. None keeps the key out of state dicts that lack it
        self.register_parameter("y_embedding", None if null is None else nn.Parameter(null, requires_grad=False))

    def forward(self, states: Tensor) -> Tensor:
        """(B, M, caption_channels) -> (B, M, D)."""
        return self.y_proj(states)

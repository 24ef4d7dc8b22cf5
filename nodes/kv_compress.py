"""Cheaper attention for large pictures."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pixart.errors import InputError
from ..pixart.kv_compress import MAX_RATIO, METHODS, KVCompression
from .host.kv_compress import NODE, compress_model
from .host.schema import schema

DEFAULTS = KVCompression()


class PixArtKVCompress(io.ComfyNode):
    """Merges keys and values of self-attention, without training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Defaults are the core's."""
        return schema(
            node_id=NODE,
            display_name="PixArt KV Compress",
            category="PixArt",
            description="Makes large pictures (2K, 4K) faster by merging keys and values of self-attention. It works with every "
            "PixArt model without training, but is an approximation: the picture changes somewhat. The larger the picture, the "
            "more it saves. For a second pass set end_percent to 1.",
            search_aliases=["kv compression", "token merging", "tome", "speed", "2k", "4k"],
            inputs=[
                io.Model.Input("model", tooltip="A PixArt model, from PixArtModelLoader."),
                io.Int.Input(
                    "ratio", default=DEFAULTS.ratio, min=2, max=MAX_RATIO,
                    tooltip="ratio x ratio tokens share one key and value. Attention gets 4 times cheaper with 2, 16 times with 4.",
                ),
                io.Combo.Input(
                    "method", options=list(METHODS), default=DEFAULTS.method,
                    tooltip="mean averages a cell's tokens; stride keeps the first of each cell.",
                ),
                io.Int.Input(
                    "first_block", default=DEFAULTS.first_block, min=0, max=255,
                    tooltip="First block to compress. PixArt has 28 (0 to 27), the 900M 42, the demo 8.",
                ),
                io.Int.Input(
                    "last_block", default=DEFAULTS.last_block, min=-1, max=255,
                    tooltip="Last block to compress; -1 is the model's last.",
                ),
                _percent(
                    "start_percent", DEFAULTS.start_percent,
                    "Where in the noise schedule compression starts; 0 is the beginning. A second pass with denoise 0.4 lies "
                    "entirely after 0.6.",
                ),
                _percent("end_percent", DEFAULTS.end_percent, "Where in the noise schedule compression ends; 1 is the end."),
                io.Int.Input(
                    "min_tokens", default=DEFAULTS.min_tokens, min=0, max=2**24,
                    tooltip="Pictures with fewer tokens are not compressed. A token is 16 x 16 pixels: 1024 px has 4096, 2048 px 16384.",
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, ratio: int, method: str, first_block: int, last_block: int, start_percent: float,
        end_percent: float, min_tokens: int,
    ) -> io.NodeOutput:  # fmt: skip
        """A patched clone."""
        try:
            compression = KVCompression(ratio, method, first_block, last_block, start_percent, end_percent, min_tokens)
        except InputError as error:
            raise InputError(f"{NODE}: {error}") from error
        return io.NodeOutput(compress_model(model, compression))


def _percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)

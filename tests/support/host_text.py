"""PixArtTextEncode as the tests call it."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.support import host


def node(clip: Any, text: str, max_tokens: int = 300) -> tuple[Tensor, str]:
    """(states, text on the node)."""
    out = host.pack_module("nodes.text").PixArtTextEncode.execute(clip=clip, text=text, max_tokens=max_tokens)
    return out.result[0][0][0], out.ui.as_dict()["text"][0]

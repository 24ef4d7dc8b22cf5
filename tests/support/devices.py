"""What would make a GPU wait, caught without one: every tensor must be on the meta device, which has no values."""
from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OnlyOn(TorchDispatchMode):
    """Refuses every operation that reads or makes a tensor on another device, and so every copy between devices.

    On "meta", torch itself refuses what needs a value: `.item()`, `bool(tensor)`, `.tolist()`, `nonzero`.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        strangers = {each.device for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)}
        strangers = {str(device) for device in strangers if device.type != self.device}
        if strangers:
            raise AssertionError(f"{function} on {', '.join(sorted(strangers))}; expected {self.device} alone")
        return out

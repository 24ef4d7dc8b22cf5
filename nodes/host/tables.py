"""Patches of the raw parameters that the host's patcher passes over: modulation tables and the null caption.

The host patches what it loads, and loads only modules without children; `scale_shift_table` lies on blocks. So merges
and `diff` adapters would leave the tables of the first model.
"""
from __future__ import annotations

from typing import Any

import comfy.utils
from comfy.patcher_extension import CallbacksMP

KEY = "pixart_tables"
TABLES = ("scale_shift_table", "y_embedder.y_embedding")


def follow_patches(patcher: Any) -> None:
    """Adds a callback to a ModelPatcher, which its clones keep, unless it has it."""
    if not patcher.callbacks.get(CallbacksMP.ON_LOAD, {}).get(KEY):
        patcher.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, patch_tables)


def patch_tables(patcher: Any, device_to: Any = None, *_: Any) -> None:
    """Called when the host has loaded the model, which may be for the second time: each table is made anew of the one it was."""
    for key in [key for key in patcher.patches if key.endswith(TABLES)]:
        if key in patcher.backup:
            comfy.utils.set_attr_param(patcher.model, key, patcher.backup[key].weight)
        patcher.patch_weight_to_device(key, device_to)

"""Files that appear whole or not at all."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_weights(
    weights: dict[str, Tensor], path: Path, metadata: dict[str, str], dtype: torch.dtype | None = torch.float16
) -> None:
    """One safetensors file, in a dtype or, if None, as the tensors are; raises OSError naming it where it can't be written."""
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()}
    replace_file(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt", **metadata}))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file beside `path`, then puts it in its place; a failure leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")  # of this writer alone; others may write the same file
    try:
        write(partial)
        partial.chmod(0o644)  # safetensors writes files that only their owner can read
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written ({error}); is the disk full?") from None
    finally:
        partial.unlink(missing_ok=True)

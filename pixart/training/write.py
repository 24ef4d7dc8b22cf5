"""Files that appear whole or not at all."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

NAME_KEPT = 40  # letters of a file's name that its unfinished copy has too


def write_weights(
    weights: dict[str, Tensor], path: Path, metadata: dict[str, str], dtype: torch.dtype | None = torch.float16
) -> None:
    """One safetensors file, in a dtype or, if None, as the tensors are; raises OSError naming it where it can't be written."""
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()}
    replace_file(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt", **metadata}))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file beside `path`, then puts it in its place; a failure leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this writer alone, since others may write the same file; cut, since file systems take names of at most 255 bytes
    partial = path.with_name(f"{path.name[:NAME_KEPT]}.{uuid4().hex[:8]}.partial")
    try:
        write(partial)
        partial.chmod(0o644)  # safetensors writes files that only their owner can read
        partial.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written ({error}); is the disk full?") from None
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk, which names no file
    finally:
        partial.unlink(missing_ok=True)

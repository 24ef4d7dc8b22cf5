"""Files of a T5: which to read, and their tensors one at a time, so that a file is never whole in memory."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.content import SAFETENSORS, content_of, reading_error
from ..checkpoints.read import find_weights, load_pickle, rank_of_weights, safetensors_header
from ..checkpoints.shards import is_index
from ..checkpoints.shards import weight_files as folder_files
from ..errors import PixArtError, TextEncoderError
from ..json_files import read_json
from ..logs import get_logger
from .keys import find_prefixes, has_own_name

logger = get_logger(__name__)

NAME = "model"  # of the weights in a T5's folder, before .safetensors or -00001-of-00002.safetensors
TOKENIZER_KEYS = ("spiece_model", "tokenizer_json")  # their bytes inside a weight file; the first is ComfyUI's place for SentencePiece
DECODER_KEYS = re.compile(r"decoder\.|lm_head\.")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that is not read yet; those of a pickle are (mapped to the file where it allows it)."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0  # in the file, bytes
    value: Tensor | None = None

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Its bytes are read, not mapped: a map of the whole file for each of T5's 219 tensors stays open as long as the tensor
        lives, and Windows sets memory aside for every one.
        """
        if self.value is not None:
            return self.value.clone()
        try:
            content = torch.empty(prod(self.shape) * self.dtype.itemsize, dtype=torch.uint8)
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                left = memoryview(content.numpy())
                while len(left):
                    count = file.readinto(left)
                    if not count:
                        raise EOFError("the file ends early")
                    left = left[count:]
        except Exception as error:
            raise damaged(self.path, error) from None
        return content.view(self.dtype).reshape(self.shape)


def weight_files(path: Path) -> tuple[list[Path], dict]:
    """Files to read, and the folder's config.json ({} for a file)."""
    if not path.exists():
        raise TextEncoderError(f"{path} does not exist; expected a T5 folder or a .safetensors file.")
    if path.is_file() and not is_index(path):
        return [path], {}
    folder = text_encoder_folder(path if path.is_dir() else path.parent)
    settings = read_json(folder / "config.json", required=False, error=TextEncoderError)
    files, notes = folder_files(folder, NAME, TextEncoderError)
    for note in notes:
        logger.info("T5 %s: %s", folder, note)
    return files, settings


def text_encoder_folder(path: Path) -> Path:
    """The folder with the weights: `path`, or its text_encoder/ if it is a pipeline's folder."""
    inner = path / "text_encoder"
    return inner if inner.is_dir() and not (path / "config.json").is_file() else path


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """Every tensor of a file but the decoder's; raises TextEncoderError for a damaged one."""
    if content_of(path, TextEncoderError) == SAFETENSORS:
        yield from _safe_tensors(path)
        return
    for key, value in _tensors_only(path, load_pickle(path, TextEncoderError)):
        yield StoredTensor(path, key, tuple(value.shape), value.dtype, value=value)


def _safe_tensors(path: Path) -> Iterator[StoredTensor]:
    header, data = safetensors_header(path, TextEncoderError)
    for key, entry in header.items():
        if DECODER_KEYS.match(key):
            continue
        try:
            dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
            if stop - start != prod(shape) * dtype.itemsize or start < 0 or min(shape, default=0) < 0:
                raise ValueError(f"{stop - start} bytes for {shape} of {dtype}")
        except (KeyError, ValueError, TypeError) as error:
            raise TextEncoderError(f"{path}: its safetensors header is damaged at {key} ({error}); download it again.") from None
        yield StoredTensor(path, key, shape, dtype, data + start)


def damaged(path: Path, error: Exception) -> PixArtError:
    """What to say of a file that can't be read."""
    return reading_error(path, error, TextEncoderError, f"of {path.stat().st_size} bytes, is damaged or incomplete")


def _tensors_only(path: Path, loaded: object) -> list[tuple[str, Tensor]]:
    """The T5's entries of a pickled state dict or training checkpoint; raises TextEncoderError for anything else."""
    if not isinstance(loaded, dict):
        raise TextEncoderError(f"{path} holds a {type(loaded).__name__}, expected T5 weights by name. Give another file.")
    found = find_weights(loaded, find_prefixes)
    if found:
        name = min(found, key=rank_of_weights)
        others = [repr(other) for other in found if other != name]
        if others:
            logger.info("T5 %s: %s is used; the file also holds %s.", path, name or "the outermost weights", ", ".join(others))
        tokenizers = {key: value for key, value in loaded.items() if key in TOKENIZER_KEYS and isinstance(value, Tensor)}
        loaded = {**tokenizers, **found[name]}
    if find_prefixes(key for key in loaded if isinstance(key, str)):  # beside a T5 a text or list is a trainer's
        loaded = {key: value for key, value in loaded.items() if isinstance(value, Tensor) or has_own_name(str(key))}
    strangers = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if strangers:
        raise TextEncoderError(f"{path}: {', '.join(strangers[:6])} is not a tensor; expected T5 weights only.")
    nameless = [repr(key) for key in loaded if not isinstance(key, str)]
    if nameless:
        raise TextEncoderError(f"{path}: the keys {', '.join(nameless[:6])} are not names; expected T5 weights by name.")
    return list(loaded.items())

"""Files of a T5: which to read, and their tensors one at a time, so that a file is never whole in memory."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import TextEncoderError
from ..json_files import read_json, shard_files

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
SAFE = (".safetensors", ".sft")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
DECODER_KEYS = re.compile(r"decoder\.|lm_head\.")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that is not read yet; those of a pickle are (mapped to the file where it allows it)."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: of no interest here
    value: Tensor | None = None

    def read(self) -> Tensor:
        """The tensor. The file is opened for it alone: an open one keeps every page read so far in memory."""
        if self.value is not None:
            return self.value
        try:
            with safe_open(str(self.path), framework="pt") as file:
                return file.get_tensor(self.key)
        except Exception as error:
            raise damaged(self.path, error) from None


def weight_files(path: Path) -> tuple[list[Path], dict]:
    """Files to read, and the folder's config.json ({} for a file)."""
    if not path.exists():
        raise TextEncoderError(f"{path} does not exist; expected a T5 folder or a .safetensors file.")
    if path.is_file():
        if path.suffix not in (*SAFE, *PICKLED):
            raise TextEncoderError(
                f"{path}: expected a .safetensors file or a Hugging Face folder (GGUF files need ComfyUI-GGUF's loader)."
            )
        return [path], {}
    folder = text_encoder_folder(path)
    settings = read_json(folder / "config.json", required=False, error=TextEncoderError)
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name], settings
        index = folder / f"{name}.index.json"
        if index.is_file():
            return shard_files(index, error=TextEncoderError), settings
    single = sorted(folder.glob("*.safetensors"))
    if len(single) == 1:
        return single, settings
    raise TextEncoderError(
        f"{folder} holds no T5 weights: expected {', '.join(WEIGHT_FILES[:2])}, or the shards and their index."
    )


def text_encoder_folder(path: Path) -> Path:
    """The folder with the weights: `path`, or its text_encoder/ if it is a pipeline's folder."""
    inner = path / "text_encoder"
    return inner if inner.is_dir() and not (path / "config.json").is_file() else path


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """Every tensor of a file but the decoder's; raises TextEncoderError for a damaged one."""
    try:
        if path.suffix in PICKLED:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
            for key, value in _tensors_only(path, loaded):
                yield StoredTensor(path, key, tuple(value.shape), value.dtype, value)
            return
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():
                if not DECODER_KEYS.match(key):
                    part = file.get_slice(key)
                    yield StoredTensor(path, key, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()))
    except TextEncoderError:
        raise
    except Exception as error:  # torch's unpickler raises anything on damaged files
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> TextEncoderError:
    """What to say of a file that can't be read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return TextEncoderError(
        f"{path} ({path.stat().st_size} bytes) is damaged or incomplete: {reason}. Download it again."
    )


def _tensors_only(path: Path, loaded: object) -> list[tuple[str, Tensor]]:
    """The entries of a pickled state dict; raises TextEncoderError for anything else."""
    if not isinstance(loaded, dict):
        raise TextEncoderError(f"{path} holds a {type(loaded).__name__}, expected T5 weights by name. Give another file.")
    loaded = loaded["state_dict"] if isinstance(loaded.get("state_dict"), dict) else loaded
    strangers = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if strangers:
        raise TextEncoderError(f"{path}: {', '.join(strangers[:6])} is no tensor; expected T5 weights only.")
    nameless = [repr(key) for key in loaded if not isinstance(key, str)]
    if nameless:
        raise TextEncoderError(f"{path}: the keys {', '.join(nameless[:6])} are no names; expected T5 weights by name.")
    return list(loaded.items())

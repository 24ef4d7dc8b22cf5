"""Weight files in, checked native tensors out: formats, detection, conversion."""
from .convert import convert_file
from .detect import Detection, Origin, detect
from .hints import Hints
from .keys import to_diffusers, to_native
from .load import QUANTIZATION_SUFFIXES, Prepared, inspect_file, load_transformer, prepare, prepare_file
from .read import RawCheckpoint, read_checkpoint

__all__ = [
    "QUANTIZATION_SUFFIXES", "Detection", "Hints", "Origin", "Prepared", "RawCheckpoint", "convert_file", "detect", "inspect_file",
    "load_transformer", "prepare", "prepare_file", "read_checkpoint", "to_diffusers", "to_native",
]  # fmt: skip

"""A T5 quantized once and written as a Hugging Face folder, which loads without quantizing again."""
from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, TextEncoderError, UnsupportedError
from ..logs import get_logger
from .names import INT8, STORED_PRECISIONS
from .packed import FORMAT, FORMAT_KEY, SCALES, STATE, WEIGHT
from .quantize import COMPUTE, check_range, quantize_weight
from .tokenizer import tokenizer_beside
from .weights import EMBEDDING, POSITIONS, T5Weights, read_t5

logger = get_logger(__name__)
SHARD = 2**30  # bytes
NAME = "model"
Progress = Callable[[int, int], None]


def quantize_folder(
    source: str | Path,
    destination: str | Path,
    precision: str,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Writes `source` (file or folder) in int8, nf4 or fp4 to the new folder `destination`, and returns it.

    The layout is that of transformers and bitsandbytes; `wo` is quantized too, which plain transformers doesn't do, nor run
    in 4 bits: it casts what goes into `wo` to the packed weight's dtype.
    progress(done, total) counts tensors. Nothing is left behind when it fails. Raises InputError, TextEncoderError,
    UnsupportedError, OSError.
    """
    source, destination = Path(source), Path(destination)
    if precision not in STORED_PRECISIONS:
        raise UnsupportedError(f"precision is {precision!r}; expected one of {', '.join(STORED_PRECISIONS)}.")
    if destination.exists():
        raise InputError(f"{destination} exists already; give the name of a new folder.")
    weights = read_t5(source)
    if weights.precision is not None:
        raise InputError(f"{source} is already quantized to {weights.precision}; give the original weights.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as made:
        folder = Path(made) / destination.name
        folder.mkdir()
        _write_shards(folder, _quantized(weights, precision, torch.device(device), progress))
        config = json.dumps(_settings(weights, precision), indent=2, sort_keys=True)
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")
        _copy_tokenizer(weights, folder)
        mode = (folder / "config.json").stat().st_mode  # as the umask says; safetensors makes files that only their owner may read
        for file in folder.iterdir():
            file.chmod(mode)
        folder.rename(destination)
    return destination


def file_parts(layer: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """A quantized layer's tensors under bitsandbytes' names."""
    if SCALES in parts:
        mark = torch.zeros((), dtype=torch.uint8)
        return {f"{layer}.weight": parts[WEIGHT], f"{layer}.SCB": parts[SCALES], f"{layer}.weight_format": mark}
    kind = json.loads(bytes(parts[STATE].tolist()))["quant_type"]
    names = {WEIGHT: "weight", STATE: f"weight.quant_state.bitsandbytes__{kind}"}
    found = {f"{layer}.{names.get(part, f'weight.{part}')}": value for part, value in parts.items()}
    found[f"{layer}.weight"] = parts[WEIGHT].reshape(-1, 1)
    return found


def _quantized(
    weights: T5Weights, precision: str, device: torch.device, progress: Progress | None
) -> Iterator[dict[str, Tensor]]:
    """The file's tensors, layer by layer; embeddings and norms in bf16."""
    for done, (name, tensor) in enumerate(weights.raw(), start=1):
        if tensor.ndim == 2 and name not in (EMBEDDING, POSITIONS):
            check_range(tensor, precision, f"{weights.path}: {name}")
            parts = quantize_weight(tensor, precision, device)
            yield {key: value.cpu() for key, value in file_parts(name.removesuffix(".weight"), parts).items()}
        else:
            yield {name: tensor.to(COMPUTE)}
        if progress is not None:
            progress(done, len(weights.stored))


def _write_shards(folder: Path, groups: Iterator[dict[str, Tensor]]) -> None:
    """model.safetensors, or shards of about a gigabyte and their index; only one shard is in memory."""
    shard: dict[str, Tensor] = {}
    keys: list[list[str]] = []
    total = 0

    def flush() -> None:
        try:
            save_file({key: value.contiguous() for key, value in shard.items()}, str(folder / f"{len(keys)}.part"), {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder.name} can't be written ({error}); is the disk full?") from None
        keys.append(list(shard))
        shard.clear()

    for group in groups:
        shard.update(group)
        total += sum(value.nbytes for value in group.values())
        if sum(value.nbytes for value in shard.values()) >= SHARD:
            flush()
    if shard:
        flush()
    if len(keys) == 1:
        (folder / "0.part").rename(folder / f"{NAME}.safetensors")
        return
    names = [f"{NAME}-{number:05}-of-{len(keys):05}.safetensors" for number in range(1, len(keys) + 1)]
    for number, name in enumerate(names):
        (folder / f"{number}.part").rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {key: names[n] for n, found in enumerate(keys) for key in found}}
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _settings(weights: T5Weights, precision: str) -> dict[str, Any]:
    """config.json, with the quantization as transformers' BitsAndBytesConfig writes it."""
    return {
        **weights.config,
        "model_type": "t5",
        "architectures": ["T5EncoderModel"],
        "is_encoder_decoder": False,
        "use_cache": False,
        "torch_dtype": "bfloat16",
        "quantization_config": bitsandbytes_config(precision).to_dict(),
        FORMAT_KEY: FORMAT,
    }


def bitsandbytes_config(precision: str) -> Any:
    """transformers' BitsAndBytesConfig of int8, nf4 or fp4."""
    from transformers import BitsAndBytesConfig

    if precision == INT8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=precision,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=COMPUTE,
        llm_int8_skip_modules=[],
    )


def _copy_tokenizer(weights: T5Weights, folder: Path) -> None:
    """The tokenizer that comes with the source, so that the folder is complete; XXL files of ComfyUI have none."""
    if weights.sentencepiece is not None:
        (folder / "spiece.model").write_bytes(weights.sentencepiece)
        return
    if weights.tokenizer_json is not None:
        (folder / "tokenizer.json").write_bytes(weights.tokenizer_json)
        return
    try:
        found = tokenizer_beside(weights.path, int(weights.config["vocab_size"]))
    except TextEncoderError as error:
        logger.warning("%s %s is written without a tokenizer.", error, folder.name)
        return
    if found is None:
        logger.warning("%s comes without a tokenizer; put spiece.model or tokenizer.json into %s.", weights.path, folder.name)
        return
    shutil.copyfile(found.source, folder / Path(found.source).name)

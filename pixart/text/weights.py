"""T5 encoder weights from a Hugging Face folder or a single file; every size is read from the weights."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import TextEncoderError, UnsupportedError

PREFIXES = ("", "transformer.", "text_encoder.", "t5xxl.transformer.", "text_encoders.t5xxl.transformer.", "t5.")
EMBEDDING = "shared.weight"
EMBEDDING_ALIAS = "encoder.embed_tokens.weight"  # the same matrix under its other name
POSITIONS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
TOKENIZER_KEY = "spiece_model"  # ComfyUI's place for a SentencePiece model inside a weight file
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
DECODER_KEYS = re.compile(r"decoder\.|lm_head\.")
# config.json fields that shapes don't show, and those that they do
FREE_FIELDS = ("layer_norm_epsilon", "relative_attention_max_distance", "feed_forward_proj")
SHAPE_FIELDS = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")
FOREIGN = (  # a key's part -> what the file is
    ("text_model.encoder", "a CLIP text encoder"),
    ("x_embedder.proj", "a diffusion transformer"),
    ("input_blocks.", "a diffusion model or full checkpoint"),
    ("first_stage_model.", "a full checkpoint"),
    ("down_blocks", "a VAE or UNet"),
    ("lora_", "a LoRA"),
    ("token_embd", "a llama.cpp file"),
)


@dataclass
class T5Weights:
    """State dict under transformers' names, the sizes it implies, and a tokenizer if the file had one."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, int | float | str]
    sentencepiece: bytes | None = None
    ignored: list[str] = field(default_factory=list)


def read_t5(path: Path, dtype: torch.dtype | None = None) -> T5Weights:
    """Reads the encoder half of a T5, in `dtype` (default: as stored, fp8 as bf16).

    Raises TextEncoderError for what is missing, damaged or not a T5.
    """
    files, settings = _weight_files(path)
    raw = {key: value for file in files for key, value in _read_tensors(file)}
    model = raw.pop(TOKENIZER_KEY, None)
    tensors, ignored = _strip(raw, path)
    config = _sizes(tensors, path)
    _merge_settings(config, settings, path)
    spoiled = [key for key, value in tensors.items() if not _is_finite(value)]
    if spoiled:
        raise TextEncoderError(f"{path}: NaN or infinite values in {_some(spoiled)}. Download or export it again.")
    if dtype is None:
        stored = tensors[EMBEDDING].dtype
        dtype = stored if stored.is_floating_point and stored.itemsize > 1 else torch.bfloat16
    tensors = {key: _cast(key, value, dtype) for key, value in tensors.items()}
    return T5Weights(path, tensors, config, None if model is None else model.numpy().tobytes(), ignored)


def text_encoder_folder(path: Path) -> Path:
    """The folder with the weights: `path`, or its text_encoder/ if it is a pipeline's folder."""
    inner = path / "text_encoder"
    return inner if inner.is_dir() and not (path / "config.json").is_file() else path


def _weight_files(path: Path) -> tuple[list[Path], dict]:
    """Files to read, and the folder's config.json."""
    if not path.exists():
        raise TextEncoderError(f"{path} does not exist; expected a T5 folder or a .safetensors file.")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise TextEncoderError(f"{path}: expected a .safetensors file or a Hugging Face folder.")
        return [path], {}
    folder = text_encoder_folder(path)
    settings = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "quantization_config" in settings:
        raise UnsupportedError(f"{folder} is quantized; give the original fp32, bf16 or fp16 folder.")
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name], settings
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index), settings
    single = sorted(folder.glob("*.safetensors"))
    if len(single) == 1:
        return single, settings
    raise TextEncoderError(
        f"{folder} holds no T5 weights: expected {', '.join(WEIGHT_FILES[:2])}, or the shards and their index."
    )


def _shards(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise TextEncoderError(f"{index} names shards outside its folder: {', '.join(outside)}. Download it again.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise TextEncoderError(
            f"{index} names {len(names)} shards, but {', '.join(missing) or 'none of them'} is missing from "
            f"{index.parent}. Download the missing files into that folder."
        )
    return [index.parent / name for name in names]


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TextEncoderError(f"{path} can't be read as JSON ({error}). Download it again.") from None
    if not isinstance(values, dict):
        raise TextEncoderError(f"{path} holds a {type(values).__name__}, expected an object. Download it again.")
    return values


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor but the decoder's."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                for key in file.keys():
                    if not DECODER_KEYS.match(key):
                        yield key, file.get_tensor(key)
        else:
            yield from _tensors_only(path, torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path)))
    except TextEncoderError:
        raise
    except Exception as error:  # torch's unpickler raises anything on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TextEncoderError(
            f"{path} ({path.stat().st_size} bytes) is damaged or incomplete: {reason}. Download it again."
        ) from None


def _tensors_only(path: Path, loaded: object) -> list[tuple[str, Tensor]]:
    """The entries of a pickled state dict; raises TextEncoderError for anything else."""
    if not isinstance(loaded, dict):
        raise TextEncoderError(f"{path} holds a {type(loaded).__name__}, expected T5 weights by name. Give another file.")
    loaded = loaded["state_dict"] if isinstance(loaded.get("state_dict"), dict) else loaded
    strangers = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if strangers:
        raise TextEncoderError(f"{path}: {', '.join(strangers[:6])} is no tensor; expected T5 weights only.")
    return list(loaded.items())


def check_pickled(path: Path) -> None:
    """Raises TextEncoderError unless the .pth, .pt or .bin file is a sound pickle of a T5 encoder's tensors."""
    _strip(dict(_read_tensors(path)), path)


def _strip(raw: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Removes the prefix and the decoder; refuses what is no T5."""
    prefix = next((p for p in PREFIXES if p + QUERY in raw), None)
    if prefix is None:
        guess = next((what for part, what in FOREIGN if any(part in key for key in raw)), None)
        raise TextEncoderError(
            f"{path} is not a T5 encoder{f' but looks like {guess}' if guess else ''}: there is no {QUERY} among its "
            f"{len(raw)} keys ({_some(sorted(raw))}). Give the T5 that belongs to the model."
        )
    tensors, ignored = {}, []
    for key, value in raw.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or DECODER_KEYS.match(name) or name in ("logit_scale", "scaled_fp8"):
            ignored.append(key)
        else:
            tensors[name] = value
    if EMBEDDING_ALIAS in tensors:
        tensors.setdefault(EMBEDDING, tensors[EMBEDDING_ALIAS])
        del tensors[EMBEDDING_ALIAS]
    scales = [key for key in tensors if key.endswith((".scale_weight", ".weight_scale", ".comfy_quant"))]
    if scales or prefix + "scaled_fp8" in raw:
        raise UnsupportedError(f"{path} is a scaled fp8 file, made for ComfyUI's loader; give an fp16 or bf16 T5.")
    if POSITIONS.replace("block.0", "block.1") in tensors:
        raise UnsupportedError(f"{path} is a UMT5 (every block has its own positions); PixArt uses T5.")
    return tensors, ignored


def _sizes(tensors: dict[str, Tensor], path: Path) -> dict[str, int | float | str]:
    """T5Config fields that the shapes imply."""
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in tensors
    first = f"encoder.block.0.layer.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"
    missing = [key for key in (EMBEDDING, POSITIONS, QUERY, first) if key not in tensors]
    if missing:
        raise TextEncoderError(f"{path}: incomplete T5, without {', '.join(missing)}. Download it again.")
    flat = [key for key in (EMBEDDING, POSITIONS, QUERY, first) if tensors[key].ndim != 2]
    if flat:
        raise TextEncoderError(f"{path}: {', '.join(flat)} should be matrices; this is a quantized or damaged T5.")
    vocab_size, d_model = tensors[EMBEDDING].shape
    buckets, heads = tensors[POSITIONS].shape
    blocks = {int(m[1]) for m in (re.match(r"encoder\.block\.(\d+)\.", key) for key in tensors) if m}
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": tensors[QUERY].shape[0] // heads,
        "d_ff": tensors[first].shape[0],
        "num_layers": max(blocks) + 1,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def _merge_settings(config: dict, settings: dict, path: Path) -> None:
    """Takes from config.json what shapes don't show; refuses contradictions."""
    wrong = [
        f"{name} {settings[name]} (weights: {config[name]})"
        for name in SHAPE_FIELDS
        if name in settings and settings[name] != config[name]
    ]
    if wrong:
        raise TextEncoderError(f"{path}: config.json contradicts the weights in {', '.join(wrong)}.")
    config.update({name: settings[name] for name in FREE_FIELDS if name in settings})


def _is_finite(value: Tensor) -> bool:
    if not value.numel():
        return True
    value = value.float() if value.dtype.itemsize == 1 else value
    return bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    # T5's wo overflows in fp16; transformers keeps it in fp32 too.
    return value.to(torch.float32 if dtype == torch.float16 and ".wo." in key else dtype)


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

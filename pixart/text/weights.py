"""T5 encoder weights from a Hugging Face folder or a single file; every size is read from the weights."""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.content import called
from ..checkpoints.parts import choose_prefix, is_state_of_wrapper
from ..errors import TextEncoderError, UnsupportedError
from . import packed
from .files import TOKENIZER_KEYS, StoredTensor, stored_tensors, text_encoder_folder, weight_files
from .keys import OWN_NAMES, QUERY, find_prefixes, without_wrappers
from .settings import merge_settings

__all__ = ["T5Weights", "is_finite", "read_t5", "text_encoder_folder"]

EMBEDDING = "shared.weight"
EMBEDDING_ALIAS = "encoder.embed_tokens.weight"  # the same matrix under its other name
POSITIONS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
FINAL_NORM = "encoder.final_layer_norm.weight"
SCALED_FP8 = (".scale_weight", ".weight_scale")  # ComfyUI's two spellings: the true weight is the stored one times this
FP8_EXTRAS = (".scale_input", ".input_scale")  # for products in fp8, which are not taken here
FP8_MARK, FP8_FORMATS = ".comfy_quant", ("float8_e4m3fn", "float8_e5m2")
MOST_LAYERS = 512
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
    """The encoder half of a T5 under transformers' names, complete and of the right shapes, but not read yet."""

    path: Path
    stored: dict[str, StoredTensor]
    layers: dict[str, dict[str, StoredTensor]]  # quantized ones: name without `.weight` -> its parts
    config: dict[str, int | float | str]
    dtype: torch.dtype  # in which `stream` gives the tensors
    precision: str | None = None  # of the quantized layers: int8, nf4 or fp4
    sentencepiece: bytes | None = None
    tokenizer_json: bytes | None = None
    ignored: list[str] = field(default_factory=list)  # keys that are left out: other models', a decoder's, counters
    scales: dict[str, StoredTensor] = field(default_factory=dict)  # of a scaled fp8 file: weight's name -> its scale

    def raw(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what is not quantized, one at a time as stored, scaled fp8 in bf16; raises TextEncoderError for NaN."""
        return ((name, self.read(name)) for name in self.stored)

    def read(self, name: str) -> Tensor:
        """One of them."""
        value = self._sound(name, self.stored[name].read())
        if name in self.scales:
            value = (value.float() * self._sound(self.scales[name].key, self.scales[name].read()).float()).bfloat16()
        return value

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """The same in `dtype`."""
        return ((name, cast(name, value, self.dtype)) for name, value in self.raw())

    def stream_layers(self) -> Iterator[dict[str, Tensor]]:
        """The same, a block at a time where the file keeps blocks together."""
        for _, group in groupby(self.stream(), key=lambda pair: pair[0].split(".")[:3]):
            yield dict(group)

    def stream_packed(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(layer, its parts) of what is quantized; the parts are named as in `packed.PARTS`."""
        for layer, parts in self.layers.items():
            yield layer, {part: self._sound(f"{layer}.{part}", stored.read()) for part, stored in parts.items()}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All at once, for small models and for state dicts."""
        return dict(self.stream())

    def _sound(self, name: str, value: Tensor) -> Tensor:
        if not is_finite(value):
            raise TextEncoderError(f"{self.path}: NaN or infinite values in {name}. Download or export it again.")
        return value


def read_t5(path: Path, dtype: torch.dtype | None = None) -> T5Weights:
    """Reads names and shapes of a T5's encoder half; its tensors come in `dtype` (default: as most of it is stored, fp8 as bf16).

    Raises TextEncoderError for what is missing, misshapen, damaged or not a T5.
    """
    files, settings = weight_files(path)
    packed.check_settings(settings, path)
    raw = _plain_names((stored for file in files for stored in stored_tensors(file)), path)
    tokenizers = {key: raw.pop(key) for key in list(raw) if key.rpartition(".")[2] in TOKENIZER_KEYS}
    prefix = _prefix(raw, path)
    stored, ignored = _strip(raw, prefix, path)
    stored, scales = _split_scales(stored, path)
    stored, layers = packed.split(stored, path)
    shapes = {name: each.shape for name, each in stored.items()}
    shapes |= {f"{layer}.weight": packed.shape_of(parts, f"{path}: {layer}") for layer, parts in layers.items()}
    config = _sizes(shapes, path)
    merge_settings(config, settings, path)
    check_shapes(shapes, config, path)
    if dtype is None:
        dtype = torch.bfloat16 if layers else _main_dtype(stored)
    precision = packed.precision_of(next(iter(layers.values()))) if layers else None
    inside = [_tokenizer(_nearest(tokenizers, key, prefix), key, path) for key in TOKENIZER_KEYS]
    return T5Weights(path, stored, layers, config, dtype, precision, *inside, ignored, scales)


def expected_shapes(config: dict[str, int | float | str]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a T5 encoder of these sizes, under transformers' names."""
    width, inner, d_ff = int(config["d_model"]), int(config["d_kv"]) * int(config["num_heads"]), int(config["d_ff"])
    gated = str(config["feed_forward_proj"]).startswith("gated")
    block: dict[str, tuple[int, ...]] = {
        **{f"layer.0.SelfAttention.{name}.weight": (inner, width) for name in "qkv"},
        "layer.0.SelfAttention.o.weight": (width, inner),
        "layer.0.layer_norm.weight": (width,),
        **{f"layer.1.DenseReluDense.{name}.weight": (d_ff, width) for name in (("wi_0", "wi_1") if gated else ("wi",))},
        "layer.1.DenseReluDense.wo.weight": (width, d_ff),
        "layer.1.layer_norm.weight": (width,),
    }
    return {
        EMBEDDING: (int(config["vocab_size"]), width),
        POSITIONS: (int(config["relative_attention_num_buckets"]), int(config["num_heads"])),
        **{f"encoder.block.{i}.{name}": shape for i in range(int(config["num_layers"])) for name, shape in block.items()},
        FINAL_NORM: (width,),
    }


def check_shapes(shapes: dict[str, tuple[int, ...]], config: dict, path: Path) -> None:
    """Raises TextEncoderError naming every missing, unknown and misshapen tensor: never a partly loaded encoder."""
    expected = expected_shapes(config)
    problems = [f"missing {name}" for name in expected if name not in shapes]
    problems += [f"unknown {name}" for name in shapes if name not in expected]
    problems += [
        f"{name} has shape {shape}, expected {expected[name]}"
        for name, shape in shapes.items()
        if name in expected and shape != expected[name]
    ]
    if problems:
        raise TextEncoderError(
            f"{path} is not a complete T5 encoder: {_some(problems, 12, '; ')}. Download it again, or choose the folder "
            "instead of one of its shards."
        )


def _tokenizer(stored: StoredTensor | None, key: str, path: Path) -> bytes | None:
    model = None if stored is None else stored.read()
    if model is not None and model.dtype not in (torch.uint8, torch.int8):
        raise TextEncoderError(f"{path}: {key} is {model.dtype}; expected the bytes of a tokenizer (uint8). Download it again.")
    return None if model is None else model.numpy().tobytes()


def _nearest(tokenizers: dict[str, StoredTensor], key: str, prefix: str) -> StoredTensor | None:
    """The T5's own where other models in the file have theirs: beside its weights, or further out."""
    found = [name for name in tokenizers if name.rpartition(".")[2] == key]
    around = [name for name in found if prefix.startswith(name.removesuffix(key))]
    return tokenizers[max(around, key=len) if around else found[-1]] if found else None


def _plain_names(stored: Iterable[StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """By names without those of wrappers; raises TextEncoderError if two become one."""
    raw: dict[str, StoredTensor] = {}
    for each in stored:
        name = without_wrappers(each.key)
        if name in raw and raw[name].key != each.key:
            raise TextEncoderError(f"{path}: {each.key} and {raw[name].key} differ only in wrappers; expected each weight once.")
        raw[name] = each
    return raw


def _prefix(raw: dict[str, StoredTensor], path: Path) -> str:
    """Under which the T5 lies; refuses what is no T5."""
    prefixes = find_prefixes(raw)
    if prefixes:
        names = {prefix: (key[len(prefix) :] for key in raw if key.startswith(prefix)) for prefix in prefixes}
        count = {prefix: sum(name.partition(".")[0] in OWN_NAMES for name in under) for prefix, under in names.items()}
        return choose_prefix(count, str(path), "T5 encoders", TextEncoderError)
    guess = next((what for part, what in FOREIGN if any(part in key for key in raw)), None)
    raise TextEncoderError(
        f"{called(path)} is not a T5 encoder{f' but looks like {guess}' if guess else ''}: there is no {QUERY} among its "
        f"{len(raw)} keys ({_some(sorted(raw))}). Give the T5 that belongs to the model."
    )


def _strip(raw: dict[str, StoredTensor], prefix: str, path: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Removes the prefix, and leaves out all that isn't the encoder's, by its first name."""
    tensors, ignored = {}, []
    for key, value in raw.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and name.partition(".")[0] in OWN_NAMES and not is_state_of_wrapper(name):
            tensors[name] = value
        else:
            ignored.append(key)
    if EMBEDDING_ALIAS in tensors:
        tensors.setdefault(EMBEDDING, tensors[EMBEDDING_ALIAS])
        del tensors[EMBEDDING_ALIAS]
    if POSITIONS.replace("block.0", "block.1") in tensors:
        raise UnsupportedError(f"{path} is a UMT5 (every block has its own positions); PixArt uses T5.")
    return tensors, ignored


def _split_scales(
    tensors: dict[str, StoredTensor], path: Path
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """(tensors, scales by weight) of ComfyUI's scaled fp8 files; refuses its other quantizations."""
    plain, scales = {}, {}
    for name, stored in tensors.items():
        mark = next((end for end in SCALED_FP8 if name.endswith(end)), None)
        if mark is not None and torch.Size(stored.shape).numel() == 1:
            scales[name.removesuffix(mark) + ".weight"] = stored
        elif mark is not None or (name.endswith(FP8_MARK) and not _is_fp8(stored)):
            raise UnsupportedError(
                f"{path}: {name} is of a quantization made for ComfyUI's own loader; here expected scaled fp8 with one scale a "
                "weight. Give an fp16 or bf16 T5."
            )
        elif not name.endswith((*FP8_EXTRAS, FP8_MARK)):
            plain[name] = stored
    return plain, scales


def _is_fp8(mark: StoredTensor) -> bool:
    try:
        found = json.loads(bytes(mark.read().to(torch.uint8).tolist()))
        return found["format"] in FP8_FORMATS
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _sizes(shapes: dict[str, tuple[int, ...]], path: Path) -> dict[str, int | float | str]:
    """T5Config fields that the shapes imply."""
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes
    first = f"encoder.block.0.layer.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"
    needed = (EMBEDDING, POSITIONS, QUERY, first)
    missing = [key for key in needed if key not in shapes]
    if missing:
        raise TextEncoderError(f"{path}: incomplete T5, without {', '.join(missing)}. Download it again.")
    flat = [key for key in needed if len(shapes[key]) != 2 or 0 in shapes[key]]
    if flat:
        raise TextEncoderError(f"{path}: {', '.join(flat)} should be matrices; this is a quantized or damaged T5.")
    vocab_size, d_model = shapes[EMBEDDING]
    buckets, heads = shapes[POSITIONS]
    blocks = {int(m[1]) for m in (re.match(r"encoder\.block\.(\d{1,6})\.", key) for key in shapes) if m}
    if max(blocks) >= MOST_LAYERS:
        raise TextEncoderError(f"{path}: names block {max(blocks)}; no T5 has so many. The file is damaged.")
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": shapes[QUERY][0] // heads,
        "d_ff": shapes[first][0],
        "num_layers": max(blocks) + 1,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


def _main_dtype(stored: dict[str, StoredTensor]) -> torch.dtype:
    """In which most weights are stored: some files keep the embedding or the norms wider. bf16 where that is no float."""
    count: Counter = Counter()
    for each in stored.values():
        count[each.dtype] += torch.Size(each.shape).numel()
    dtype = count.most_common(1)[0][0]
    return dtype if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16


def is_finite(value: Tensor) -> bool:
    """Whether there is no NaN and no infinity; integers have none."""
    if not value.numel() or not value.is_floating_point():
        return True
    value = value.float() if value.dtype.itemsize == 1 else value
    return bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the dtype that T5 is to have."""
    # T5's wo overflows in fp16; transformers keeps it in fp32 too.
    return value.to(torch.float32 if dtype == torch.float16 and ".wo." in key else dtype)


def _some(names: list[str], limit: int = 4, between: str = ", ") -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return between.join(names[:limit]) + more

"""From a T5 file or folder of any size to the host's CLIP, built of the host's own PixArt classes."""
from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.text_encoders.pixart_t5 as pixart_t5
import comfy.utils
import folder_paths
import torch

from ...pixart.checkpoints import QUANTIZATION_SUFFIXES
from ...pixart.checkpoints.content import SAFETENSORS, content_of
from ...pixart.checkpoints.parts import SCALED_FP8
from ...pixart.checkpoints.read import safetensors_header
from ...pixart.checkpoints.shards import SAFE_SUFFIXES
from ...pixart.errors import TextEncoderError, UnsupportedError
from ...pixart.logs import get_logger
from ...pixart.text.names import FP8, STORED_PRECISIONS
from ...pixart.text.prompt_file import fingerprint
from ...pixart.text.quantize import check_range, choose_precision
from ...pixart.text.settings import XXL
from ...pixart.text.weights import EMBEDDING, FINAL_NORM, T5Weights, cast, check_shapes, expected_shapes, is_finite, read_t5
from .dtypes import DEFAULT, DTYPES
from .paging import SAMPLED, pages_weights
from .quantized_t5 import FINGERPRINT, quantized_clip_class, resident_estimate
from .tokenizer import tokenizer_class

log = get_logger(__name__)
PRECISIONS = (*DTYPES, *STORED_PRECISIONS)
DEVICES = (DEFAULT, "cpu")
XXL_KEY = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"  # UMT5-XXL, which doesn't fit, has it too, but 256384 rows of tokens
KNOWN_TO_HOST = {"logit_scale", SCALED_FP8}  # beside a T5
ACTIVATIONS = {"gated-gelu": "gelu_pytorch_tanh", "relu": "relu"}
# What the host's T5 has as constants
FIXED = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}


def load_t5(path: str, precision: str, device: str, disable_dynamic: bool = False) -> Any:
    """The host's CLIP with one stream, `t5xxl`; raises TextEncoderError for anything but a whole T5.

    T5-v1.1-XXL files go through the host's loader, which knows scaled fp8 and the like; all others, folders and
    an asked-for precision through the same classes with the sizes of the weights.
    """
    options: dict[str, Any] = {}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    clip = _from_host(path, precision, options, disable_dynamic) or _from_weights(
        Path(path), precision, options, disable_dynamic
    )
    clip.patcher.cached_patcher_init = (load_t5_patcher, (path, precision, device))
    return clip


def load_t5_patcher(path: str, precision: str, device: str, disable_dynamic: bool = False) -> Any:
    """What the host calls to rebuild the model."""
    return load_t5(path, precision, device, disable_dynamic).patcher


def _from_host(path: str, precision: str, options: dict[str, Any], disable_dynamic: bool) -> Any | None:
    """The host's own loader, for XXL files that it knows."""
    named = Path(path).is_file() and Path(path).suffix.lower() in SAFE_SUFFIXES
    if not named or content_of(Path(path), TextEncoderError) != SAFETENSORS:
        return None  # the host goes by the suffix
    shapes = {name: tuple(entry["shape"]) for name, entry in safetensors_header(Path(path), TextEncoderError)[0].items()}
    is_xxl = shapes.get(XXL_KEY, (0,))[0] == XXL["d_ff"] and shapes.get("shared.weight", (0,))[0] == XXL["vocab_size"]
    scaled = any(key.endswith(QUANTIZATION_SUFFIXES) for key in shapes)
    if not is_xxl or precision in STORED_PRECISIONS or not (precision == DEFAULT or scaled):
        return None
    if not _has_plain_names(Path(path), scaled, set(shapes)):
        return None
    if scaled and precision != DEFAULT:
        log.warning("PixArt: %s keeps the precision of its file; %s was asked for.", path, precision)
    clip = comfy.sd.load_clip(
        ckpt_paths=[path],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=comfy.sd.CLIPType.PIXART,
        model_options=options,
        **_supported(comfy.sd.load_clip, disable_dynamic=disable_dynamic),
    )
    if not hasattr(clip.cond_stage_model, "t5xxl"):
        raise TextEncoderError(
            f"{path} is a {type(clip.cond_stage_model).__name__}; expected a T5 encoder. "
            "PixArt reads captions with T5-v1.1-XXL; give its .safetensors file or its Hugging Face folder."
        )
    _check_values(path, clip)
    return clip


def _has_plain_names(path: Path, scaled: bool, names: set[str]) -> bool:
    """Whether the host will find every weight, and nothing else to take the file for; it only logs missing keys, and goes on
    with whatever was in memory. Raises TextEncoderError for what is no whole T5."""
    try:
        weights = read_t5(path)  # shapes too
    except UnsupportedError:
        if not scaled:
            raise
        # A quantization that the host alone knows: names are all that is sure
        check_shapes({name: shape for name, shape in expected_shapes(XXL).items() if name in names}, XXL, path)
        return True
    plain = not weights.layers and all(name == stored.key for name, stored in weights.stored.items())
    return plain and set(weights.ignored) <= KNOWN_TO_HOST


def _check_values(path: str, clip: Any) -> None:
    """The host takes NaN for weights without a word. Where it maps them to the file, a sample of each is read, not the file."""
    sample = SAMPLED if pages_weights() else None
    for name, value in clip.cond_stage_model.t5xxl.transformer.named_parameters():
        plain = type(value.data) is torch.Tensor and not value.is_meta  # the host's quantized tensors have types of their own
        if plain and not is_finite(value.data.flatten()[:sample]):
            raise TextEncoderError(f"{path}: NaN or infinite values in {name}. Download or export it again.")


def _from_weights(path: Path, precision: str, options: dict[str, Any], disable_dynamic: bool) -> Any:
    """A CLIP with the sizes of the weights."""
    weights = read_t5(path)
    quantized = choose_precision(weights, precision if precision in STORED_PRECISIONS else None)
    dtype = torch.bfloat16 if quantized else DTYPES[precision] or weights.dtype
    if weights.precision and precision not in (DEFAULT, weights.precision):
        log.warning("PixArt: %s is quantized to %s and stays so; %s was asked for.", path, weights.precision, precision)
    parameters = sum(torch.Size(stored.shape).numel() for stored in weights.stored.values())
    content: dict[str, Any] = {"disable_dynamic": True}  # packed weights are none that the host could page in itself
    streamed = not quantized and not pages_weights()  # a dict of all weights would hold cast ones twice
    if quantized:
        model_class = quantized_clip_class(weights, quantized, options)
        parameters = resident_estimate(weights, quantized) // dtype.itemsize
    else:
        model_class = pixart_t5.pixart_te(dtype_t5=dtype)
        content = {"disable_dynamic": disable_dynamic, "state_dict": [] if streamed else [_mapped(weights, dtype)]}
    clip = comfy.sd.CLIP(
        SimpleNamespace(clip=model_class, tokenizer=tokenizer_class(weights), params={}),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=parameters,
        model_options={**options, "dtype": dtype, "t5xxl_model_config": host_config(weights)},
        **_supported(comfy.sd.CLIP.__init__, **content),
    )
    for layer in weights.stream_layers() if streamed else ():
        clip.load_sd(_fitting(layer, weights, dtype))
    if dtype == DTYPES[FP8]:  # the host casts embeddings and norms too, which the core keeps in bf16
        name = fingerprint(weights.read(EMBEDDING), weights.read(FINAL_NORM), int(weights.config["num_layers"]), FP8)
        setattr(clip.cond_stage_model.t5xxl.transformer, FINGERPRINT, name)
    log.info(
        "T5 %s: width %s, %s layers, %s", path, weights.config["d_model"], weights.config["num_layers"], quantized or dtype
    )
    return clip


def _fitting(tensors: dict[str, torch.Tensor], weights: T5Weights, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same; raises TextEncoderError for values that the host's cast to fp8 would make NaN."""
    for name, tensor in tensors.items() if dtype == DTYPES[FP8] else ():
        check_range(tensor, FP8, f"{weights.path}: {name}")
    return tensors


def _mapped(weights: T5Weights, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights, by the host's own reader where they are stored as they are to be: it then pages them in from the file."""
    plain = [name for name, each in weights.stored.items() if each.value is None and each.dtype == dtype and name not in weights.scales]
    files = {weights.stored[name].path for name in plain}
    read = {file: comfy.utils.load_torch_file(str(file), safe_load=True) for file in files if file.suffix.lower() in SAFE_SUFFIXES}
    found = {name: read[each.path][each.key] for name in plain if (each := weights.stored[name]).path in read}
    for name, value in found.items():
        if not is_finite(value.flatten()[:SAMPLED]):
            raise TextEncoderError(f"{weights.path}: NaN or infinite values in {name}. Download or export it again.")
    others = {name: cast(name, weights.read(name), weights.dtype) for name in weights.stored if name not in found}
    return _fitting({**found, **others}, weights, dtype)


def host_config(weights: T5Weights) -> dict[str, Any]:
    """The host's T5 settings for these weights; raises UnsupportedError for what its T5 can't be."""
    config = weights.config
    wrong = [f"{name} {config[name]}, not {value}" for name, value in FIXED.items() if config.get(name, value) != value]
    activation = ACTIVATIONS.get(str(config["feed_forward_proj"]))
    if activation is None:
        wrong.append(f"feed_forward_proj {config['feed_forward_proj']}, not one of {', '.join(ACTIVATIONS)}")
    if wrong:
        raise UnsupportedError(f"{weights.path}: ComfyUI's T5 can't run it: it has {'; '.join(wrong)}. Use another T5.")
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    gated = str(config["feed_forward_proj"]).startswith("gated")
    return {
        **{name: config[name] for name in sizes},
        "num_decoder_layers": config["num_layers"],
        "dense_act_fn": activation,
        "is_gated_act": gated,
        "model_type": "t5",
    }


def _supported(function: Any, **arguments: Any) -> dict[str, Any]:
    """Those arguments that this host's function has."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in known}

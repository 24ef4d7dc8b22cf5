"""T5 as PixArt uses it: prompts in, states and mask out, padded only to the longest."""
from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError, TextEncoderError, UnsupportedError
from ..logs import get_logger
from .embeddings import TextEmbeddings, concatenate
from .names import PRECISIONS
from .prompt_file import fingerprint
from .quantize import choose_precision, fill_layers, replace_linears
from .tokenizer import WHERE_TO_GET, Tokenizer, from_json, from_sentencepiece, load_tokenizer, mismatch, tokenizer_beside
from .weights import T5Weights, read_t5

__all__ = ["TextEmbeddings", "TextEncoder", "concatenate", "load_text_encoder"]
logger = get_logger(__name__)


class TextEncoder:
    """A T5 encoder and its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, precision: str | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.precision = precision or str(model.shared.weight.dtype).removeprefix("torch.")

    @property
    def width(self) -> int:
        """Channels of the states; must be the transformer's caption_channels."""
        return self.model.config.d_model

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return self.model.shared.weight.device

    @cached_property
    def fingerprint(self) -> str:
        """Names these weights in this precision, for prompt files."""
        norm = self.model.encoder.final_layer_norm.weight
        return fingerprint(self.model.shared.weight, norm, self.model.config.num_layers, self.precision)

    def to(self, device: torch.device | str) -> TextEncoder:
        """Moves the encoder, and returns it."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str], max_tokens: int = 300) -> TextEmbeddings:
        """States (B, M, C) of the prompts, M the longest of them and at most `max_tokens`.

        A prompt that is too long loses its last words, never the end token; what was cut is returned
        and logged. An empty prompt is the end token alone. Raises InputError for an empty list.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise InputError("No prompts were given; expected at least one (an empty string is fine).")
        found = [self.tokenizer.encode(prompt, max_tokens) for prompt in prompts]
        for prompt in found:
            if prompt.cut:
                logger.warning(
                    "A prompt has %d tokens, the limit is %d. Left out: %s", prompt.count, max_tokens, prompt.cut
                )
            if prompt.unknown:
                logger.warning("A prompt has words that T5 has no tokens for, and doesn't see: %s", prompt.unknown)
        longest = max(len(prompt.ids) for prompt in found)
        ids = torch.zeros(len(found), longest, dtype=torch.long)
        mask = torch.zeros(len(found), longest, dtype=torch.bool)
        for row, prompt in enumerate(found):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
            mask[row, : len(prompt.ids)] = True
        ids, mask = ids.to(self.device), mask.to(self.device)
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return TextEmbeddings(states, mask, tuple(p.count for p in found), tuple(p.cut for p in found))


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    precision: str | None = None,
) -> TextEncoder:
    """Loads a T5 encoder from a Hugging Face folder (sharded, quantized, or a pipeline's) or a weight file.

    tokenizer: folder, tokenizer.json or spiece.model; default: inside the file or folder, or beside it.
    dtype: fp32, bf16 or fp16 (default: as stored). precision: int8, nf4, fp4 or fp8_e4m3fn for the linear layers,
    which then compute in bf16, whatever dtype says. Raises TextEncoderError or UnsupportedError saying what to do.
    """
    weights, precision = open_weights(path, dtype, precision)
    found = find_tokenizer_of(weights, tokenizer)
    logger.info("T5 from %s: %s; tokenizer %s", path, weights.config, found.source)
    return TextEncoder(build_model(weights, precision, device), found, precision)


def open_weights(
    path: str | Path, dtype: torch.dtype | None = None, precision: str | None = None
) -> tuple[T5Weights, str | None]:
    """What `build_model` needs, checked but not read; arguments and errors as above."""
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedError(f"T5 can't run in {dtype}; expected float32, bfloat16 or float16.")
    if precision not in (None, *PRECISIONS):
        raise UnsupportedError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    weights = read_t5(Path(path), dtype)
    return weights, choose_precision(weights, precision)


def build_model(weights: T5Weights, precision: str | None, device: torch.device | str = "cpu") -> nn.Module:
    """The encoder alone, transformers' T5EncoderModel."""
    return _build_quantized(weights, precision, device) if precision else _build(weights).to(device)


def find_tokenizer_of(weights: T5Weights, given: str | Path | None) -> Tokenizer:
    """The tokenizer that was given, or that comes with the weights; raises TextEncoderError for none and for another model's."""
    found = own_tokenizer(weights) if given is None else _checked(load_tokenizer(given), weights)
    if found is None:
        raise TextEncoderError(f"{weights.path} comes without a tokenizer, and there is none beside it. {WHERE_TO_GET}")
    return found


def own_tokenizer(weights: T5Weights) -> Tokenizer | None:
    """The tokenizer inside the weights, or in or near their folder; None for none, TextEncoderError for another model's."""
    path = weights.path
    if weights.sentencepiece is not None:
        return _checked(from_sentencepiece(weights.sentencepiece, f"{path} (spiece_model)"), weights)
    if weights.tokenizer_json is not None:
        return _checked(from_json(weights.tokenizer_json, f"{path} (tokenizer_json)"), weights)
    return tokenizer_beside(path, int(weights.config["vocab_size"]))


def _checked(tokenizer: Tokenizer, weights: T5Weights) -> Tokenizer:
    problem = mismatch(tokenizer, int(weights.config["vocab_size"]))
    if problem:
        raise TextEncoderError(f"{weights.path}: {problem}. {WHERE_TO_GET}")
    return tokenizer


def _build(weights: T5Weights) -> nn.Module:
    """T5EncoderModel holding the tensors themselves."""
    model = empty_model(weights)
    model.load_state_dict(dict(weights.stream()), strict=False, assign=True)
    return _finish(model, weights)


def _build_quantized(weights: T5Weights, precision: str, device: torch.device | str) -> nn.Module:
    """The same with quantized linear layers, on `device`; never holds more than one layer unquantized."""
    model = empty_model(weights)
    replace_linears(model)
    others = fill_layers(model, weights, precision, device)
    model.load_state_dict(others, strict=False, assign=True)
    return _finish(model, weights)


def empty_model(weights: T5Weights) -> nn.Module:
    """The encoder on the meta device: sizes without numbers."""
    try:
        from transformers import T5Config, T5EncoderModel
    except ImportError as error:
        raise TextEncoderError(f"T5 needs the transformers library ({error}): `pip install transformers`.") from None

    try:
        with torch.device("meta"):
            return T5EncoderModel(T5Config(**weights.config))
    except (ValueError, KeyError) as error:
        raise TextEncoderError(f"{weights.path}: transformers can't build this T5: {error}") from None


def _finish(model: nn.Module, weights: T5Weights) -> nn.Module:
    model.set_input_embeddings(model.shared)
    empty = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if empty:  # `read_t5` has checked the names: only an unknown transformers can get here
        raise TextEncoderError(f"{weights.path}: this version of transformers expects weights that no T5 has: {', '.join(empty[:6])}.")
    return model.eval().requires_grad_(False)

"""T5 as PixArt uses it: prompts in, states and mask out, padded only to the longest."""
from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, TextEncoderError, UnsupportedError
from .packed import PRECISIONS
from .quantize import choose_precision, fill_layers, replace_linears
from .tokenizer import WHERE_TO_GET, Tokenizer, find_tokenizer, from_sentencepiece, load_tokenizer
from .weights import T5Weights, read_t5, text_encoder_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextEmbeddings:
    """T5 states of a batch of prompts."""

    states: Tensor  # (B, M, C)
    mask: Tensor  # (B, M) bool, True for a real token
    token_counts: tuple[int, ...] = ()  # of the whole prompts, end token included, before any cut
    truncated: tuple[str, ...] = ()  # the words cut from each prompt, "" if none

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextEmbeddings:
        """The same on another device, and in another dtype."""
        return replace(self, states=self.states.to(device, dtype), mask=self.mask.to(device))

    def repeat(self, count: int) -> TextEmbeddings:
        """Every prompt `count` times, neighbours together."""
        return TextEmbeddings(
            self.states.repeat_interleave(count, dim=0),
            self.mask.repeat_interleave(count, dim=0),
            tuple(tokens for tokens in self.token_counts for _ in range(count)),
            tuple(words for words in self.truncated for _ in range(count)),
        )


def concatenate(first: TextEmbeddings, second: TextEmbeddings) -> TextEmbeddings:
    """One batch of both; the shorter is padded, and the mask hides the padding."""
    longest = max(first.states.shape[1], second.states.shape[1])
    padded = []
    for part in (first, second):
        extra = longest - part.states.shape[1]
        padded.append((F.pad(part.states, (0, 0, 0, extra)), F.pad(part.mask, (0, extra))))
    states, masks = zip(*padded)
    return TextEmbeddings(
        torch.cat(states),
        torch.cat(masks),
        first.token_counts + second.token_counts,
        first.truncated + second.truncated,
    )


class TextEncoder:
    """A T5 encoder and its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Channels of the states; must be the transformer's caption_channels."""
        return self.model.config.d_model

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return self.model.shared.weight.device

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
    path = Path(path)
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedError(f"T5 can't run in {dtype}; expected float32, bfloat16 or float16.")
    if precision not in (None, *PRECISIONS):
        raise UnsupportedError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    weights = read_t5(path, dtype)
    precision = choose_precision(weights, precision)
    found = find_tokenizer_of(weights, tokenizer)
    if found.size > weights.config["vocab_size"]:
        raise TextEncoderError(
            f"{found.source} has {found.size} tokens, but {path} has embeddings for {weights.config['vocab_size']}: "
            f"they don't belong together. {WHERE_TO_GET}"
        )
    logger.info("T5 from %s: %s; tokenizer %s", path, weights.config, found.source)
    model = _build_quantized(weights, precision, device) if precision else _build(weights).to(device)
    return TextEncoder(model, found)


def find_tokenizer_of(weights: T5Weights, given: str | Path | None) -> Tokenizer:
    """The tokenizer that was given, or that comes with the weights; raises TextEncoderError if there is none."""
    path = weights.path
    if given is not None:
        return load_tokenizer(given)
    if weights.sentencepiece is not None:
        return from_sentencepiece(weights.sentencepiece, f"{path} (spiece_model)")
    if path.is_dir():
        folder = text_encoder_folder(path)
        places = [path, folder, folder.parent]
    else:
        places = [path.with_suffix(""), path.parent, path.parent.parent / "tokenizer"]
    for place in places:
        found = find_tokenizer(place)
        if found is not None:
            return load_tokenizer(found)
    raise TextEncoderError(f"{path} comes without a tokenizer, and there is none beside it. {WHERE_TO_GET}")


def _build(weights: T5Weights) -> nn.Module:
    """T5EncoderModel holding the tensors themselves."""
    model = _empty_model(weights)
    model.load_state_dict(dict(weights.stream()), strict=False, assign=True)
    return _finish(model, weights)


def _build_quantized(weights: T5Weights, precision: str, device: torch.device | str) -> nn.Module:
    """The same with quantized linear layers, on `device`; never holds more than one layer unquantized."""
    model = _empty_model(weights)
    replace_linears(model)
    others = fill_layers(model, weights, precision, device)
    model.load_state_dict(others, strict=False, assign=True)
    return _finish(model, weights)


def _empty_model(weights: T5Weights) -> nn.Module:
    try:
        from transformers import T5Config, T5EncoderModel
    except ImportError:
        raise TextEncoderError("T5 needs the transformers library: `pip install transformers`.") from None

    try:
        with torch.device("meta"):
            return T5EncoderModel(T5Config(**weights.config))
    except (ValueError, KeyError) as error:
        raise TextEncoderError(f"{weights.path}: transformers can't build this T5: {error}") from None


def _finish(model: nn.Module, weights: T5Weights) -> nn.Module:
    model.set_input_embeddings(model.shared)
    empty = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if empty:  # `read_t5` has checked the names: only an unknown transformers can get here
        raise TextEncoderError(f"{weights.path}: this transformers wants weights that no T5 has: {', '.join(empty[:6])}.")
    return model.eval().requires_grad_(False)

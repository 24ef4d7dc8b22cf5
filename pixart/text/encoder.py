"""T5 as PixArt uses it: prompts in, states and mask out, padded only to the longest."""
from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, TextEncoderError, UnsupportedError
from .tokenizer import WHERE_TO_GET, Tokenizer, find_tokenizer, from_sentencepiece, load_tokenizer
from .weights import EMBEDDING_ALIAS, T5Weights, read_t5, text_encoder_folder

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
) -> TextEncoder:
    """Loads a T5 encoder from a Hugging Face folder (sharded too, or a pipeline's) or a .safetensors file.

    tokenizer: folder, tokenizer.json or spiece.model; default: inside the file or folder, or beside it.
    dtype: fp32, bf16 or fp16 (default: as stored). Raises TextEncoderError saying what to do.
    """
    path = Path(path)
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedError(f"T5 can't run in {dtype}; expected float32, bfloat16 or float16.")
    weights = read_t5(path, dtype)
    found = _find_tokenizer(weights, tokenizer)
    if found.size > weights.config["vocab_size"]:
        raise TextEncoderError(
            f"{found.source} has {found.size} tokens, but {path} has embeddings for {weights.config['vocab_size']}: "
            f"they don't belong together. {WHERE_TO_GET}"
        )
    logger.info("T5 from %s: %s; tokenizer %s", path, weights.config, found.source)
    return TextEncoder(_build(weights).to(device), found)


def _find_tokenizer(weights: T5Weights, given: str | Path | None) -> Tokenizer:
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
    """T5EncoderModel holding the tensors themselves; all missing, unknown and misshapen keys raise at once."""
    try:
        from transformers import T5Config, T5EncoderModel
    except ImportError:
        raise TextEncoderError("T5 needs the transformers library: `pip install transformers`.") from None

    try:
        with torch.device("meta"):
            model = T5EncoderModel(T5Config(**weights.config))
    except (ValueError, KeyError) as error:
        raise TextEncoderError(f"{weights.path}: transformers can't build this T5: {error}") from None
    expected = {key: value.shape for key, value in model.state_dict().items() if key != EMBEDDING_ALIAS}
    problems = [f"missing {key}" for key in expected if key not in weights.tensors]
    problems += [f"unknown {key}" for key in weights.tensors if key not in expected]
    problems += [
        f"{key} has shape {tuple(value.shape)}, expected {tuple(expected[key])}"
        for key, value in weights.tensors.items()
        if key in expected and value.shape != expected[key]
    ]
    if problems:
        raise TextEncoderError(f"{weights.path} is not a complete T5 encoder: {'; '.join(problems)}.")
    model.load_state_dict(weights.tensors, strict=False, assign=True)
    model.set_input_embeddings(model.shared)
    return model.eval().requires_grad_(False)

"""The T5 stream among the tokens of any host CLIP: prepared, cut to a limit, counted, encoded."""
from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...pixart.errors import InputError, TextEncoderError
from ...pixart.text.captions import prepare
from ...pixart.text.prompt_file import fingerprint
from ...pixart.text.tokenizer import unknown_words, whole_characters
from .quantized_t5 import FINGERPRINT, precision_of

STREAM = "t5xxl"
PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2  # of every T5
PROMPT_KEY = "pixart_prompt"  # in a conditioning: what PixArtSavePrompt writes beside the states
_FILE_NAMES = re.compile(r"(embedding:\S+)")  # the host's syntax; names of files are not prompt text


@dataclass(frozen=True)
class Encoded:
    """CONDITIONING of one prompt, and what became of its tokens."""

    conditioning: list
    count: int  # tokens of the whole prompt, end token included
    limit: int
    cut: str  # words beyond the limit; "" if none
    unknown: str = ""  # words with characters that T5 has no tokens for; "" if none

    def describe(self) -> str:
        """One to three lines for the node."""
        lines = [f"{min(self.count, self.limit)} of {self.limit} tokens"]
        lines += [f"cut ({self.count - self.limit} tokens): {self.cut}"] * bool(self.cut)
        lines += [f"unknown to T5, which reads Latin letters: {self.unknown}"] * bool(self.unknown)
        return "\n".join(lines)


def prepare_text(text: str, clean: bool, lower_case: bool) -> str:
    """As the core's `prepare`, but `embedding:Name` keeps its case. Cleaning goes over everything."""
    if clean:
        return prepare(text, clean=True)
    parts = _FILE_NAMES.split(text) if lower_case else [text]
    return "".join(part if n % 2 else part.lower() for n, part in enumerate(parts)) if lower_case else text


def encode(clip: Any, text: str, max_tokens: int) -> Encoded:
    """Encodes with the weights of `(word:1.2)`, as CLIPTextEncode does, within `max_tokens`.

    Raises TextEncoderError for a CLIP without T5 or states that overflow, InputError for a limit below 1.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; expected at least 1, for the end token.")
    text = whole_characters(text)
    tokens = _tokenize(clip, text)
    words = [pair for row in tokens[STREAM] for pair in _without_end(row)]
    kept, cut = words[: max_tokens - 1], words[max_tokens - 1 :]
    conditioning = _encode_row(clip, tokens, [*kept, (END_ID, 1.0)])
    if not all(torch.isfinite(states).all() for states, _ in conditioning):  # it would draw a black picture
        raise TextEncoderError(
            f"The states of the prompt {text[:60]!r} hold NaN or infinite values. Look for a weight such as (word:1e40), or "
            "choose precision bf16 in PixArtT5Loader."
        )
    note = {"prompt": text, "encoder": _fingerprint(clip), "count": len(words) + 1, "kept": len(kept) + 1, "cut": _words(clip, cut)}
    for entry in conditioning:
        entry[1][PROMPT_KEY] = note
    return Encoded(conditioning, len(words) + 1, max_tokens, note["cut"], _unknown(clip, text, words))


def encode_padded_end(clip: Any, length: int) -> list:
    """CONDITIONING of the empty prompt padded to `length` tokens, of which T5 itself sees the end token alone.

    As the Sigma repository pads its negative prompt. All padding has one state, since it attends to nothing but the end
    token, and T5's positions act through attention alone: two tokens are enough to encode.
    """
    tokens = _tokenize(clip, "")
    with _masked(clip):
        conditioning = _encode_row(clip, tokens, [(END_ID, 1.0), (PAD_ID, 1.0)])
    for entry in conditioning:
        entry[0] = torch.cat([entry[0][:, :1], entry[0][:, 1:].expand(-1, max(length - 1, 0), -1)], dim=1)
        entry[1].pop("attention_mask", None)
        entry[1][PROMPT_KEY] = {"prompt": "", "encoder": _fingerprint(clip), "count": length, "kept": length, "cut": ""}
    return conditioning


def _tokenize(clip: Any, text: str) -> dict[str, list]:
    """Rows of (token, weight) of each stream; raises TextEncoderError for a CLIP without T5."""
    if clip is None:
        raise TextEncoderError("clip is empty: the checkpoint it comes from holds no text encoder. Use PixArtT5Loader.")
    tokens = clip.tokenize(text)
    if STREAM not in tokens:
        raise TextEncoderError(
            f"This CLIP has the token streams {', '.join(tokens)}; expected a T5 ({STREAM}), with which PixArt reads "
            "captions. Load T5-v1.1-XXL with PixArtT5Loader, or CLIPLoader with type pixart."
        )
    if getattr(clip.cond_stage_model, STREAM, True) is None:
        raise TextEncoderError("This CLIP was loaded without its T5, with which PixArt reads captions. Use PixArtT5Loader.")
    return tokens


def _encode_row(clip: Any, tokens: dict[str, list], row: list[tuple]) -> list:
    # SD3's CLIP-L and CLIP-G states stand before T5's: left out where both may be empty, cut off in any case.
    optional = {"l", "g"} if {"l", "g"} <= set(tokens) else set()
    given = {name: [] if name in optional else rows for name, rows in tokens.items()}
    given[STREAM] = [row]
    return [_last(entry, len(row)) for entry in clip.encode_from_tokens_scheduled(given)]


@contextmanager
def _masked(clip: Any) -> Iterator[None]:
    """T5 ignores what follows the end token while the block runs, which the host's PixArt encoder doesn't by itself."""
    t5 = getattr(clip.cond_stage_model, STREAM, None)
    if not hasattr(t5, "enable_attention_masks"):
        raise TextEncoderError("This CLIP's T5 can't mask padding; load it with PixArtT5Loader or CLIPLoader (type pixart).")
    before, t5.enable_attention_masks = t5.enable_attention_masks, True
    try:
        yield
    finally:
        t5.enable_attention_masks = before


def _fingerprint(clip: Any) -> str:
    """Of the T5 inside; "" where its weights are not plain tensors (GGUF), whose classes may raise anything."""
    t5 = getattr(getattr(clip.cond_stage_model, STREAM, None), "transformer", None)
    try:
        noted = getattr(t5, FINGERPRINT, "")
        return noted or fingerprint(t5.shared.weight, t5.encoder.final_layer_norm.weight, len(t5.encoder.block), precision_of(t5))
    except Exception:
        return ""


def _last(entry: list, length: int) -> list:
    """A conditioning entry with the last tokens only, its mask likewise."""
    states, values = entry[0][:, -length:], dict(entry[1])
    if values.get("attention_mask") is not None:
        values["attention_mask"] = values["attention_mask"][..., -length:]
    return [states, values]


def _without_end(row: list[tuple]) -> list[tuple]:
    """A row without padding and end token; (token, weight) pairs, where a token may be an embedding's tensor."""
    length = len(row)
    while length and _is(row[length - 1], PAD_ID):
        length -= 1
    if length and _is(row[length - 1], END_ID):
        length -= 1
    return row[:length]


def _is(pair: tuple, token: int) -> bool:
    return isinstance(pair[0], int) and pair[0] == token


def _unknown(clip: Any, text: str, words: list[tuple]) -> str:
    """The words of a prompt that T5 has no tokens for."""

    def ids_of(word: str) -> list[int]:
        return [token for row in _tokenize(clip, word)[STREAM] for token, *_ in row if isinstance(token, int)]

    return unknown_words(text, [token for token, *_ in words if isinstance(token, int)], ids_of, UNKNOWN_ID)


def _words(clip: Any, pairs: list[tuple]) -> str:
    """The text of tokens, from the vocabulary of the CLIP's T5 tokenizer."""
    owner = clip.tokenizer
    tokenizer = getattr(owner, STREAM, None) or getattr(owner, f"clip_{STREAM}", None)
    pieces = getattr(tokenizer, "inv_vocab", {})
    text = "".join(pieces.get(pair[0], "?") if isinstance(pair[0], int) else " (embedding)" for pair in pairs)
    return text.replace("\u2581", " ").strip()

"""The T5 stream among the tokens of any host CLIP: cut to a limit, counted, encoded."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...pixart.errors import InputError, TextEncoderError

STREAM = "t5xxl"
PAD_ID, END_ID = 0, 1  # of every T5


@dataclass(frozen=True)
class Encoded:
    """CONDITIONING of one prompt, and what became of its tokens."""

    conditioning: list
    count: int  # tokens of the whole prompt, end token included
    limit: int
    cut: str  # words beyond the limit; "" if none

    def describe(self) -> str:
        """One or two lines for the node."""
        line = f"{min(self.count, self.limit)} of {self.limit} tokens"
        return f"{line}\ncut ({self.count - self.limit} tokens): {self.cut}" if self.cut else line


def encode(clip: Any, text: str, max_tokens: int) -> Encoded:
    """Encodes with the weights of `(word:1.2)`, as CLIPTextEncode does, within `max_tokens`.

    Raises TextEncoderError for a CLIP without T5, InputError for a limit below 1.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; expected at least 1, for the end token.")
    if clip is None:
        raise TextEncoderError("clip is empty: the checkpoint it comes from holds no text encoder. Use PixArtT5Loader.")
    tokens = clip.tokenize(text)
    if STREAM not in tokens:
        raise TextEncoderError(
            f"This CLIP has the token streams {', '.join(tokens)}; expected a T5 ({STREAM}), by which PixArt reads "
            "captions. Load T5-v1.1-XXL with PixArtT5Loader, or CLIPLoader with type pixart."
        )
    if getattr(clip.cond_stage_model, STREAM, True) is None:
        raise TextEncoderError("This CLIP was loaded without its T5, by which PixArt reads captions. Use PixArtT5Loader.")
    words = [pair for row in tokens[STREAM] for pair in _without_end(row)]
    kept, cut = words[: max_tokens - 1], words[max_tokens - 1 :]
    # SD3's CLIP-L and CLIP-G states stand before T5's: left out where both may be empty, cut off in any case.
    optional = {"l", "g"} if {"l", "g"} <= set(tokens) else set()
    given = {name: [] if name in optional else rows for name, rows in tokens.items()}
    given[STREAM] = [[*kept, (END_ID, 1.0)]]
    length = len(given[STREAM][0])
    conditioning = [_last(entry, length) for entry in clip.encode_from_tokens_scheduled(given)]
    return Encoded(conditioning, len(words) + 1, max_tokens, _words(clip, cut))


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


def _words(clip: Any, pairs: list[tuple]) -> str:
    """The text of tokens, from the vocabulary of the CLIP's T5 tokenizer."""
    owner = clip.tokenizer
    tokenizer = getattr(owner, STREAM, None) or getattr(owner, f"clip_{STREAM}", None)
    pieces = getattr(tokenizer, "inv_vocab", {})
    text = "".join(pieces.get(pair[0], "?") if isinstance(pair[0], int) else " (embedding)" for pair in pairs)
    return text.replace("\u2581", " ").strip()

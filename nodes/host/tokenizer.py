"""A T5's own tokenizer (in its file, or in its folder) behind the host's tokenizer class."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd1_clip
import comfy.text_encoders.pixart_t5 as pixart_t5
import tokenizers
import torch
from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer

from ...pixart.errors import TextEncoderError
from ...pixart.text.encoder import own_tokenizer
from ...pixart.text.tokenizer import END_TOKEN
from ...pixart.text.weights import T5Weights

T5_VOCABULARY, MOST_ROWS = 32100, 32512  # ids that the host's own T5 tokenizer can give; rows of an embedding that may go with it
STREAM = "t5xxl"  # of the host's CLIP: what it saves under this prefix stays together


class JsonTokenizer:
    """The content of a tokenizer.json, called as the host calls its tokenizers."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8", errors="replace"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    @classmethod
    def from_pretrained(cls, content: bytes) -> JsonTokenizer:
        """The host's way to construct one."""
        return cls(content)

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Ids of the text, then the end token."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return {"input_ids": [*ids, self.tokenizer.token_to_id(END_TOKEN)]}

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id."""
        return self.tokenizer.get_vocab()

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text that ids stand for."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def tokenizer_class(weights: T5Weights) -> type:
    """A class for the host to instantiate: the tokenizer inside the weights, one in or near their folder, or the host's own.

    Raises TextEncoderError for a damaged one, and where its ids don't fit the weights.
    """
    source, kind = _source(weights)
    # The class lives as long as the CLIP: it must not name `weights`, which may hold all tensors of the file
    width, rows = int(weights.config["d_model"]), int(weights.config["vocab_size"])
    if source is None and not T5_VOCABULARY <= rows <= MOST_ROWS:
        raise TextEncoderError(
            f"{weights.path}: has {rows} token embeddings and no tokenizer of its own; T5's common tokenizer belongs to {T5_VOCABULARY} to "
            f"{MOST_ROWS} of them. Put its tokenizer.json or spiece.model beside it, or choose T5-v1.1-XXL, which PixArt was trained with."
        )

    class T5Tokenizer(comfy.sd1_clip.SDTokenizer):
        """No padding, as in the host's PixArt tokenizer."""

        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] = {}) -> None:  # noqa: B006
            super().__init__(
                source,
                embedding_directory=embedding_directory,
                pad_with_end=False,
                embedding_size=width,
                embedding_key="t5xxl",
                tokenizer_class=kind,
                has_start_token=False,
                pad_to_max_length=False,
                max_length=99999999,
                min_length=1,
                tokenizer_data=tokenizer_data,
            )

        def state_dict(self) -> dict[str, Any]:
            """Saved with the encoder, so that it stays complete."""
            if kind is SPieceTokenizer:
                return {f"{STREAM}.spiece_model": self.tokenizer.serialize_model()}
            return {f"{STREAM}.tokenizer_json": torch.frombuffer(bytearray(self.tokenizer.content), dtype=torch.uint8)}

    class HostTokenizer(pixart_t5.T5XXLTokenizer):
        """The host's, with embeddings of this encoder's width."""

        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] = {}) -> None:  # noqa: B006
            super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data)
            self.embedding_size = width

    chosen = T5Tokenizer if source else HostTokenizer

    class PixArtTokenizer(comfy.sd1_clip.SD1Tokenizer):
        """One stream, `t5xxl`."""

        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] = {}) -> None:  # noqa: B006
            super().__init__(
                embedding_directory=embedding_directory,
                tokenizer_data=tokenizer_data,
                clip_name="t5xxl",
                tokenizer=chosen,
            )

    return PixArtTokenizer


def _source(weights: T5Weights) -> tuple[bytes | None, type]:
    """What the host builds a tokenizer of (None: its own), and the class; the core has read and checked it, which the host wouldn't."""
    found = own_tokenizer(weights)
    if weights.sentencepiece is not None:
        return weights.sentencepiece, SPieceTokenizer
    if weights.tokenizer_json is not None:
        return weights.tokenizer_json, JsonTokenizer
    if found is None:
        return None, SPieceTokenizer
    file = Path(found.source)
    return file.read_bytes(), JsonTokenizer if file.suffix == ".json" else SPieceTokenizer

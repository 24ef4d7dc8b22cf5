"""How good captions are, as far as it can be counted: length in T5's tokens, duplicates, and CLIP's opinion."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import DataError, UnsupportedError
from ..text.captions import prepare
from ..training.data.picture import read_picture
from .drive import one_line

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

LIMITS = {120: "alpha", 300: "Sigma"}  # tokens that the families read
QUARTILES = (0, 25, 50, 75, 100)
AT_ONCE = 16  # pictures that CLIP sees together
SHOWN = 3


def describe(captions: Mapping[str, Sequence[str]], pictures: int, tokenizer: Tokenizer | None) -> list[str]:
    """Lines of text about the captions of a folder with so many pictures."""
    texts = [text for found in captions.values() for text in found]
    lines = [f"{len(captions)} of {pictures} pictures have captions, {len(texts)} in all."]
    if not texts:
        return lines
    lines.append(f"words: {_spread([len(text.split()) for text in texts])}")
    if tokenizer is None:
        lines.append("T5 tokens: not counted; give --tokenizer or --text-encoder.")
    else:
        counts = [tokenizer.encode(prepare(text), max(LIMITS)).count for text in texts]
        lines.append(f"T5 tokens: {_spread(counts)}")
        cut = [f"{np.mean([count > limit for count in counts]):.1%} at {limit} ({family})" for limit, family in LIMITS.items()]
        lines.append(f"cut: {', '.join(cut)}")
    return lines + _duplicates(texts)


def clip_scores(folder: Path, captions: Mapping[str, Sequence[str]], place: str, device: str) -> list[float]:
    """100 times the cosine of picture and caption, one a caption, as CLIP sees them; its own limit is 77 tokens.

    place: a CLIP of transformers. Raises UnsupportedError.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(place).to(device).eval()
        processor = CLIPProcessor.from_pretrained(place)
    except Exception as error:  # of models that users choose, whose code raises anything
        raise UnsupportedError(f"The CLIP {place} can't be loaded ({one_line(error)[:300]}).") from None
    pairs = [(name, text) for name, found in captions.items() for text in found]
    scores: list[float] = []
    for start in range(0, len(pairs), AT_ONCE):
        scores += _scores(model, processor, folder, pairs[start : start + AT_ONCE], device)
    return scores


@torch.no_grad()
def _scores(model: object, processor: object, folder: Path, pairs: Sequence[tuple[str, str]], device: str) -> list[float]:
    images, texts = [], []
    for name, text in pairs:
        try:
            images.append(read_picture((folder / name).read_bytes()))
            texts.append(text)
        except (DataError, OSError):
            continue  # it was named when it was to be captioned
    if not images:
        return []
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True).to(device)
    found = model(**inputs)
    return (100 * torch.cosine_similarity(found.image_embeds, found.text_embeds)).tolist()


def describe_scores(scores: Sequence[float]) -> list[str]:
    """A line of text."""
    return [f"CLIP score: {np.mean(scores):.1f} on average; {_spread(scores, '.1f')}"] if scores else []


def _spread(values: Sequence[float], form: str = ".0f") -> str:
    low, quarter, median, three, high = np.percentile(values, QUARTILES)
    return f"{low:{form}} to {high:{form}}, median {median:{form}}, half of them {quarter:{form}} to {three:{form}}"


def _duplicates(texts: Sequence[str]) -> list[str]:
    common = [(text, count) for text, count in Counter(texts).most_common() if count > 1]
    if not common:
        return ["duplicates: none"]
    named = "; ".join(f"{count} times: {text[:60]}" for text, count in common[:SHOWN])
    return [f"duplicates: {sum(count for _, count in common)} captions, {len(common)} different. {named}"]

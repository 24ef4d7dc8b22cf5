"""FID and CLIP score of a folder of pictures, by torchmetrics."""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError, UnsupportedError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
INCEPTION_SIDE = 299  # pixels, of Inception v3
NEEDED = 'Scores need torchmetrics and torch-fidelity ({}); `pip install ".[score]"` in the repository.'
FEATURES = 2048  # of its last pooling, as the papers take them


@dataclass(frozen=True)
class Scores:
    """What was measured; what wasn't is None."""

    pictures: int
    reference: int | None = None
    fid: float | None = None  # lower is nearer to the reference
    clip_score: float | None = None  # 100 x cosine of picture and caption, higher fits better

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    def describe(self) -> str:
        """Lines for people."""
        lines = []
        if self.fid is not None:
            few = f"; with so few pictures it is far too high, compare it only at the same number (expected {FEATURES} or more)"
            lines.append(f"FID {self.fid:.3f}, {self.pictures} pictures beside {self.reference}{few if self.pictures < FEATURES else ''}")
        if self.clip_score is not None:
            lines.append(f"CLIP score {self.clip_score:.3f}, {self.pictures} pictures with their captions")
        return "".join(f"{line}\n" for line in lines)


def score_folder(
    pictures: Path,
    *,
    reference: Path | None = None,
    inception: Path | nn.Module | None = None,
    clip: str | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Scores:
    """FID beside `reference`, CLIP score if `clip` names a model; at least one of them.

    inception: a weights file of torch-fidelity, or a module from uint8 pictures (B, 3, 299, 299) to features (B, F).
    Raises InputError for folders without pictures, without captions, or with a picture that can't be read.
    """
    if reference is None and clip is None:
        raise InputError("Nothing to score by: give --reference, a folder of real pictures, or --clip, a CLIP model, or both.")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected 1 or more.")
    files = _pictures_of(pictures)
    real = None if reference is None else _pictures_of(reference)
    captions = None if clip is None else [_caption_of(file) for file in files]
    fid = None if real is None else _fid(files, real, inception, batch_size, device)
    score = None if captions is None else _clip_score(files, captions, clip, batch_size, device)
    return Scores(len(files), None if real is None else len(real), fid, score)


def _fid(files: Sequence[Path], real: Sequence[Path], inception: Any, batch_size: int, device: Any) -> float:
    """Heusel and others, 2017: the distance of two normal distributions of Inception's features."""
    metric_class = _metrics("torchmetrics.image.fid", "FrechetInceptionDistance")
    if min(len(files), len(real)) < 2:
        raise InputError(f"FID needs two pictures or more on both sides; found {len(files)} and {len(real)}.")
    if isinstance(inception, Path | str):
        _check_weights(inception)
    own = {"feature": inception} if isinstance(inception, nn.Module) else {
        "feature": FEATURES, "feature_extractor_weights_path": None if inception is None else str(inception)
    }  # fmt: skip
    metric = _made(metric_class, "Inception v3", "--inception FILE", **own).to(device)
    for some, is_real in ((real, True), (files, False)):
        for batch in _batches(some, batch_size, "FID"):
            metric.update(torch.stack([_square(_read(file)) for file in batch]).to(device), real=is_real)
    return float(metric.compute())


def _check_weights(path: str | Path) -> None:
    """Raises InputError for a file that is not tensors alone: torch-fidelity would run the code that a pickle may hold."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise InputError(f"Inception v3 can't be loaded from {path} ({reason}); give torch-fidelity's file by --inception FILE.") from None


def _clip_score(files: Sequence[Path], captions: Sequence[str], clip: str, batch_size: int, device: Any) -> float:
    """Hessel and others, 2021, the mean over all pictures; captions are cut to CLIP's length."""
    metric_class = _metrics("torchmetrics.multimodal.clip_score", "CLIPScore")
    metric = _made(metric_class, f"CLIP {clip}", "--clip FOLDER", model_name_or_path=lambda: _clip_of(clip)).to(device)
    for batch in _batches(range(len(files)), batch_size, "CLIP score"):
        metric.update([_read(files[number]).to(device) for number in batch], [captions[number] for number in batch])
    return float(metric.compute())


def _clip_of(place: str) -> tuple[nn.Module, Any]:
    """Model and processor of a CLIP by its name or folder; of these classes alone, so that no code of a folder runs."""
    from transformers import CLIPModel, CLIPProcessor

    return _Clip(CLIPModel.from_pretrained(place)), CLIPProcessor.from_pretrained(place)


class _Clip(nn.Module):
    """A CLIP whose features are tensors, which transformers 5 hands out in an object, and torchmetrics takes as of transformers 4."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *inputs: Any, **named: Any) -> Tensor:
        return _tensor(self.model.get_image_features(*inputs, **named))

    def get_text_features(self, *inputs: Any, **named: Any) -> Tensor:
        return _tensor(self.model.get_text_features(*inputs, **named))


def _tensor(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output


def _metrics(module: str, name: str) -> Any:
    from importlib import import_module

    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(NEEDED.format(error)) from None


def _made(metric: Any, what: str, flag: str, **settings: Any) -> Any:
    """The metric with its network; its weights are downloaded unless they are given, which fails without a net."""
    try:
        return metric(**settings)
    except ModuleNotFoundError as error:
        raise UnsupportedError(NEEDED.format(error)) from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{what} can't be loaded ({str(error).splitlines()[0]}); without a net, give it by {flag}.") from None


def _pictures_of(folder: Path) -> list[Path]:
    """All pictures in a folder and those below, in order."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder; expected one with pictures.")
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{folder} has no pictures; expected files ending in {', '.join(SUFFIXES)}.")
    return files


def _caption_of(file: Path) -> str:
    try:
        return file.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, UnicodeDecodeError, IndexError):
        raise InputError(f"{file} has no caption; expected it in the first line of {file.with_suffix('.txt').name} beside it.") from None


def _read(file: Path) -> Tensor:
    """(3, H, W) uint8."""
    try:
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise InputError(f"{file} can't be read as a picture ({error}); remove it or replace it.") from None


def _square(picture: Tensor) -> Tensor:
    """(3, 299, 299): the whole picture, antialiased, so that batches hold pictures of all sizes."""
    resized = nn.functional.interpolate(picture[None].float(), (INCEPTION_SIDE, INCEPTION_SIDE), mode="bicubic", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def _batches(items: Iterable[Any], size: int, what: str) -> Iterator[list[Any]]:
    every = list(items)
    for start in tqdm(range(0, len(every), size), desc=what, leave=False):
        yield every[start : start + size]

"""FID and CLIP score of folders, with a feature extractor and a CLIP of random weights, against their formulas."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn

from pixart.cli import main
from pixart.errors import InputError
from pixart.training.score import score_folder

WORDS = ("a", "red", "blue", "square")


class Means(nn.Module):
    """Features (B, 6): the mean colour of the upper and the lower half."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        assert pictures.dtype == torch.uint8 and pictures.shape[1:] == (3, 299, 299)
        halves = pictures.float().unflatten(2, (1, 299)).mean(-1)[:, :, 0]
        return torch.cat([halves[:, :, :150].mean(-1), halves[:, :, 150:].mean(-1)], dim=1)


def folder_of(place: Path, seed: int, count: int = 12, captions: bool = False) -> Path:
    rng = np.random.default_rng(seed)
    place.mkdir(parents=True)
    for number in range(count):
        picture = rng.integers(0, 200 + 20 * seed, (int(rng.integers(20, 60)), 32, 3), dtype=np.uint8)
        Image.fromarray(picture).save(place / f"{number:02}.png")
        if captions:
            (place / f"{number:02}.txt").write_text(f"a {WORDS[1 + number % 2]} square\nanother line\n")
    return place


def features_of(place: Path) -> np.ndarray:
    rows = []
    for file in sorted(place.glob("*.png")):
        picture = np.asarray(Image.open(file).resize((299, 299), Image.Resampling.BICUBIC), dtype=np.float64)
        rows.append(np.concatenate([picture[:150].mean((0, 1)), picture[150:].mean((0, 1))]))
    return np.stack(rows)


def test_fid_is_the_distance_of_two_normal_distributions(tmp_path: Path) -> None:
    drawn, real = folder_of(tmp_path / "drawn", 1), folder_of(tmp_path / "real", 2, count=15)
    found = score_folder(drawn, reference=real, inception=Means(), batch_size=5)
    a, b = features_of(drawn), features_of(real)
    covariances = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert found.fid == pytest.approx(expected, rel=0.02)  # Pillow and torch resize alike but for rounding
    assert (found.pictures, found.reference, found.clip_score) == (12, 15, None)
    assert score_folder(drawn, reference=drawn, inception=Means()).fid == pytest.approx(0, abs=1e-2)
    assert "far too high" in found.describe()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP in the classes of the real one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokens = [*"".join(sorted(set("".join(WORDS)))), *(f"{letter}</w>" for letter in sorted(set("".join(WORDS)))), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": len(tokens) - 1, "bos_token_id": len(tokens) - 2, "pad_token_id": len(tokens) - 1}
    text = {**small, "vocab_size": len(tokens), "max_position_embeddings": 77, **ends}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_mean_cosine_of_picture_and_caption(tmp_path: Path, clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    drawn = folder_of(tmp_path / "drawn", 1, count=5, captions=True)
    found = score_folder(drawn, clip=str(clip_folder), batch_size=2)
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    scores = []
    for number, file in enumerate(sorted(drawn.glob("*.png"))):
        inputs = processor(text=[f"a {WORDS[1 + number % 2]} square"], images=Image.open(file), return_tensors="pt")
        with torch.no_grad():
            out = model(**inputs)
        scores.append(100 * float((out.image_embeds * out.text_embeds).sum()))
    assert found.clip_score == pytest.approx(max(0, np.mean(scores)), rel=1e-4) and np.mean(scores) != 0


def test_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    drawn = folder_of(tmp_path / "drawn", 1, count=2)
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([drawn], "give --reference"),
        ([drawn, "--clip", str(tmp_path)], "00.png has no caption"),
        ([tmp_path / "gone", "--reference", drawn], "is not a folder"),
        ([drawn, "--reference", tmp_path / "empty"], "has no pictures"),
        ([drawn, "--reference", drawn, "--batch-size", "0"], "batch_size is 0"),
        ([drawn, "--reference", drawn, "--inception", drawn / "00.png"], "Inception v3 can't be loaded.*--inception FILE"),
    ):
        assert main(["score", *map(str, arguments)]) == 2
        assert_said(message, capsys.readouterr().err)
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Harm()}, tmp_path / "harm.pth")
    assert main(["score", str(drawn), "--reference", str(drawn), "--inception", str(tmp_path / "harm.pth")]) == 2
    assert_said("can't be loaded", capsys.readouterr().err)
    assert not (tmp_path / "ran").exists()
    (drawn / "00.txt").write_text("a red square")
    (drawn / "01.txt").write_text("a red square")
    assert main(["score", str(drawn), "--clip", str(tmp_path / "empty")]) == 2
    assert_said("CLIP .*empty can't be loaded", capsys.readouterr().err)
    (drawn / "01.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="01.png can't be read"):
        score_folder(drawn, reference=drawn, inception=Means())


def assert_said(message: str, text: str) -> None:
    import re

    assert re.search(message, text), text

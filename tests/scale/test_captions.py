"""`caption` with a small random model through transformers' own classes."""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
from PIL import Image

from pixart import cli
from pixart.errors import InputError
from pixart.scale import vision
from pixart.scale.book import FOLDER
from pixart.scale.caption_commands import MODEL, SMALL_MODEL
from pixart.scale.caption_files import Field, TextFiles, picture_names, texts_at
from pixart.scale.caption_stage import ALONE, WITH_TEXT, CaptionSettings, CaptionStage
from tests.support.demo import DEMO, ROOT
from tests.support.tiny_vlm import save_blip, save_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one in a folder."""
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "sub/c.webp"):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(root / name)
    return root


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Answers without a model; what was asked about how many pictures."""
    seen: list[tuple[int, str]] = []

    class Answering:
        def __init__(self, place: str, device: str, dtype: str | None = None) -> None:
            self.place = place

        def answer(self, pictures, questions, max_tokens, temperature, seed):
            seen.extend((len(pictures), question) for question in questions)
            return [f"a picture of {picture.size}, seed {seed[0]}{seed[2]}" for picture in pictures]

    monkeypatch.setattr(vision, "VisionModel", Answering)
    return seen


def command(folder: Path, *options: object) -> int:
    return cli.main([str(value) for value in ("caption", folder, "--device", "cpu", *options)])


def texts(folder: Path, pattern: str = "*.txt") -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in sorted(folder.rglob(pattern))}


def test_a_real_model_answers_the_same_again_and_otherwise_with_another_seed(folder, model, capsys) -> None:
    options = ["--model", model, "--max-tokens", 8, "--temperature", 1.0, "--captions", 2]
    assert command(folder, *options) == 0
    first = texts(folder)
    assert set(first) == {"a.txt", "b.txt", "sub/c.txt"} and all(len(text.splitlines()) == 2 for text in first.values())
    assert "3 of 3 pictures have captions, 6 in all." in capsys.readouterr().out
    assert command(folder, *options, "--overwrite", "--seed", 1) == 0
    second = texts(folder)
    assert second != first
    assert command(folder, *options, "--overwrite") == 0 and texts(folder) == first


def test_the_model_sees_the_question_and_nothing_of_it_is_in_the_answer(model) -> None:
    found = vision.VisionModel(str(model), "cpu")
    pictures = [Image.new("RGB", (60, 90), "red"), Image.new("RGB", (90, 60), "blue")]
    short, long = "What?", "What is in this picture, and where is it?"
    together = found.answer(pictures, [short, long], 6, 0.0, "")
    assert together == [found.answer([picture], [text], 6, 0.0, "")[0] for picture, text in zip(pictures, (short, long))]
    assert not any(text in answer for answer in together for text in (short, long, "assistant"))
    assert found.answer(pictures, [short, long], 6, 5.0, "1") != found.answer(pictures, [short, long], 6, 5.0, "2")


def test_a_captioner_without_dialogue_does_not_repeat_the_question(tmp_path) -> None:
    found = vision.VisionModel(str(save_blip(tmp_path / "blip")), "cpu")
    pictures, questions = [Image.new("RGB", (60, 90), "red"), Image.new("RGB", (90, 60), "blue")], ["What?", "What is it that is there?"]
    answers = [found.answer(pictures, questions, 12, 1.0, str(seed)) for seed in range(3)]
    assert any(text for texts in answers for text in texts)
    assert not any(text.startswith(question.lower()) for texts in answers for text, question in zip(texts, questions))


@pytest.mark.parametrize("question, answer", [({}, "1 2"), ({"decoder_input_ids": [[1]]}, "2")])
def test_models_that_take_the_question_otherwise_are_heard(question, answer) -> None:
    import torch
    from transformers import BatchFeature

    class Silent:
        device, dtype = torch.device("cpu"), torch.float32

        def generate(self, flattened_patches: torch.Tensor, **_: object) -> torch.Tensor:
            return torch.tensor([[1, 2]])

    class Processor:
        def __call__(self, **_: object) -> BatchFeature:
            return BatchFeature({"flattened_patches": torch.zeros(1, 2, 3), **question}, tensor_type="pt")

        def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
            return [" ".join(map(str, row)) for row in ids.tolist()]

    model = vision.VisionModel.__new__(vision.VisionModel)
    model.model, model.processor = Silent(), Processor()
    assert model.answer([Image.new("RGB", (8, 8))], ["What?"], 4, 0.0, "") == [answer]


@pytest.mark.parametrize(
    "name, old, new",
    [("model.safetensors", None, b"cut off"), ("config.json", b'"num_attention_heads": 4', b'"num_attention_heads": "x"')],
)
def test_a_damaged_model_is_one_sentence(folder, model, tmp_path, capsys, name, old, new) -> None:
    shutil.copytree(model, tmp_path / "damaged")
    whole = (model / name).read_bytes()
    (tmp_path / "damaged" / name).write_bytes(whole.replace(old, new) if old else new)
    assert command(folder, "--model", tmp_path / "damaged") == 2
    assert "damaged can't be loaded (" in capsys.readouterr().err


def test_what_is_there_is_kept_and_without_anything_to_do_no_model_is_loaded(folder, asked, monkeypatch) -> None:
    (folder / "a.txt").write_text("mine\n", encoding="utf-8")
    assert command(folder, "--model", "x", "--batch-size", 2) == 0
    assert texts(folder)["a.txt"] == "mine\n" and [count for count, _ in asked] == [1, 1]
    monkeypatch.setattr(vision, "VisionModel", None)
    assert command(folder, "--model", "x", "--batch-size", 2) == 0
    assert command(folder, "--model", "y", "--to", ".txt") == 0


def test_overwriting_goes_on_where_it_stopped_and_begins_anew_when_it_was_done(folder, asked) -> None:
    for name in ("a", "b", "sub/c"):
        (folder / f"{name}.txt").write_text("mine", encoding="utf-8")
    options = ["--model", "x", "--overwrite", "--batch-size", 1]
    assert command(folder, *options) == 0
    assert len(asked) == 3 and "mine" not in texts(folder).values()
    for record in list((folder / FOLDER).rglob("*.json"))[:1]:
        record.unlink()  # as if the run had been killed before its last batch
    assert command(folder, *options) == 0 and len(asked) == 4
    assert command(folder, *options) == 0 and len(asked) == 7


def test_a_run_that_was_killed_after_it_noted_a_batch_writes_it_without_the_model(folder, asked, monkeypatch) -> None:
    assert command(folder, "--model", "x") == 0
    whole = texts(folder)
    (folder / "b.txt").unlink()
    (folder / "a.txt").write_text("corrected by hand", encoding="utf-8")
    monkeypatch.setattr(vision, "VisionModel", None)
    assert command(folder, "--model", "x") == 0
    assert texts(folder) == {**whole, "a.txt": "corrected by hand"}


def test_fields_of_metadata_are_filled_and_the_rest_of_it_stays(folder, asked) -> None:
    rows = [{"file_name": "b.jpg", "alt": "a boat", "licence": "CC0"}, {"file_name": "gone.png", "text": "kept"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert command(folder, "--model", "x", "--to", "text", "--alt-text", "alt", "--captions", 2) == 0
    found = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    size = "a picture of (80, 60), seed "
    assert found == [
        {**rows[0], "text": [size + "00", size + "01"]}, rows[1], {"file_name": "a.png", "text": [size + "00", size + "01"]},
        {"file_name": "sub/c.webp", "text": [size + "00", size + "01"]},
    ]  # fmt: skip
    assert {question for _, question in asked} == {ALONE, WITH_TEXT.replace("{alt}", "a boat")}
    assert not texts(folder)


def test_halves_of_characters_in_metadata_stay_and_end_nothing(folder, asked, capsys) -> None:
    line = '{"file_name": "a.png", "alt": "half \\ud83d", "licence": "\u00fc"}'
    (folder / "metadata.jsonl").write_text(line, encoding="utf-8")
    assert command(folder, "--model", "x", "--to", "text", "--alt-text", "alt") == 0
    found = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {**found[0], "text": ""} == {**json.loads(line), "text": ""} and all(row["text"] for row in found) and len(found) == 3
    assert WITH_TEXT.replace("{alt}", "half ?") in {question for _, question in asked}
    assert command(folder, "--report", "--to", "alt") == 0 and "1 of 3 pictures have captions" in capsys.readouterr().out


def test_a_picture_whose_name_is_as_long_as_can_be_is_captioned(folder, asked) -> None:
    name = "x" * 250
    (folder / "b.jpg").rename(folder / f"{name}.jpg")
    assert command(folder, "--model", "x") == 0 and set(texts(folder)) == {"a.txt", f"{name}.txt", "sub/c.txt"}


def test_the_file_of_fields_is_not_read_anew_for_each_batch(folder, asked, monkeypatch) -> None:
    reads, original = [], Field._read
    monkeypatch.setattr(Field, "_read", lambda self: reads.append(self) or original(self))
    assert command(folder, "--model", "x", "--to", "text", "--batch-size", 3) == 0
    at_once = len(reads)
    assert command(folder, "--model", "x", "--to", "other", "--batch-size", 1) == 0 and len(reads) == 2 * at_once


def test_a_prompt_of_ones_own(folder, asked) -> None:
    (folder / "a.alt").write_text("a boat\n", encoding="utf-8")
    assert command(folder, "--model", "x", "--prompt", "Is this {alt}?", "--alt-text", ".alt") == 0
    assert [question for _, question in asked] == ["Is this a boat?", "Is this ?", "Is this ?"]


def test_unreadable_pictures_are_named_and_the_others_captioned(folder, asked, capsys) -> None:
    (folder / "b.jpg").write_bytes(b"no picture")
    assert command(folder, "--model", "x") == 2
    shown = capsys.readouterr()
    assert "failed: b.jpg: it is not a JPEG" in shown.out and "1 of 3 pictures have no caption" in shown.err
    assert set(texts(folder)) == {"a.txt", "sub/c.txt"}


def test_a_preview_writes_its_sheet_and_nothing_else(folder, asked, tmp_path, capsys) -> None:
    before = sorted(folder.rglob("*"))
    assert command(folder, "--model", "x", "--preview", tmp_path / "new/sheet.png") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new/sheet.png'}\n" and sorted(folder.rglob("*")) == before
    with Image.open(tmp_path / "new/sheet.png") as sheet:
        assert sheet.height > 180 and np.asarray(sheet.convert("L"))[:, 300:].min() < 100  # there is text beside the pictures


def test_a_preview_that_can_not_be_written_or_would_be_captioned_is_refused_at_once(folder, asked, monkeypatch, capsys) -> None:
    assert command(folder, "--model", "x", "--preview", "sheet.xyz") == 2
    assert "--preview is sheet.xyz; expected a file that ends in .png, .jpg, .webp" in capsys.readouterr().err
    monkeypatch.chdir(folder)
    assert command(Path("."), "--model", "x", "--preview") == 2
    assert "caption-preview.png, which would become one of the pictures in .; choose a file outside" in capsys.readouterr().err
    assert not asked and not (folder / "caption-preview.png").exists()


def test_the_report_counts_tokens_cuts_and_duplicates(folder, capsys) -> None:
    (folder / "a.txt").write_text("a red circle\na red circle\n", encoding="utf-8")
    (folder / "b.txt").write_text(" ".join(["square"] * 400), encoding="utf-8")
    assert command(folder, "--report", "--text-encoder", DEMO["text_encoders"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 3 pictures have captions, 3 in all." in shown and "words: 3 to 400" in shown
    assert "cut: 33.3% at 120 (alpha), 33.3% at 300 (Sigma)" in shown
    assert "duplicates: 2 captions, 1 different. 2 times: a red circle" in shown
    assert command(folder, "--report") == 0
    assert "T5 tokens: not counted; give --tokenizer or --text-encoder." in capsys.readouterr().out


def test_clip_scores_are_cosines_of_its_own_embeddings(folder, tmp_path) -> None:
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from pixart.scale.caption_report import clip_scores

    clip_tokenizer(tmp_path / "clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    from transformers import AutoTokenizer

    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, AutoTokenizer.from_pretrained(tmp_path / "clip")).save_pretrained(tmp_path / "clip")
    (found,) = clip_scores(folder, {"a.png": ["a red circle"]}, str(tmp_path / "clip"), "cpu")
    model, processor = CLIPModel.from_pretrained(tmp_path / "clip").eval(), CLIPProcessor.from_pretrained(tmp_path / "clip")
    inputs = processor(text=["a red circle"], images=[Image.open(folder / "a.png")], return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    assert found == pytest.approx(100 * float(output.logits_per_image) / float(model.logit_scale.exp()), abs=1e-3)


def clip_tokenizer(folder: Path) -> None:
    """A few words under CLIP's own class."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder.mkdir()
    words = ["<|startoftext|>", "<|endoftext|>", "a", "red", "circle"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<|endoftext|>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    special = {"bos_token": words[0], "eos_token": words[1], "pad_token": words[1], "unk_token": words[1]}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=77, **special).save_pretrained(folder)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--captions", "2", "--temperature", "0"], "all would be the same at --temperature 0"),
        (["--alt-text", ".txt"], "--alt-text and --to are both .txt"),
        (["--prompt", "What is {alt}?"], "say where these texts are with --alt-text"),
        (["--batch-size", "0"], "--batch-size is 0; expected at least 1"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--to", ".png"], "'.png' is not the ending of a text file"),
        (["--to", "../.txt"], "'../.txt' is not the ending of a text file"),
        (["--to", "file_name"], "'file_name' can't hold captions"),
        (["--model", "absent/model"], "The model absent/model can't be loaded"),
        (["--tokenizer", "absent"], "absent: no tokenizer.json"),
    ],
)
def test_what_can_not_be_is_said(folder, capsys, options, message, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment is read at import
    assert command(folder, *options) == 2
    assert message in capsys.readouterr().err and not texts(folder)


def test_folders_that_can_not_be_captioned(tmp_path, folder, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert command(tmp_path / "empty") == 2 and "holds no picture; expected files that end in .jpg" in capsys.readouterr().err
    Path(os.fsdecode(os.fsencode(tmp_path / "empty") + b"/caf\xe9.png")).touch()
    assert command(tmp_path / "empty") == 2 and "have names that are not UTF-8, such as b'caf\\xe9.png'; rename" in capsys.readouterr().err
    assert command(tmp_path / "absent") == 2 and "is not a folder; expected one with pictures" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(folder / "a.webp")
    with pytest.raises(InputError, match="Several pictures of one name share .*a.txt"):
        CaptionStage(folder, CaptionSettings("x"), picture_names(folder))
    (folder / "metadata.csv").touch()
    with pytest.raises(InputError, match="has a metadata.csv"):
        texts_at(folder, "text")
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text('{"text": "no name"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="metadata.jsonl, line 1: expected an object with a file_name"):
        Field(folder, "text")


def test_the_front_page_names_the_usual_model_and_a_small_one() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert MODEL in page and SMALL_MODEL in page


def test_texts_are_read_as_they_lie(folder) -> None:
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf one \r\n\n two\xff\n")
    assert TextFiles(folder, ".txt").get("a.png") == ("one", "two\ufffd") and TextFiles(folder, ".txt").get("b.jpg") == ()

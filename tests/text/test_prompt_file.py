"""Prompt files: what is written comes back, anything else is refused by name; many at once, and again."""
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from pixart import cli, load_text_encoder
from pixart.errors import InputError
from pixart.text.batch import encode_file
from pixart.text.embeddings import TextEmbeddings
from pixart.text.prompt_file import load_prompts, save_prompts
from tests.support.tiny_text import save_t5_file, save_t5_folder, tiny_t5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_t5_folder(tiny_t5(), tmp_path_factory.mktemp("t5") / "t5")


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back(tmp_path, encoder, dtype):
    found = encoder.encode(["red circle above", "a"], 3).to("cpu", dtype)
    given = TextEmbeddings(found.states, found.mask, found.token_counts, found.truncated, size=(512, 768))
    path = save_prompts(tmp_path / "new" / "p.safetensors", given, ("Red circle above", "ä \u753b"), encoder.fingerprint, max_tokens=3)
    back = load_prompts(path, width=32)
    assert torch.equal(back.embeddings.states, given.states) and back.embeddings.states.dtype == dtype
    assert torch.equal(back.embeddings.mask, given.mask) and back.embeddings.mask.dtype == torch.bool
    assert back.embeddings.token_counts == (4, 2) and back.embeddings.truncated == ("above", "")
    assert back.embeddings.size == (512, 768) and back.embeddings.source == str(path)
    assert back.prompts == ("Red circle above", "ä \u753b") and back.encoder == encoder.fingerprint and back.settings == {"max_tokens": 3}
    assert [file.name for file in path.parent.iterdir()] == ["p.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_others_may_read_it_as_the_umask_says(tmp_path):
    """As pictures: a container or a share has other users too. Nothing else is left in the folder."""
    given = TextEmbeddings(torch.zeros(1, 2, 4), torch.ones(1, 2) > 0)
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            path = save_prompts(tmp_path / f"{mode:o}.safetensors", given)
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode
    assert len(list(tmp_path.iterdir())) == 2


def test_fingerprint_names_weights_and_precision(folder, tmp_path, encoder):
    assert encoder.fingerprint.startswith("t5-32x2-") and encoder.fingerprint.endswith("-float32")
    stem = encoder.fingerprint.rsplit("-", 1)[0]
    assert load_text_encoder(folder, dtype=torch.bfloat16).fingerprint == f"{stem}-bfloat16"
    assert load_text_encoder(folder, precision="fp8_e4m3fn").fingerprint == f"{stem}-fp8_e4m3fn"
    other = load_text_encoder(save_t5_file(tiny_t5(seed=1), tmp_path / "other.safetensors"))
    assert other.fingerprint.rsplit("-", 1)[0] != stem


def written(tmp_path, tensors=None, **metadata):
    states = torch.randn(1, 4, 32)
    given = {"prompt_embeds": states, "prompt_attention_mask": torch.ones(1, 4, dtype=torch.uint8)} if tensors is None else tensors
    path = tmp_path / "p.safetensors"
    save_file(given, path, {"pixart_prompt": "1", "encoder": "t5-32x2", **metadata})
    return path


def test_another_width_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"p.safetensors was made by an encoder 32 wide \(t5-32x2\).* 4096 wide"):
        load_prompts(written(tmp_path), width=4096)


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({"weight": torch.zeros(2)}, {}, "expected a prompt file.*found format 1 and weight"),
        (None, {"pixart_prompt": "2"}, "found format 2"),
        (None, {"size": "[0, 5]"}, r"picture size is \[0, 5\]"),
        ({"prompt_embeds": torch.zeros(1, 4, 32), "prompt_attention_mask": torch.ones(1, 5)}, {}, r"mask \(1, 5\) .*don't fit"),
        ({"prompt_embeds": torch.ones(2, 2, 8), "prompt_attention_mask": torch.tensor([[1, 1], [0, 0]])}, {}, "a token for every prompt"),
        ({"prompt_embeds": torch.ones(1, 2, 8).to(torch.float8_e4m3fn), "prompt_attention_mask": torch.ones(1, 2)}, {}, "expected fp32"),
        ({"prompt_embeds": torch.zeros(4, 32), "prompt_attention_mask": torch.ones(4)}, {}, "don't fit"),
        ({"prompt_embeds": torch.full((1, 2, 8), torch.nan), "prompt_attention_mask": torch.ones(1, 2)}, {}, "NaN"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, tensors, metadata, message):
    with pytest.raises(InputError, match=f"p.safetensors.*{message}"):
        load_prompts(written(tmp_path, tensors, **metadata))


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    given = TextEmbeddings(torch.ones(1, 2, 8), torch.ones(1, 2, dtype=torch.bool))
    path = save_prompts(tmp_path / "p.safetensors", given)
    before = path.read_bytes()

    def full(tensors, name, metadata):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("pixart.text.prompt_file.save_file", full)
    with pytest.raises(OSError, match="p.safetensors can't be written .*No space"):
        save_prompts(path, given)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_damaged_and_absent(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="p.safetensors is not a prompt file, or is damaged"):
        load_prompts(path)
    with pytest.raises(InputError, match="no such prompt file"):
        load_prompts(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 1234\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Access denied</body></html>", "web page"),
        (b"GGUF" + bytes(100), "GGUF file.*expected a prompt file, as PixArtSavePrompt"),
        (b"\x93NUMPY" + bytes(100), "NumPy array; here expected a prompt file"),
        (b"", "the file is empty"),
    ],
)
@pytest.mark.parametrize("name", ["p.safetensors", "p.pt"])
def test_what_is_no_prompt_file_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: .*{said}") as caught:
        load_prompts(tmp_path / name)
    assert "header" not in str(caught.value)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_is_named_and_never_opened(tmp_path, monkeypatch, new):
    path = tmp_path / "p.safetensors"
    given = {"prompt_embeds": torch.zeros(1, 3, 32), "prompt_attention_mask": torch.ones(1, 3)}
    torch.save(given, path, _use_new_zipfile_serialization=new)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(InputError, match="p.safetensors: this is a PyTorch file, which was not opened; here expected a prompt file"):
        load_prompts(path)


def test_its_content_counts_and_not_its_name(tmp_path):
    path = written(tmp_path).rename(tmp_path / "p.pt")
    assert load_prompts(path, 32).encoder == "t5-32x2"


def test_a_lack_of_memory_is_no_damage(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    path = written(tmp_path)
    monkeypatch.setattr("pixart.text.prompt_file.safe_open", fail)
    with pytest.raises(InputError, match="p.safetensors: there is not enough memory.*not at fault"):
        load_prompts(path)


def test_strange_metadata_is_passed_over(tmp_path):
    found = load_prompts(written(tmp_path, prompts="{", token_counts='["a"]', settings="[]"))
    assert found.prompts == () and found.embeddings.token_counts == () and found.settings == {}


LINES = ["A red circle above a blue square", "", "star", "  green  ", "purple ring below"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


def test_a_file_of_prompts(tmp_path, prompts, encoder):
    seen = []
    paths = encode_file(prompts, tmp_path / "out", encoder, batch_size=2, progress=lambda *figures: seen.append(figures))
    assert [path.name for path in paths] == ["00001.safetensors", "00003.safetensors", "00004.safetensors", "00005.safetensors"]
    assert seen == [(0, 4), (2, 4), (4, 4)]
    for path, text in zip(paths, (line for line in LINES if line)):
        found = load_prompts(path, 32)
        expected = encoder.encode([text.lower().strip()])
        assert found.prompts == (text.strip(),) and found.embeddings.states.shape == expected.states.shape
        torch.testing.assert_close(found.embeddings.states, expected.states, rtol=1e-4, atol=1e-5)
        assert found.embeddings.mask.all()


def test_goes_on_where_it_stopped(tmp_path, prompts, encoder, monkeypatch):
    calls = []
    original = type(encoder).encode

    def counted(self, texts, limit):
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, texts, limit)

    monkeypatch.setattr(type(encoder), "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        encode_file(prompts, tmp_path / "out", encoder, batch_size=3)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert len(kept) == 3
    paths = encode_file(prompts, tmp_path / "out", encoder, batch_size=3)
    assert calls == [3, 1, 1] and all(load_prompts(path) for path in paths)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in kept.items())
    paths[0].write_bytes(b"junk")
    prompts.write_text(prompts.read_text().replace("star", "a star"))
    encode_file(prompts, tmp_path / "out", encoder)
    assert calls == [3, 1, 1, 2] and load_prompts(paths[1]).prompts == ("a star",)
    encode_file(prompts, tmp_path / "out", encoder, max_tokens=2)
    assert calls[-1] == 4 and load_prompts(paths[0]).embeddings.states.shape[1] == 2


@pytest.mark.parametrize("content, message", [(b"", "holds no prompt"), (b"\n \n", "holds no prompt"), (b"\xff\xfe\xfa", "UTF-8")])
def test_files_without_prompts(tmp_path, encoder, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"p.txt.*{message}"):
        encode_file(tmp_path / "p.txt", tmp_path / "out", encoder)


def test_command_line(tmp_path, prompts, folder, capsys):
    command = ["encode", str(prompts), str(tmp_path / "out"), "--text-encoder", str(folder), "--device", "cpu", "--precision", "fp8_e4m3fn"]
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "out" / f"0000{n}.safetensors") for n in (1, 3, 4, 5)] and "4/4 prompts" in said.err
    with safe_open(str(tmp_path / "out" / "00003.safetensors"), "pt") as file:
        assert json.loads(file.metadata()["prompts"]) == ["star"] and file.metadata()["encoder"].endswith("fp8_e4m3fn")
    assert set(load_file(tmp_path / "out" / "00003.safetensors")) == {"prompt_embeds", "prompt_attention_mask"}
    assert cli.main([*command, "--batch-size", "0"]) == 2 and "batch_size is 0" in capsys.readouterr().err

"""Files under any name: their content decides, what is foreign is named, and a lack of memory is no damage."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save, save_file

from pixart.adapters import load_adapter
from pixart.checkpoints import content, load_transformer
from pixart.checkpoints.controlnet import load_controlnet
from pixart.checkpoints.read import read_tensors
from pixart.errors import PixArtError
from pixart.text.prompt_file import load_prompts
from pixart.vae import load_vae
from tests.support.checkpoint_factory import tiny_weights

LOADERS: dict[str, Callable[[Path], object]] = {
    "transformer": load_transformer, "VAE": lambda path: load_vae(path, 0.13025), "LoRA": load_adapter, "ControlNet": load_controlnet,
}  # fmt: skip


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as made:
            made.addfile(tarfile.TarInfo("model.safetensors"))
    elif kind == "npz":
        np.savez(file, weight=np.zeros(3))
    else:
        with zipfile.ZipFile(file, "w") as made:
            made.writestr("model.safetensors", "x")
    return file.getvalue()


FOREIGN = {
    "GGUF": (b"GGUF\x03" + bytes(300), "GGUF file"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9\n", "Git LFS pointer"),
    "page": (b"\n  <!doctype html><html><body>Please log in</body></html>", "web page"),
    "XML": (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "JSON": (b'{"error":"Repository not found"}', "JSON text"),
    "text": (b"Entry not found, is it spelled right?", "text file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG picture"),
    "WebP": (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(100), "WebP"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x05" + bytes(100), "ONNX"),
    "TensorRT": (b"ftrt" + bytes(100), "TensorRT"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(100), "7-Zip"),
    "rar": (b"Rar!\x1a\x07\0" + bytes(100), "RAR"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "gzip"),
    "tar": (archive("tar"), "tar archive"),
    "zip": (archive("zip"), "zip archive (model.safetensors)"),
    "npz": (archive("npz"), "NumPy archive"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_foreign_content_is_named_by_every_loader(tmp_path: Path, name: str, suffix: str) -> None:
    given, said = FOREIGN[name]
    (path := tmp_path / f"file{suffix}").write_bytes(given)
    for kind, load in {**LOADERS, "prompt": load_prompts}.items():
        with pytest.raises(PixArtError) as caught:
            load(path)
        message = str(caught.value).replace(str(path), "")
        assert said in message and "header" not in message, (kind, message)


@pytest.mark.parametrize("name", ["m.pth", "m.PTH", "m.bin", "m.ckpt", "m", "m.weights.safetensors.bak"])
def test_safetensors_under_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(save(tiny_weights()[2]))
    assert load_transformer(tmp_path / name).config.depth == 2


@pytest.mark.parametrize("name", ["m.safetensors", "m.SAFETENSORS", "m.sft", "m"])
@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_under_any_name(tmp_path: Path, name: str, new: bool) -> None:
    torch.save({"state_dict": tiny_weights()[2]}, tmp_path / name, _use_new_zipfile_serialization=new)
    assert load_transformer(tmp_path / name).config.depth == 2


@pytest.mark.parametrize("suffix", [".crdownload", ".part", ".incomplete"])
def test_an_unfinished_download_is_told(tmp_path: Path, suffix: str) -> None:
    (path := tmp_path / f"m.safetensors{suffix}").write_bytes(save(tiny_weights()[2]))
    with pytest.raises(PixArtError, match="download isn't finished"):
        load_transformer(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    save_file(tiny_weights()[2], path := tmp_path / "m.safetensors")
    path.chmod(0)
    with pytest.raises(PixArtError, match="may not be read.*permissions"):
        load_transformer(path)


NO_MEMORY = {
    "errno": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "safetensors": safetensors.SafetensorError("Error while mmapping: Cannot allocate memory (os error 12)"),
    "torch": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "torch on Windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    "mmap": RuntimeError("unable to mmap 9522861 bytes from file <t5.safetensors>: Cannot allocate memory (12)"),
    "Windows": OSError(0, "The paging file is too small for this operation to complete. (os error 1455)"),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("name", NO_MEMORY)
def test_a_lack_of_memory_is_no_damage(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NO_MEMORY[name]

    save_file(tiny_weights()[2], safe := tmp_path / "m.safetensors")
    torch.save(tiny_weights()[2], pickled := tmp_path / "m.pth")
    monkeypatch.setattr("pixart.checkpoints.read.safe_open", fail)
    monkeypatch.setattr(torch, "load", fail)
    for load in LOADERS.values():
        for path in (safe, pickled):
            with pytest.raises(PixArtError, match="not enough memory.*not at fault") as caught:
                load(path)
            assert "download" not in str(caught.value)


def test_real_damage_is_still_called_so() -> None:
    assert not content.is_out_of_memory(OSError(errno.EIO, "Input/output error"))
    assert "download it again" in str(content.reading_error(Path("x"), ValueError("bad"), damage="damaged"))


@pytest.mark.parametrize("library", ["torchao.dtypes.AffineQuantizedTensor", "optimum.quanto.tensor.QTensor"])
def test_pickled_objects_of_quantizers_are_named(library: str) -> None:
    from pixart.checkpoints.read import _unsafe

    assert library.split(".")[0] in _unsafe(Path("m.pth"), library) and "unquantized" in _unsafe(Path("m.pth"), library)


def test_no_message_advises_to_load_unsafely() -> None:
    sources = [path for folder in ("pixart", "nodes") for path in (Path(content.__file__).parents[2] / folder).rglob("*.py")]
    assert not [path for path in sources if "weights_only=False" in path.read_text(encoding="utf-8")]
    assert not [path for path in sources if "if you trust" in path.read_text(encoding="utf-8")]


QUANTIZED = {
    "optimum-quanto": ("{}.weight._data", "{}.weight._scale"),
    "bitsandbytes": ("{}.weight.absmax", "{}.weight.quant_state.bitsandbytes__nf4"),
    "nunchaku": ("{}.qweight", "{}.wscales"),
    "GPTQ": ("{}.qweight", "{}.g_idx"),
    "AWQ": ("{}.qweight", "{}.qzeros"),
    "torchao": ("{}.weight_qdata", "{}.weight_scale"),
    "HQQ": ("{}.W_q", "{}.meta"),
}


@pytest.mark.parametrize("library", QUANTIZED)
def test_packed_weights_are_named_by_their_library(tmp_path: Path, library: str) -> None:
    weights = {}
    for key, value in tiny_weights()[1].items():
        if key.endswith(".weight") and value.ndim == 2 and key.startswith("transformer_blocks"):
            weights |= {pattern.format(key.removesuffix(".weight")): torch.zeros(4, dtype=torch.int8) for pattern in QUANTIZED[library]}
        else:
            weights[key] = value
    save_file(weights, tmp_path / "m.safetensors")
    with pytest.raises(PixArtError, match=f"quantized by {library}.*unquantized weights"):
        load_transformer(tmp_path / "m.safetensors")


def test_a_folder_and_an_index_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(PixArtError, match="1 of 1 shards are missing: gone.safetensors"):
        read_tensors(tmp_path)

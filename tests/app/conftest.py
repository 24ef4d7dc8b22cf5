"""One page for all tests in this folder."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.demo import DEMO
from tests.support.page import Server, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page with the demo model, its pictures in a folder of their own."""
    pytest.importorskip("gradio")
    if not DEMO["vae"].is_file():
        pytest.skip("the demo model is not in this checkout")
    with running(tmp_path_factory.mktemp("page")) as page:
        yield page

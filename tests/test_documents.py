"""README and the pages it leads to: short enough to read, and every link leads somewhere."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in ROOT.glob("[a-z]*/README.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_front_page_is_read_in_one_go() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_front_page_names_every_workflow_and_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.stem for path in (ROOT / "workflows").glob("*.json") if not re.search(rf"\b{path.stem}\b", text)] == []
    assert [page for page in PAGES[1:] if f"{page.parent.name}/README.md" not in text] == []

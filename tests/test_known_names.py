"""tests.support.known_names: what -k leaves out unread, and what it never does."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.known_names import words_of

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = ["pytester"]
BOOM = "raise RuntimeError('was imported')\n"


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """Two files whose names are known: a test for apples in one, with a computed id in the other."""
    pytester.makeconftest((ROOT / "tests/conftest.py").read_text(encoding="utf-8"))
    pytester.syspathinsert(ROOT)
    pytester.makepyfile(
        test_a="def test_apple(): pass", test_b="import pytest\n@pytest.mark.parametrize('n', ['pe' + 'ar'])\ndef test_it(n): pass"
    )
    pytester.runpytest("--collect-only").assert_outcomes()
    return pytester


def break_unseen(suite: pytest.Pytester, name: str) -> None:
    """An error on import, without a new time."""
    path = suite.path / name
    time = path.stat().st_mtime_ns
    path.write_text(BOOM, encoding="utf-8")
    os.utime(path, ns=(time, time))


def test_a_file_without_such_a_name_is_not_imported(suite: pytest.Pytester) -> None:
    break_unseen(suite, "test_a.py")
    suite.runpytest("-k", "pear").assert_outcomes(passed=1)
    suite.runpytest("-k", "pear or apple").assert_outcomes(errors=1)
    suite.runpytest("-k", "not apple").assert_outcomes(errors=1)
    suite.runpytest("-k", "of no test").assert_outcomes(errors=1)
    suite.runpytest().assert_outcomes(errors=1)


def test_a_changed_or_new_file_is_imported(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_c="def test_new_pear(): pass")
    (suite.path / "test_a.py").write_text("def test_pear_too(): pass", encoding="utf-8")
    os.utime(suite.path / "test_a.py", ns=(1, 1))
    suite.runpytest("-k", "pear").assert_outcomes(passed=3)


def test_one_test_by_its_address_does_not_shorten_what_is_known(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_d="def test_one(): pass\ndef test_two(): pass")
    suite.runpytest("test_d.py").assert_outcomes(passed=2)
    suite.runpytest("test_d.py::test_one").assert_outcomes(passed=1)
    suite.runpytest("-k", "two").assert_outcomes(passed=1)


@pytest.mark.parametrize("text, words", [("a", {"a"}), ("(A or b) and c", {"a", "b", "c"}), ("not a", set()), ("", set())])
def test_words(text: str, words: set[str]) -> None:
    assert words_of(text) == words

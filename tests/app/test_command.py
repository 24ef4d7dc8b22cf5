"""`python -m pixart app`: who can reach the page is said, and what can't be done is one line."""
from __future__ import annotations

import os
import socket
import sys

import pytest

pytest.importorskip("gradio")
from pixart import cli
from pixart.app.server import Address, check_free, prepare, warning


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What `prepare` sets is for its process alone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_loopback_is_the_default_and_says_nothing():
    given = cli.make_parser().parse_args(["app"])
    address = Address(given.host, given.port, given.share == "yes")
    assert address == Address() and address.is_loopback and warning("x", address) == ""
    assert Address("localhost").is_loopback and Address("::1").is_loopback and Address("127.1.2.3").is_loopback


@pytest.mark.parametrize("address", [Address("0.0.0.0"), Address("::"), Address("192.168.1.5"), Address("my.host"), Address(share=True)])
def test_beyond_loopback_a_sentence_says_who_sees_what(address, tmp_path):
    said = warning(tmp_path, address)
    assert "Open to more than this machine" in said and str(tmp_path) in said and "no password" in said and said.count("\n") == 1


def test_nothing_is_asked_of_other_machines(tmp_path):
    prepare(tmp_path / "out")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and os.environ["GRADIO_ALLOWED_PATHS"] == ""
    assert os.environ["GRADIO_TEMP_DIR"].startswith(str(tmp_path / "out"))


def run(capsys, *options):
    code = cli.main(["app", *map(str, options)])
    return code, capsys.readouterr().err


def test_a_port_in_use_is_one_line(tmp_path, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code, said = run(capsys, "--output", tmp_path, "--port", other.getsockname()[1])
        assert code == 2 and "choose others with --host and --port" in said and said.count("\n") == 1
    code, said = run(capsys, "--output", tmp_path, "--port", 70000)
    assert code == 2 and "expected 1 to 65535" in said
    assert run(capsys, "--output", tmp_path, "--host", "no.such.host.invalid")[0] == 2


def test_port_0_is_any_that_is_free():
    found = check_free(Address(port=0))
    assert found.host == "127.0.0.1" and found.port > 0 and check_free(found) == found


def test_what_can_not_be_done_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    code, said = run(capsys, "--output", tmp_path / "file")
    assert code == 2 and f"--output is {tmp_path / 'file'}, where no files can be written" in said and said.count("\n") == 1
    code, said = run(capsys, "--output", tmp_path / "out", "--transformer", tmp_path / "absent.pth")
    assert code == 2 and "--text-encoder is needed" in said
    code, said = run(capsys, "--output", tmp_path / "out", "--device", "nonsense")
    assert code == 2 and "--device is 'nonsense'" in said


def test_without_gradio_the_remedy_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, said = run(capsys, "--output", tmp_path)
    assert code == 2 and 'pip install ".[pipeline,app]"' in said and said.count("\n") == 1

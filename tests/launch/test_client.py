"""The queue client and the graphs it sends, without a host."""

from __future__ import annotations

import json

import pytest

from launch import graph
from launch.client import ComfyClient, QueueError, _Events
from launch.errors import LaunchError


def test_a_setting_whose_node_is_gone_is_an_error() -> None:
    with pytest.raises(LaunchError, match="0 nodes titled 'Prompt'"):
        graph.configure({}, {"prompt": "x"})


def test_a_failed_node_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = {"node_type": "PixArtModelLoader", "node_id": "1", "exception_message": "file x: found y\n"}
    entry = {"status": {"status_str": "error", "messages": [["execution_error", failure]]}}
    client = ComfyClient("http://127.0.0.1:9")
    monkeypatch.setattr(client, "get_json", lambda path: {"p": entry})
    with pytest.raises(QueueError, match=r"PixArtModelLoader \(node 1\): file x: found y$"):
        client.wait("p")


class Played:
    """A host's messages in batches, each read once; what is done between them is logged beside."""

    def __init__(self, *batches: list[dict], log: list[str]) -> None:
        self.batches, self.log = list(batches), log

    def __enter__(self) -> Played:
        self.log.append("listens")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, seconds: float) -> list[dict]:
        return self.batches.pop(0) if self.batches else []


def step(done: int, prompt: str = "p") -> dict:
    return {"type": "progress", "data": {"prompt_id": prompt, "node": "3", "value": done, "max": 2}}


def saved(name: str, kind: str) -> dict:
    output = {"images": [{"filename": name, "subfolder": "", "type": kind}]}
    return {"type": "executed", "data": {"prompt_id": "p", "node": "9", "output": output}}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> tuple[ComfyClient, list[str]]:
    """A client whose host shows two steps, a preview and a picture, and answers its history as long as it is asked."""
    log: list[str] = []
    client = ComfyClient("http://127.0.0.1:9")
    text = {"type": "executed", "data": {"prompt_id": "p", "node": "4", "output": {"text": ["12 tokens"]}}}
    broadcast = {"type": "of another pack", "data": None}
    batches = [step(1), broadcast, step(2, "of another")], [text, step(2)], [saved("preview.png", "temp")], [saved("a.png", "output")]
    done = {"status": {"status_str": "success"}, "outputs": {"9": saved("a.png", "output")["data"]["output"]}}

    def history(path: str) -> dict:
        log.append("asks")
        return {} if events.batches else {"p": done}

    events = Played(*batches, [{"type": "execution_success", "data": {"prompt_id": "p"}}], log=log)
    monkeypatch.setattr("launch.client._Events", lambda url, name: events)
    monkeypatch.setattr(client, "get_json", history)
    monkeypatch.setattr(client, "queue", lambda *given: log.append("queues") or "p")
    return client, log


def test_a_saved_picture_is_known_before_the_host_has_ended_the_run(played: tuple[ComfyClient, list[str]]) -> None:
    client, log = played
    steps: list[tuple[str, int, int]] = []
    assert client.save({}, on_progress=lambda *step: steps.append(step))["filename"] == "a.png"
    assert log == ["listens", "queues", "asks"]  # it listens first: few steps are over soon
    assert steps == [("3", 1, 2), ("3", 2, 2)]


def test_the_history_is_asked_at_the_end_and_not_after_every_step(played: tuple[ComfyClient, list[str]]) -> None:
    client, log = played
    assert list(client.run({})) == ["9"]
    assert log == ["listens", "queues", "asks", "asks"]


def test_a_graph_that_saves_nothing_is_an_error(played: tuple[ComfyClient, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = played
    monkeypatch.setattr(client, "get_json", lambda path: {"p": {"status": {"status_str": "success"}, "outputs": {}}})
    with pytest.raises(LaunchError, match="saves no picture"):
        client.save({})


def frame(kind: int, body: bytes) -> bytes:
    """An unmasked websocket frame, as a server sends it (RFC 6455)."""
    if len(body) < 126:
        size = bytes([len(body)])
    else:
        size = b"\x7e" + len(body).to_bytes(2, "big") if len(body) < 65536 else b"\x7f" + len(body).to_bytes(8, "big")
    return bytes([0x80 | kind]) + size + body


def test_websocket_frames_split_anywhere_are_read_once_each() -> None:
    long, huge = {"type": "a", "data": "x" * 300}, {"type": "b", "data": "y" * 70000}
    stream = frame(1, json.dumps(long).encode()) + frame(2, b"preview") + frame(9, b"") + frame(1, json.dumps(huge).encode())
    for cut in (1, 3, 150, 310, 320, len(stream) - 1):
        events = _Events("http://127.0.0.1:9", "id")
        events._buffer = stream[:cut]
        found = list(events._messages())
        events._buffer += stream[cut:]
        found += list(events._messages())
        assert found == [long, huge]

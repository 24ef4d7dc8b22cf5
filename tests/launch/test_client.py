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

"""ComfyUI's queue over HTTP, with progress read from its websocket."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .errors import LaunchError

Graph = dict[str, dict[str, Any]]
OnProgress = Callable[[str, int, int], None]


class QueueError(LaunchError):
    """The host refused a graph or a node of it failed; `details` is the host's own report, `status` HTTP's if it refused."""

    def __init__(self, message: str, details: Mapping[str, Any], status: int = 0) -> None:
        super().__init__(message)
        self.details, self.status = dict(details), status


class ComfyClient:
    """One client of the host at `url` (http://127.0.0.1:port)."""

    def __init__(self, url: str, timeout: float = 60) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.id = uuid.uuid4().hex

    def get(self, path: str, **query: str | int) -> bytes:
        """Body of GET `path`."""
        tail = "?" + urllib.parse.urlencode(query) if query else ""
        with _opener.open(f"{self.url}{path}{tail}", timeout=self.timeout) as answer:
            return answer.read()

    def get_json(self, path: str, **query: str | int) -> Any:
        """Parsed body of GET `path`."""
        return json.loads(self.get(path, **query))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Parsed body of POST `path`, None when it is empty."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with _opener.open(request, timeout=self.timeout) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def queue(self, graph: Graph, workflow: Mapping[str, Any] | None = None) -> str:
        """Queue an API graph and return its prompt id; `workflow` (UI format) goes into the picture."""
        body: dict[str, Any] = {"prompt": graph, "client_id": self.id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        try:
            return self.post("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            report = _report(error)
            raise QueueError("ComfyUI refused the graph: " + _refusal(report), report, error.code) from None

    def wait(self, prompt_id: str, timeout: float = 600, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """The history entry of a prompt once it is done; raises QueueError with the node's message if it failed."""
        with _Events(self.url, self.id) as events:
            return self._wait(events, prompt_id, timeout, on_progress)

    def run(self, graph: Graph, timeout: float = 600, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Queue and wait: the outputs, as node id -> what the node showed."""
        with _Events(self.url, self.id) as events:  # before the graph is queued: few steps are over soon
            return self._wait(events, self.queue(graph), timeout, on_progress)["outputs"]

    def save(
        self, graph: Graph, workflow: Mapping[str, Any] | None = None, timeout: float = 600, on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """Queue and wait for the first saved picture: its entry, at once when its node is done.

        The whole run ends a quarter of a second later, since the host collects garbage after its first one and answers nothing then.
        What a node after that one does, and whether it fails, isn't waited for.
        """
        with _Events(self.url, self.id) as events:
            entry = self._wait(events, self.queue(graph, workflow), timeout, on_progress, until_saved=True)
        pictures = _saved(entry["outputs"].values())
        if not pictures:
            raise LaunchError("the graph saves no picture; expected a SaveImage node in it")
        return pictures[0]

    def _wait(
        self, events: _Events, prompt_id: str, timeout: float, on_progress: OnProgress | None, until_saved: bool = False
    ) -> dict[str, Any]:
        """As `wait`; with `until_saved` it ends at the first saved picture, and of the entry there are only that node's outputs."""
        deadline = time.monotonic() + timeout
        next_look = 0.0  # in the history: a request takes time from the host, so not after every step
        while time.monotonic() < deadline:
            if time.monotonic() >= next_look:
                entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
                if entry is not None and entry.get("status", {}).get("status_str"):
                    return _checked(entry)
                next_look = time.monotonic() + 5
            messages = [message for message in events.read(0.5) if isinstance(message.get("data"), dict)]
            if not messages or any(message.get("type") in _LAST for message in messages):
                next_look = 0.0
            for kind, data in ((message.get("type"), message["data"]) for message in messages):
                if data.get("prompt_id", prompt_id) != prompt_id:
                    continue
                if on_progress and kind == "progress":
                    on_progress(str(data.get("node")), int(data["value"]), int(data["max"]))
                if until_saved and kind == "executed" and _saved([data.get("output") or {}]):
                    return {"outputs": {str(data.get("node")): data["output"]}}
        raise LaunchError(f"prompt {prompt_id} did not finish within {timeout:.0f} s")

    def image(self, entry: Mapping[str, Any]) -> bytes:
        """The file behind one entry of a node's `images` output."""
        return self.get("/view", filename=entry["filename"], subfolder=entry["subfolder"], type=entry["type"])


# Kinds of messages that may be the last of a run
_LAST = {"executing", "execution_success", "execution_error", "execution_interrupted"}

# The host is on this machine: a proxy from the environment must not see the request
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _saved(outputs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries of pictures in the host's output folder, among what nodes showed."""
    return [image for shown in outputs for image in shown.get("images", []) if image.get("type") == "output"]


def _report(error: urllib.error.HTTPError) -> dict[str, Any]:
    """What the host says about a graph it refused; a crash of its own, or of another pack in it, is plain text."""
    text = error.read().decode(errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return {"error": {"message": f"HTTP status {error.code}, {text.strip()[:200] or error.reason}"}}


def _refusal(report: Mapping[str, Any]) -> str:
    """The host's validation report in one line."""
    parts = [str(report.get("error", {}).get("message", "no reason given"))]
    for number, node in report.get("node_errors", {}).items():
        for problem in node.get("errors", []):
            parts.append(f"node {number} ({node.get('class_type')}): {problem.get('message')}: {problem.get('details')}")
    return "; ".join(parts)


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """`entry` if its run succeeded, else QueueError."""
    if entry["status"]["status_str"] == "success":
        return entry
    for kind, data in entry["status"].get("messages", []):
        if kind == "execution_error":
            text = f"{data['node_type']} (node {data['node_id']}): {data['exception_message'].strip()}"
            raise QueueError(text, data)
        if kind == "execution_interrupted":
            raise QueueError("the run was interrupted", data)
    raise QueueError("the run failed", entry["status"])


class _Events:
    """The host's websocket, read-only; without a connection it just waits, and the caller polls."""

    def __init__(self, url: str, client_id: str) -> None:
        address = urllib.parse.urlsplit(url)
        self._host, self._port, self._client_id = address.hostname, address.port or 80, client_id
        self._socket: socket.socket | None = None
        self._buffer = b""

    def __enter__(self) -> _Events:
        try:
            self._socket = socket.create_connection((self._host, self._port), timeout=10)
            key = base64.b64encode(os.urandom(16)).decode()
            self._socket.sendall(
                f"GET /ws?clientId={self._client_id} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nUpgrade: websocket\r\n"
                f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            while b"\r\n\r\n" not in self._buffer:
                self._receive()
            self._buffer = self._buffer.split(b"\r\n\r\n", 1)[1]
        except OSError:
            self._close()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, seconds: float) -> Iterator[dict[str, Any]]:
        """JSON messages that arrive within `seconds`; returns after the first batch."""
        if self._socket is None:
            time.sleep(seconds)
            return
        self._socket.settimeout(seconds)
        try:
            self._receive()
        except TimeoutError:
            return
        except OSError:
            self._close()
            return
        yield from self._messages()

    def _receive(self) -> None:
        data = self._socket.recv(65536) if self._socket else b""
        if not data:
            raise ConnectionError("closed by the host")
        self._buffer += data

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Whole frames in the buffer (RFC 6455, section 5.2); binary previews and pings are skipped."""
        while len(self._buffer) >= 2:
            kind, size, start = self._buffer[0] & 15, self._buffer[1] & 127, 2
            if size >= 126:
                width, code = (2, ">H") if size == 126 else (8, ">Q")
                start += width
                if len(self._buffer) < start:
                    return
                size = struct.unpack(code, self._buffer[2:start])[0]
            if len(self._buffer) < start + size:
                return
            body, self._buffer = self._buffer[start : start + size], self._buffer[start + size :]
            if kind == 1:
                yield json.loads(body)

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None

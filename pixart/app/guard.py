"""What stands before Gradio's routes: only those that the page needs, only files of the output folder, nothing from elsewhere."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

API = "/gradio_api"
FILE = f"{API}/file="
SERVED = ".png"
HEALTH = "/health"
# Gradio has more: a proxy, fetching of any address, routes for editing code, an API for programs. The page needs none of them.
READ = re.compile(
    rf"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/(assets|static|svelte)/.+"
    rf"|{API}/(info/?|app_id/?|startup-events|queue/data|upload_progress|heartbeat/\w+)|{re.escape(FILE)}.+"
)
WRITE = re.compile(rf"{API}/(queue/join|upload|cancel|reset/?)")
UPLOAD = f"{API}/upload"
ELSEWHERE = (b"cross-site", b"same-site")  # as browsers say where a request comes from: other pages would fill the disk with uploads
LARGEST_BODY = 1_000_000  # bytes of a form; uploads have Gradio's own limit
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; font-src 'self' data:; "
    "img-src 'self' data: blob:; media-src 'self' blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
HEADERS = ((b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class Guard:
    """ASGI middleware. folder: the one that files may be read from, uploads and Gradio's copies included."""

    def __init__(self, app: App, folder: Path) -> None:
        self.app = app
        self.folder = Path(os.path.realpath(folder))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers what is refused, and the health check; lets the rest through with headers that keep the browser on this page."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        if path == HEALTH and method in ("GET", "HEAD"):
            return await _answer(send, 200, '{"status": "ok"}', method)
        refused = self._refusal(method, path)
        if method == "POST" and dict(scope["headers"]).get(b"sec-fetch-site") in ELSEWHERE:
            refused = 403, '{"error": "not allowed"}'
        if refused:
            return await _answer(send, *refused, method)
        if method == "POST" and path != UPLOAD:
            body = await _body(receive)
            if body is None:
                return await _answer(send, 413, '{"error": "too large"}', method)
            if not self._only_our_files(body):
                return await _answer(send, 403, '{"error": "not allowed"}', method)
            receive = _again(body, receive)
        await self.app(scope, receive, _with_headers(send))

    def _refusal(self, method: str, path: str) -> tuple[int, str] | None:
        reads = method in ("GET", "HEAD")
        if not (reads and READ.fullmatch(path)) and not (method == "POST" and WRITE.fullmatch(path)):
            return 404, '{"error": "not found"}'
        # Pictures alone: a dropped file that is a page of its own would run its scripts here.
        if path.startswith(FILE) and not (path.lower().endswith(SERVED) and self.holds(path.removeprefix(FILE))):
            return 403, '{"error": "not allowed"}'
        return None

    def holds(self, path: str) -> bool:
        """Whether a file lies in the folder, wherever links lead."""
        if "\0" in path or "://" in path:
            return False
        return Path(os.path.realpath(path)).is_relative_to(self.folder)

    def _only_our_files(self, body: bytes) -> bool:
        """Whether every file that a form names was uploaded or drawn here. Gradio would fetch one with an address from the network."""
        try:
            waiting = [json.loads(body or b"{}")]
        except (ValueError, RecursionError):
            return False
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                path = value.get("path")
                if path is not None and not (isinstance(path, str) and self.holds(path)):
                    return False
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value
        return True


async def _body(receive: Receive) -> bytes | None:
    """All of it, None if it is too large."""
    found = b""
    while True:
        message = await receive()
        found += message.get("body", b"")
        if len(found) > LARGEST_BODY:
            return None
        if message["type"] != "http.request" or not message.get("more_body"):
            return found


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, then what comes after it."""
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def repeated() -> Message:
        return parts.pop() if parts else await receive()

    return repeated


def _with_headers(send: Send) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
        await send(message)

    return sender


async def _answer(send: Send, status: int, text: str, method: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else body})

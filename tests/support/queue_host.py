"""A stand-in for a running ComfyUI: its queue API in a thread of this process, which can fail, forget and die on request."""
from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

HOSTS_OWN = ("KSampler", "VAELoader", "VAEDecode", "SaveImage", "EmptyLatentImage")
THIS_PACKS = ("PixArtModelLoader", "PixArtT5Loader", "PixArtTextEncode", "PixArtResolution", "PixArtCropToSize")


class QueueHost(ThreadingHTTPServer):
    """Draws each graph as one colour made from its seed. `trouble`: "dies" and "forgets" at the second graph, "fails" always or
    "fails once" a seed, "refuses", "gateway" (a proxy's answer), "odd" (other JSON than ComfyUI's), "breaks off" in the middle of a file,
    "empty" (saves nothing), "damaged" (no picture), "bare" (lacks this pack)."""

    daemon_threads = True

    def __init__(self, trouble: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble, self.dead = trouble, False
        self.graphs: dict[str, dict[str, Any]] = {}
        self.failed: set[int] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def seeds(self) -> list[int]:
        return [graph["7"]["inputs"]["seed"] for graph in self.graphs.values()]

    def entry(self, number: str) -> dict[str, Any]:
        """What /history says."""
        seed = self.graphs[number]["7"]["inputs"]["seed"]
        if self.trouble == "fails" or (self.trouble == "fails once" and seed not in self.failed):
            self.failed.add(seed)
            error = {"node_type": "KSampler", "node_id": "7", "exception_message": f"no memory for {seed}"}
            return {"status": {"status_str": "error", "messages": [["execution_error", error]]}, "outputs": {}}
        image = {"filename": f"{seed}.png", "subfolder": "", "type": "output"}
        outputs = {} if self.trouble == "empty" else {"9": {"images": [image]}}
        return {"status": {"status_str": "success", "messages": []}, "outputs": outputs}


def colour(seed: int) -> tuple[int, int, int]:
    """Of the picture of a seed."""
    return seed % 256, seed * 7 % 256, 40


class Handler(BaseHTTPRequestHandler):
    """The part of the API that is used; /ws is refused, so that the client polls."""

    server: QueueHost

    def answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_one_request(self) -> None:
        if self.server.dead:
            self.close_connection = True
            return
        super().handle_one_request()

    def do_GET(self) -> None:
        host, path = self.server, self.path.split("?")[0]
        if path == "/object_info":
            self.answer(json.dumps(dict.fromkeys(HOSTS_OWN if host.trouble == "bare" else [*HOSTS_OWN, *THIS_PACKS], {})).encode())
        elif path == "/queue":
            self.answer(b'{"queue_running": [], "queue_pending": []}')
        elif path.startswith("/history/"):
            number = path.rpartition("/")[2]
            known = number in host.graphs and not (host.trouble == "forgets" and len(host.graphs) > 1)
            self.answer(json.dumps({number: host.entry(number)} if known else {}).encode())
        elif path == "/view":
            seed = int(self.path.split("filename=")[1].split(".")[0])
            file = io.BytesIO()
            Image.new("RGB", (8, 8), colour(seed)).save(file, "PNG")
            if host.trouble == "breaks off":
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                self.wfile.write(file.getvalue())
                self.close_connection = True
                return
            self.answer(b"damaged" if host.trouble == "damaged" else file.getvalue())
        else:
            self.answer(b"{}", 404)

    def do_POST(self) -> None:
        host, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if host.trouble in ("gateway", "odd"):
            self.answer(b"<html>502 Bad Gateway</html>" if host.trouble == "gateway" else b"[]", 502 if host.trouble == "gateway" else 200)
            return
        if host.trouble == "refuses":
            self.answer(json.dumps({"error": {"message": "no such model"}, "node_errors": {}}).encode(), 400)
            return
        number = f"p{len(host.graphs)}"
        host.graphs[number] = body["prompt"]
        if host.trouble == "dies" and len(host.graphs) > 1:
            host.dead = True
            self.close_connection = True
            return
        time.sleep(0.05)
        self.answer(json.dumps({"prompt_id": number}).encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def queue_hosts(*troubles: str) -> Iterator[list[QueueHost]]:
    """Running hosts, one for each trouble."""
    hosts = [QueueHost(trouble) for trouble in troubles]
    for host in hosts:
        threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hosts
    finally:
        for host in hosts:
            host.shutdown()
            host.server_close()

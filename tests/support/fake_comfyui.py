"""A stand-in for ComfyUI's main.py: same command line and queue API, answers at once with a fixed picture."""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PICTURE = b"\x89PNG fake"


def option(name: str) -> str:
    """Value of a command line option."""
    return sys.argv[sys.argv.index(name) + 1]


class Handler(BaseHTTPRequestHandler):
    """The part of the API that quickstart.py uses; GET /ws is refused, so the client has to poll."""

    queued: dict = {}

    def answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/object_info"):
            self.answer(json.dumps({"PixArtModelLoader": {}}).encode())
        elif path.startswith("/history/"):
            image = {"filename": "a.png", "subfolder": "", "type": "output"}
            entry = {"status": {"status_str": "success", "messages": []}, "outputs": {"9": {"images": [image]}}}
            self.answer(json.dumps({"1": entry}).encode())
        else:
            self.answer(b"{}", 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if os.environ.get("FAKE_DIES"):
            print("Killed: out of memory", flush=True)
            os._exit(9)
        if os.environ.get("FAKE_CRASHES"):
            self.answer(b"500 Internal Server Error", 500)
            return
        if os.environ.get("FAKE_REFUSES"):
            node = {"class_type": "X", "errors": [{"message": "m", "details": "d"}]}
            refusal = {"error": {"message": "bad graph"}, "node_errors": {"4": node}}
            self.answer(json.dumps(refusal).encode(), 400)
            return
        base = Path(option("--base-directory"))
        (base / "queued.json").write_text(json.dumps(body), encoding="utf-8")
        (base / "output/a.png").write_bytes(PICTURE)
        self.answer(json.dumps({"prompt_id": "1", "number": 1, "node_errors": {}}).encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


if os.environ.get("FAKE_FAILS"):
    sys.exit("ModuleNotFoundError: No module named 'torchsde'")
(Path(option("--base-directory")) / "pid").write_text(str(os.getpid()), encoding="utf-8")
ThreadingHTTPServer((option("--listen"), int(option("--port"))), Handler).serve_forever()

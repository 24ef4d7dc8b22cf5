"""Nothing outside the output folder is readable through the page, and the server asks nothing of other machines."""
from __future__ import annotations

import http.client
import json
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pixart.app.guard import Guard
from tests.support.demo import ROOT
from tests.support.page import Server

FILE = "/gradio_api/file="


def ask(server: Server, path: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """A request as it is, without the tidying of paths that clients do."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=60)
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request(method or ("GET" if body is None else "POST"), path, data, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    return found


def upload(name: str, content: bytes) -> tuple[bytes, str]:
    """(body, content type) of a form with one file."""
    head = f'--x1\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\ncontent-type: text/html\r\n\r\n'
    return head.encode() + content + b"\r\n--x1--\r\n", "multipart/form-data; boundary=x1"


def test_pictures_are_served_and_what_lies_elsewhere_is_not(server: Server, tmp_path: Path) -> None:
    picture = server.output / "one.png"
    Image.new("RGB", (8, 8)).save(picture)
    status, content, headers = ask(server, f"{FILE}{picture}")
    assert status == 200 and content == picture.read_bytes() and headers["content-type"] == "image/png"
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    (server.output / "link.png").symlink_to(secret)
    (server.output / "way").symlink_to(tmp_path, target_is_directory=True)
    output = str(server.output)
    paths = [
        str(secret), f"{output}/../{secret}", f"{output}/../page.log", f"{output}/way/secret.txt", f"{output}/link.png", "README.md",
        str(ROOT / "pyproject.toml"), str(ROOT / "pixart/cli.py"), "/etc/passwd", "../../../../../etc/passwd", "/proc/self/environ",
        output, f"{output}/", "", ".", f"{output}/one.png\0.txt", "file:///etc/passwd", "http://127.0.0.1:1/", "//etc/passwd",
        f"{output}.log", f"{output}/%2e%2e/page.log",
    ]  # fmt: skip
    for path in paths:
        for quoted in (urllib.parse.quote(path), urllib.parse.quote(path, safe=""), urllib.parse.quote(urllib.parse.quote(path, safe=""))):
            status, content, _ = ask(server, FILE + quoted)
            assert status in (400, 403, 404), (path, status)
            assert b"secret" not in content.replace(b"secret.txt", b"") and b"root:" not in content and b"[project]" not in content
    for path in ("/static/../../../../../../etc/passwd", "/assets/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd", "/svelte/%2e%2e/%2e%2e/%2e%2e/routes.py"):
        assert ask(server, path)[0] in (400, 403, 404)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/run/predict", "/gradio_api/call/draw", "/gradio_api/component_server",
        "/gradio_api/process_recording", "/monitoring", "/gradio_api/vibe-code/", "/gradio_api/vibe-edit", "/gradio_api/openapi.json",
        "/docs", "/gradio_api/stream/x/1/2/playlist.m3u8", "/gradio_api/file/etc/passwd", "/login", "/gradio_api/deep_link",
        "/gradio_api/dev/reload", "/custom_component/x/client/component/index.js",
    ],
)  # fmt: skip
def test_routes_that_the_page_does_not_need_are_closed(server: Server, path: str) -> None:
    assert ask(server, path)[0] == 404
    assert ask(server, path, body={})[0] == 404


def test_a_form_names_no_file_of_this_machine_and_no_address(server: Server) -> None:
    """Gradio fetches addresses and copies files that a form names, even where a text is expected."""
    for path in ("http://127.0.0.1:1/x.png", "/etc/passwd", str(ROOT / "README.md"), f"{server.output}/../page.log", ["x"], 5, "a\0b"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        for data in ([file], [[{"image": file}]], {"deep": {"er": file}}):
            assert ask(server, "/gradio_api/queue/join", {"data": data, "fn_index": 0, "session_hash": "x"})[0] == 403
    assert ask(server, "/gradio_api/queue/join", b"{" * 10)[0] == 403
    assert ask(server, "/gradio_api/queue/join", b"[" * 500_000)[0] == 403
    assert ask(server, "/gradio_api/queue/join", b" " * 1_000_001)[0] == 413


def test_another_sites_page_reaches_nothing(server: Server) -> None:
    assert ask(server, "/", host="evil.example")[0] == 400
    status, _, headers = ask(server, "/", origin="http://evil.example")
    assert headers.get("access-control-allow-origin") != "http://evil.example"
    assert "frame-ancestors 'none'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    body, kind = upload("x.png", b"x")
    before = {*server.output.rglob("*")}
    for site in ("cross-site", "same-site"):  # a form of another page needs no permission to be sent
        assert ask(server, "/gradio_api/upload", body, content_type=kind, sec_fetch_site=site)[0] == 403
    assert {*server.output.rglob("*")} == before
    assert ask(server, "/gradio_api/upload", body, content_type=kind, sec_fetch_site="same-origin")[0] == 200


def test_the_page_names_no_other_machine_that_a_browser_would_ask(server: Server) -> None:
    """Links in the page's code are words; the policy is what keeps a browser here."""
    _, content, headers = ask(server, "/")
    assert b"fonts.googleapis.com" not in content and b"cdn" not in content.lower().replace(b"cdnt", b"")
    assert "http" not in headers["content-security-policy"]
    assert json.loads(ask(server, "/config")[1])["analytics_enabled"] is False
    assert b"fonts.g" not in ask(server, "/theme.css")[1]


def test_health_is_told_and_says_no_more(server: Server) -> None:
    assert ask(server, "/health")[:2] == (200, b'{"status": "ok"}')
    assert ask(server, "/health", method="HEAD")[:2] == (200, b"")
    assert ask(server, "/health", body={})[0] == 404


def test_uploads_stay_in_the_output_folder(server: Server) -> None:
    body, kind = upload("../../../up.html", b"<script>1</script>")
    status, content, _ = ask(server, "/gradio_api/upload", body, content_type=kind)
    assert status == 200
    written = Path(json.loads(content)[0])
    assert written.resolve().is_relative_to(server.output) and not (server.output.parent / "up.html").exists()
    assert ask(server, f"{FILE}{written}")[0] == 403  # it would run its script as if it were ours
    written.rename(written.with_suffix(".PNG"))
    _, _, headers = ask(server, f"{FILE}{written.with_suffix('.PNG')}")
    assert headers["content-type"] == "image/png" and headers["x-content-type-options"] == "nosniff"


def test_the_folder_itself_may_be_reached_through_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "a.png").touch()
    (tmp_path / "link").symlink_to(real)
    guard = Guard(None, tmp_path / "link")
    assert guard.holds(str(tmp_path / "link/a.png")) and guard.holds(str(real / "a.png"))
    assert not guard.holds(str(tmp_path / "b.png")) and not guard.holds("https://x/y")

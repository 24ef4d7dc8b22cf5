"""Shows the page on a port: loopback unless told otherwise, nothing asked of other machines."""
from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, UnsupportedError
from .guard import Guard

LARGEST_UPLOAD = "64mb"
COPIES = ".page"  # in the output folder: what was dropped on the page, and Gradio's copies of pictures
LOCAL_NAMES = ["127.0.0.1", "localhost"]  # a page of the web that calls itself something else can't reach a loopback server


@dataclass(frozen=True)
class Address:
    """Where to listen. share: through Gradio's tunnel, for everybody who knows the link."""

    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False

    @property
    def is_loopback(self) -> bool:
        """Whether this machine alone can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def prepare(folder: Path) -> Path:
    """Makes the output folder and sets what Gradio reads when it is imported. Raises InputError, and UnsupportedError without Gradio."""
    folder = Path(os.path.realpath(folder))
    try:
        (folder / COPIES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output is {folder}, where no files can be written ({error.strerror}); give a folder of yours.") from None
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / COPIES), "GRADIO_ALLOWED_PATHS": "",
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"The page needs Gradio ({error}): `pip install \".[pipeline,app]\"` in the repository.") from None
    return folder


@contextmanager
def serving(line: Any, folder: Path, address: Address) -> Iterator[str]:
    """The page's address while it is served; `folder` from `prepare`. Raises InputError for a port that is taken."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from .page import CSS, build_page, theme

    address = check_free(address)
    middleware = [Middleware(Guard, folder=folder)]
    if address.is_loopback and ":" not in address.host and not address.share:
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_NAMES, address.host], www_redirect=False))
    blocks = build_page(line)
    try:
        _, url, _ = blocks.queue(default_concurrency_limit=None, max_size=200).launch(
            server_name=address.host, server_port=address.port, share=address.share, prevent_thread_lock=True, quiet=True,
            allowed_paths=[str(folder)], max_file_size=LARGEST_UPLOAD, app_kwargs={"middleware": middleware}, footer_links=[],
            ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, run_history=False, theme=theme(), css=CSS,
        )  # fmt: skip
        yield url
    finally:
        line.close()
        blocks.close(verbose=False)


def serve(line: Any, folder: Path, address: Address) -> None:
    """Until it is interrupted; says where the page is, and who can reach it."""
    with serving(line, folder, address) as url:
        sys.stdout.write(f"The page is at {url}\nPictures go to {folder}\nCtrl-C stops it.\n{warning(folder, address)}")
        sys.stdout.flush()
        _until_interrupted()


def warning(folder: Path, address: Address) -> str:
    """What to know of a page that others can reach; "" on loopback."""
    if address.share:
        who = "everyone who knows the link"
    elif not address.is_loopback:
        who = f"every machine that reaches port {address.port} of this one"
    else:
        return ""
    return f"Open to more than this machine: {who} can draw here and see pictures in {folder}. There is no password.\n"


def _until_interrupted() -> None:
    """Returns by KeyboardInterrupt: Ctrl-C, or the signal by which systems end a service."""

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
    threading.Event().wait()


def check_free(address: Address) -> Address:
    """The address, a free port in place of 0. Raises InputError where nothing can listen; Gradio would say it in many lines."""
    try:
        kind = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with socket.socket(kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address.host, address.port))
            return replace(address, port=probe.getsockname()[1])
    except OSError as error:
        raise InputError(
            f"Can't listen on {address.host} port {address.port} ({error.strerror or error}); choose others with --host and --port."
        ) from None
    except OverflowError:
        raise InputError(f"--port is {address.port}; expected 1 to 65535.") from None

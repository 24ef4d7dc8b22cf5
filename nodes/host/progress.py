"""Text shown on a node while the graph runs."""
from __future__ import annotations

from typing import Any


def show_text(node: Any, text: str) -> None:
    """Sends text to the node in the browser: `ui.PreviewText` alone is drawn for a few of the host's own nodes only."""
    from server import PromptServer  # only there once the host's server runs

    server = getattr(PromptServer, "instance", None)
    node_id = getattr(getattr(node, "hidden", None), "unique_id", None)
    if node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node_id)

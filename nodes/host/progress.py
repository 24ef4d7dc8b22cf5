"""Text shown on a node while the graph runs."""
from __future__ import annotations

import sys
from typing import Any


def show_text(node: Any, text: str) -> None:
    """Sends text to the node in the browser: `ui.PreviewText` alone is drawn for a few of the host's own nodes only."""
    # Not imported: without a running server (scripts, tests) there is nobody to send to.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    node_id = getattr(getattr(node, "hidden", None), "unique_id", None)
    if node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node_id)

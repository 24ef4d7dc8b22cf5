"""TorchCompileModel as a graph has it: the host's own node, with a backend that counts graphs instead of compiling them."""

from __future__ import annotations

import importlib
from typing import Any

import torch

GRAPHS = 64  # more than torch's own limit, past which it goes on without graphs


def compiled(model: Any, graphs: list | None = None) -> Any:
    """MODEL behind the node, whose options (a filter of guards on newer hosts) are its own; `graphs` collects what is traced."""
    node = importlib.import_module("comfy_extras.nodes_torch_compile").TorchCompileModel

    def backend(graph: Any, inputs: Any) -> Any:
        if graphs is not None:
            graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.recompile_limit = GRAPHS
    return node.execute(model, backend).result[0]


def breaks() -> dict[str, int]:
    """Why graphs broke since the last call of `compiled`."""
    return dict(torch._dynamo.utils.counters["graph_break"])

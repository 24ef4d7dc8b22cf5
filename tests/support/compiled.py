"""TorchCompileModel as a graph has it: the host's own node, with a backend that counts graphs instead of compiling them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

GRAPHS = 64  # more than torch's own limit, past which it goes on without graphs


def compiled(model: Any, graphs: list | None = None, backend: Callable | None = None) -> Any:
    """MODEL behind the node in a process that has compiled nothing; `graphs` collects what is traced for `backend` (default: none)."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.recompile_limit = GRAPHS
    return behind_node(model, counting([] if graphs is None else graphs, backend))


def counting(graphs: list, backend: Callable | None = None) -> Callable:
    """A backend that writes each graph down, and gives it to another, or runs it as it is."""

    def collect(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward if backend is None else backend(graph, inputs)

    return collect


def behind_node(model: Any, backend: Any) -> Any:
    """What the node makes of MODEL; its options (a filter of guards on newer hosts) are its own."""
    return importlib.import_module("comfy_extras.nodes_torch_compile").TorchCompileModel.execute(model, backend).result[0]


def breaks() -> dict[str, int]:
    """Why graphs broke since the last call of `compiled`."""
    return dict(torch._dynamo.utils.counters["graph_break"])

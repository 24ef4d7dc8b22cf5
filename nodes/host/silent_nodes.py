"""Nodes of the running graph that patch a MODEL where PixArt has no such place: without a word they would do nothing."""
from __future__ import annotations

from collections.abc import Iterator, Mapping

from .vae_hint import Graph, running_graphs, sources

LOADER = "PixArtModelLoader"
_UNET = "it patches a UNet's layers, which PixArt doesn't have"
# Class of a node -> why it has no effect on PixArt, and what to use instead
WITHOUT_EFFECT = {
    "PerturbedAttentionGuidance": f"{_UNET}; use PixArtPAG",
    "SelfAttentionGuidance": f"{_UNET}; use PixArtPAG",
    "SkipLayerGuidanceSD3": "it patches SD3's blocks; use PixArtPAG with skipped blocks, or SkipLayerGuidanceDiT",
    "HyperTile": f"{_UNET}; use PixArtKVCompress for large pictures",
    "TomePatchModel": f"{_UNET}; use PixArtKVCompress for large pictures",
    "PatchModelAddDownscale": f"{_UNET}; draw in a bin of PixArtResolution, then a second pass",
    "FreeU": _UNET,
    "FreeU_V2": _UNET,
    "UNetSelfAttentionMultiply": _UNET,
    "UNetCrossAttentionMultiply": _UNET,
    "UNetTemporalAttentionMultiply": _UNET,
    "ScaleROPE": "PixArt doesn't use rotary positions",
    "FluxKVCache": "it is for Flux",
    "ModelSamplingFlux": "PixArt is trained on noise levels of its own; leave it out",
    "ModelSamplingSD3": "PixArt is trained on noise levels of its own; leave it out",
    "ModelMergeBlocks": "it only knows a UNet's blocks: its first ratio, `input`, applies to all of PixArt's. Use ModelMergeSimple",
}
ON_CONDITIONING = {
    "FluxGuidance": "PixArt has no such input; set cfg on the sampler",
    "ReferenceLatent": "PixArt has no such input; use img2img or a ControlNet",
}


def silent_warnings() -> Iterator[str]:
    """One sentence for each such node between PixArtModelLoader and a sampler."""
    for graph in running_graphs():
        for number, node in graph.items():
            if _comes_from_pixart(graph, number):
                yield from _named(WITHOUT_EFFECT, str(node.get("class_type")))
                for before in _upstream(graph, number):
                    yield from _named(ON_CONDITIONING, str(graph[before].get("class_type")))


def _named(table: Mapping[str, str], kind: str) -> Iterator[str]:
    if kind in table:
        yield f"the node {kind} has no effect on PixArt: {table[kind]}."


def _upstream(graph: Graph, number: str) -> set[str]:
    """Ids of all nodes that a node depends on."""
    waiting, seen = sources(graph, graph[number]), set()
    while waiting:
        before = waiting.pop()
        if before not in seen:
            seen.add(before)
            waiting += sources(graph, graph[before])
    return seen


def _comes_from_pixart(graph: Graph, number: str) -> bool:
    """Whether a node's MODEL comes from PixArtModelLoader, through any number of patches."""
    waiting, seen = _models(graph, number), set()
    while waiting:
        source = waiting.pop()
        if graph[source].get("class_type") == LOADER:
            return True
        if source not in seen:
            seen.add(source)
            waiting += _models(graph, source)
    return False


def _models(graph: Graph, number: str) -> list[str]:
    return [each for name in ("model", "model1", "model2") for each in sources(graph, graph[number], name)]

"""Graphs as API clients send them, checked by the host's own validation: links, unknown and ill-typed menu values."""
from __future__ import annotations

import asyncio
import inspect
from pathlib import Path

import execution
import pytest

import nodes as host_nodes
from tests.support import host

errors = host.pack_module("pixart.errors")
pack_nodes = host.pack_module("nodes")


class AnyText:
    """A primitive of any type, as switch nodes are."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """The text."""
        return {"required": {"text": ("STRING", {})}}


class Sink:
    """An output node that takes anything."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        """Whatever the node under test gives."""
        return {"required": {"any": ("*", {})}}


@pytest.fixture(autouse=True)
def registered(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pack's nodes and two of the test's, where the host looks for them; a model in each folder."""
    for node in pack_nodes.NODES:
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "AnyText", AnyText)
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "Sink", Sink)
    for kind in ("diffusion_models", "text_encoders", "loras", "vae", "controlnet"):
        (models / kind / "sub").mkdir()
        (models / kind / "sub" / "m.safetensors").touch()


def problems(node: str, **inputs) -> str:
    """What the host says of a graph with this node before it runs; "" if nothing."""
    graph = {
        "1": {"class_type": node, "inputs": inputs},
        "2": {"class_type": "Sink", "inputs": {"any": ["1", 0]}},
        "3": {"class_type": "AnyText", "inputs": {"text": "x"}},
    }
    arguments = [graph, None][: len(inspect.signature(execution.validate_prompt).parameters) - 1]
    valid, error, _, details = asyncio.run(execution.validate_prompt("id", *arguments))
    return "" if valid else f"{error} {details}"


LOADERS = {
    "PixArtModelLoader": ("model_name", {"variant": "auto", "weight_dtype": "default"}),
    "PixArtT5Loader": ("t5_name", {"precision": "default", "device": "default"}),
    "PixArtControlNetLoader": ("control_net_name", {}),
    "PixArtConsistencyDecoder": ("vae_name", {}),
}


@pytest.mark.parametrize("node", LOADERS)
def test_names(node: str) -> None:
    name, others = LOADERS[node]
    for value in ("sub/m.safetensors", "sub\\m.safetensors", ["3", 0]):
        assert problems(node, **{name: value}, **others) == ""
    for value in ("absent.safetensors", "", "../m.safetensors", 7, {"__value__": ["sub/m.safetensors"]}):
        assert "is not in the folder" in problems(node, **{name: value}, **others)


def test_linked_limits_prompts_and_sizes() -> None:
    conditioning = {"clip": ["3", 0], "text": "red"}
    assert problems("PixArtTextEncode", **conditioning, max_tokens=["3", 0]) == ""
    assert problems("PixArtTextEncode", **conditioning, max_tokens=120) == ""
    assert "max_tokens is 0" in problems("PixArtTextEncode", **conditioning, max_tokens=0)
    assert problems("PixArtLoadPrompt", prompt_file=["3", 0]) == ""
    assert "is not a prompt file" in problems("PixArtLoadPrompt", prompt_file="absent")
    for base in ("1024", 1024, ["3", 0]):
        assert problems("PixArtResolution", base=base, width="512", height=512, batch_size=1) == ""
    for base in (1000, "1k", True, 1024.0, {"__value__": []}):
        assert "expected one of 256, 512, 1024" in problems("PixArtResolution", base=base, width=512, height=512, batch_size=1)


@pytest.mark.parametrize("value", ["FP16", "Q8_0", "", 16, None, [], {}])
@pytest.mark.parametrize(
    ("module", "node", "menu", "others"),
    [("model", "PixArtModelLoader", "variant", {"model_name": "sub/m.safetensors", "weight_dtype": "default"}),
     ("model", "PixArtModelLoader", "weight_dtype", {"model_name": "sub/m.safetensors", "variant": "auto"}),
     ("text", "PixArtT5Loader", "precision", {"t5_name": "sub/m.safetensors", "device": "default"}),
     ("text", "PixArtT5Loader", "device", {"t5_name": "sub/m.safetensors", "precision": "default"}),
     ("resolution", "PixArtResolution", "base", {"width": 512, "height": 512, "batch_size": 1}),
     ("prompts", "PixArtNegative", "convention", {}),
     ("guidance", "PixArtPAG", "kind", {"model": None, "blocks": "1", "scale": 1.0, "start_percent": 0.0, "end_percent": 1.0}),
     ("kv_compress", "PixArtKVCompress", "method", {"model": None, "ratio": 2, "first_block": 0, "last_block": -1, "start_percent": 0.0,
                                                    "end_percent": 1.0, "min_tokens": 0})],
)  # fmt: skip
def test_unknown_values_reach_no_loader(module: str, node: str, menu: str, others: dict, value) -> None:
    """Where the host lets them pass, or a link brings them."""
    with pytest.raises(errors.InputError, match=rf"{menu} is .*expected (one of )?\w+"):
        getattr(host.pack_module(f"nodes.{module}"), node).execute(**{menu: value}, **others)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", None, 1e9, -1e9])
def test_numbers_that_are_none(value) -> None:
    """JSON of Python clients may hold NaN, which passes the host's bounds; a link brings anything."""
    menus = host.pack_module("nodes.host.menus")
    for module, node, name, others in (
        ("resolution", "PixArtResolution", "batch_size", {"base": "1024", "width": 512, "height": 512}),
        ("few_steps", "PixArtOneStep", "timestep", {"model": None}),
        ("lora", "PixArtLoraLoader", "strength", {"model": None, "lora_name": "sub/m.safetensors"}),
        ("lora", "PixArtLoraLoader", "strength_clip", {"model": None, "lora_name": "sub/m.safetensors", "strength": 1.0}),
    ):
        with pytest.raises(errors.InputError, match=rf"{name} is .*expected a (whole )?number from"):
            getattr(host.pack_module(f"nodes.{module}"), node).execute(**{name: value}, **others)
    assert menus.check_number("n", "2", 1, 4, whole=True) == 2 and menus.check_number("n", 0.5, 0, 1) == 0.5
    with pytest.raises(errors.InputError, match="n is 2.5; expected a whole number from 1 to 4"):
        menus.check_number("n", 2.5, 1, 4, whole=True)


def test_error_types_name_no_folder() -> None:
    """The host shows users an error's full type, and calls the pack by its path."""
    for kind in (errors.PixArtError, errors.InputError, errors.CheckpointError, errors.TextEncoderError, errors.UnsupportedError):
        assert execution.full_type_name(kind) == f"pixart.errors.{kind.__name__}"

"""The pack as the host sees it: its nodes, their inputs and outputs, help pages, and no failure without a host."""
from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import host
from tests.support.demo import DEMO

# id -> (inputs, outputs), as released; inputs may only be appended, since workflows store values by position
NODES = {
    "PixArtModelLoader": (["model_name", "variant", "weight_dtype"], ["MODEL"]),
    "PixArtT5Loader": (["t5_name", "precision", "device"], ["CLIP"]),
    "PixArtTextEncode": (["clip", "text", "max_tokens", "clean_caption", "lower_case", "model"], ["CONDITIONING"]),
    "PixArtResolution": (["base", "width", "height", "batch_size"], ["LATENT", "INT", "INT"]),
    "PixArtCropToSize": (["image", "width", "height"], ["IMAGE"]),
    "PixArtSizeCondition": (["conditioning", "width", "height"], ["CONDITIONING"]),
    "PixArtLoraLoader": (["model", "lora_name", "strength", "clip", "strength_clip"], ["MODEL", "CLIP"]),
    "PixArtPAG": (["model", "kind", "blocks", "scale", "start_percent", "end_percent"], ["MODEL"]),
    "PixArtControlNetLoader": (["control_net_name"], ["CONTROL_NET"]),
    "PixArtHED": (["image", "hed_name"], ["IMAGE"]),
    "PixArtTimesteps": (["model", "timesteps", "schedule", "steps"], ["SIGMAS"]),
    "PixArtOneStep": (["model", "timestep"], ["SAMPLER", "SIGMAS"]),
    "PixArtConsistencyDecoder": (["vae_name"], ["VAE"]),
    "PixArtNegative": (["convention", "clip", "positive", "model"], ["CONDITIONING"]),
    "PixArtSavePrompt": (["conditioning", "filename_prefix", "prompt"], []),
    "PixArtLoadPrompt": (["prompt_file", "model"], ["CONDITIONING"]),
    "PixArtKVCompress": (
        ["model", "ratio", "method", "first_block", "last_block", "start_percent", "end_percent", "min_tokens"],
        ["MODEL"],
    ),
}


@pytest.fixture(scope="module")
def nodes() -> dict:
    """Node id -> class, through the host's entry point."""

    async def listed():
        extension = await host.load_pack().comfy_entrypoint()
        return await extension.get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(listed())}


def test_nodes_inputs_and_outputs(nodes: dict) -> None:
    def inputs(node) -> list[str]:
        groups = node.INPUT_TYPES()
        return [*groups["required"], *groups.get("optional", {})]

    assert {name: (inputs(node), list(node.RETURN_TYPES)) for name, node in nodes.items()} == NODES


def test_what_was_added_to_released_nodes_is_optional(nodes: dict) -> None:
    """Graphs in API format made before don't name it."""
    assert list(nodes["PixArtTextEncode"].INPUT_TYPES()["required"]) == ["clip", "text", "max_tokens"]


def test_choices(nodes: dict) -> None:
    model, t5 = nodes["PixArtModelLoader"].INPUT_TYPES()["required"], nodes["PixArtT5Loader"].INPUT_TYPES()["required"]
    zoo = ["alpha-256", "alpha-512", "alpha-1024", "sigma-256", "sigma-512", "sigma-1024", "sigma-2k", "sigma-900m"]
    zoo += ["sigma-sd3", "sigma-flux", "demo"]
    assert model["variant"][1]["options"] == ["auto", *zoo]
    assert model["weight_dtype"][1]["options"] == ["default", "fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"]
    assert t5["precision"][1]["options"] == ["default", "fp32", "bf16", "fp16", "fp8_e4m3fn", "int8", "nf4", "fp4"]
    assert t5["device"][1]["options"] == ["default", "cpu"]
    base = nodes["PixArtResolution"].INPUT_TYPES()["required"]["base"][1]["options"]
    assert base == ["256", "512", "1024", "2048", "2880", "4096"]


def test_optional_inputs(nodes: dict) -> None:
    found = {name: list(node.INPUT_TYPES().get("optional", {})) for name, node in nodes.items()}
    assert {name: inputs for name, inputs in found.items() if inputs} == {
        "PixArtTextEncode": ["clean_caption", "lower_case", "model"],
        "PixArtNegative": ["clip", "positive", "model"],
        "PixArtLoadPrompt": ["model"],
        "PixArtLoraLoader": ["clip", "strength_clip"],
        "PixArtTimesteps": ["schedule", "steps"],
    }


def test_every_node_explains_itself(nodes: dict) -> None:
    for name, node in nodes.items():
        schema = node.GET_SCHEMA()
        assert schema.description and schema.display_name and schema.category == "PixArt"
        for group in ("required", "optional"):
            for given in node.INPUT_TYPES().get(group, {}).values():
                assert given[0] in ("IMAGE", "CONDITIONING") or given[1].get("tooltip"), (name, given)
        page = host.PACK_ROOT / "web" / "docs" / f"{name}.md"
        assert page.is_file() and page.read_text(encoding="utf-8").startswith("# ")


def test_no_v1_mapping_hides_the_entry_point() -> None:
    """The host ignores comfy_entrypoint where NODE_CLASS_MAPPINGS exists."""
    pack = host.load_pack()
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS") and callable(pack.comfy_entrypoint)
    assert (host.PACK_ROOT / pack.WEB_DIRECTORY).is_dir()


def test_importing_without_a_host() -> None:
    """As pytest and other tools do it."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('pack', {str(host.PACK_ROOT / '__init__.py')!r},"
        f" submodule_search_locations=[{str(host.PACK_ROOT)!r}])\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['pack'] = module; spec.loader.exec_module(module)\n"
        "assert not hasattr(module, 'comfy_entrypoint') and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_only_the_host_folder_knows_comfyui() -> None:
    """Nodes proper import the host's node API and nothing else of it; the core imports nothing."""
    inside = ("comfy.", "folder_paths", "comfy_extras", "nodes", "server", "latent_preview", "node_helpers")
    for path in [*(host.PACK_ROOT / "nodes").glob("*.py"), *(host.PACK_ROOT / "pixart").rglob("*.py")]:
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert not words[1].startswith(inside), (path, line)
                assert "pixart" not in path.parts[-2:-1] or not words[1].startswith("comfy"), (path, line)


def test_schema_arguments_of_newer_hosts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = host.pack_module("nodes.host.schema")
    monkeypatch.setattr(made, "_KNOWN", {"node_id", "display_name"})
    assert made.schema(node_id="X", display_name="Y", search_aliases=["z"], category="c").node_id == "X"


def test_demo_models_are_offered_to_the_host_as_they_lie():
    asyncio.run(host.load_pack().comfy_entrypoint())
    folder_paths = sys.modules["folder_paths"]
    for kind, path in DEMO.items():
        assert path.name in folder_paths.get_filename_list(kind)
        assert Path(folder_paths.get_full_path(kind, path.name)).samefile(path)
        assert folder_paths.get_folder_paths(kind)[0] != str(path.parent)  # downloads go to the user's own folder

"""The pack as the host sees it: seven nodes, their inputs and outputs, help pages, and no failure without a host."""
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
    "PixArtTextEncode": (["clip", "text", "max_tokens"], ["CONDITIONING"]),
    "PixArtResolution": (["base", "width", "height", "batch_size"], ["LATENT", "INT", "INT"]),
    "PixArtCropToSize": (["image", "width", "height"], ["IMAGE"]),
    "PixArtSizeCondition": (["conditioning", "width", "height"], ["CONDITIONING"]),
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
    found = {name: (list(node.INPUT_TYPES()["required"]), list(node.RETURN_TYPES)) for name, node in nodes.items()}
    assert found == NODES


def test_choices(nodes: dict) -> None:
    model, t5 = nodes["PixArtModelLoader"].INPUT_TYPES()["required"], nodes["PixArtT5Loader"].INPUT_TYPES()["required"]
    zoo = ["alpha-256", "alpha-512", "alpha-1024", "sigma-256", "sigma-512", "sigma-1024", "sigma-2k", "sigma-900m", "demo"]
    assert model["variant"][1]["options"] == ["auto", *zoo]
    assert model["weight_dtype"][1]["options"] == ["default", "fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"]
    assert t5["precision"][1]["options"] == ["default", "fp32", "bf16", "fp16", "fp8_e4m3fn"]
    assert t5["device"][1]["options"] == ["default", "cpu"]
    base = nodes["PixArtResolution"].INPUT_TYPES()["required"]["base"][1]["options"]
    assert base == ["256", "512", "1024", "2048", "2880", "4096"]


def test_every_node_explains_itself(nodes: dict) -> None:
    for name, node in nodes.items():
        schema = node.GET_SCHEMA()
        assert schema.description and schema.display_name and schema.category == "PixArt"
        for group in node.INPUT_TYPES().values():
            for given in group.values():
                linked = isinstance(given, tuple) and given[0] in ("IMAGE", "CONDITIONING", "UNIQUE_ID")
                assert linked or given[1].get("tooltip") or given == ("UNIQUE_ID",), (name, given)
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
    inside = ("comfy.", "folder_paths", "comfy_extras", "nodes", "server", "latent_preview")
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

"""Model menus on large, changing and odd folders: no walk where nothing changed, and files that changed are loaded anew."""
from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths
import pytest
from safetensors.torch import load_file, save_file

from tests.support import host

errors = host.pack_module("pixart.errors")
files = host.pack_module("nodes.host.files")
prompts = host.pack_module("nodes.host.prompts")
LOADERS = {  # node, its menu -> (folder, config by which a folder is known)
    ("model", "PixArtModelLoader", "model_name"): ("diffusion_models", "config.json"),
    ("text", "PixArtT5Loader", "t5_name"): ("text_encoders", "config.json"),
    ("lora", "PixArtLoraLoader", "lora_name"): ("loras", "adapter_config.json"),
    ("controlnet", "PixArtControlNetLoader", "control_net_name"): ("controlnet", "config.json"),
    ("controlnet", "PixArtHED", "hed_name"): ("controlnet", "config.json"),
    ("vae", "PixArtConsistencyDecoder", "vae_name"): ("vae", "config.json"),
}
KINDS = sorted({kind for kind, _ in LOADERS.values()})


def put(path: Path, content: bytes = b"x") -> Path:
    """A file, and the folders to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def later(path: Path) -> None:
    """As if changed in the next second: file systems may note times coarsely."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every folder that is listed, by whom it may be."""
    seen: list[str] = []

    def counted(name: str, original):
        def call(place=".", *args, **kwargs):
            seen.append(f"{name} {place}")
            return original(place, *args, **kwargs)

        return call

    for owner, name in ((os, "walk"), (os, "scandir"), (os, "listdir"), (folder_paths, "recursive_search")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return seen


def node_of(loader: tuple[str, str, str]):
    """The node's class."""
    return getattr(host.pack_module(f"nodes.{loader[0]}"), loader[1])


class TestWalks:
    def test_none_where_nothing_changed(self, models: Path, walks: list[str]) -> None:
        for number in range(20_000):
            folder = models / "loras" / f"{number % 20}"
            if number < 20:
                folder.mkdir()
            os.close(os.open(folder / f"{number}.safetensors", os.O_CREAT))
        put(models / "diffusion_models/sigma/config.json")
        put(models / "diffusion_models/sigma/diffusion_pytorch_model.safetensors")
        for loader in LOADERS:  # the host walks once
            node_of(loader).INPUT_TYPES()
        assert walks
        walks.clear()
        for loader, name in {("lora", "PixArtLoraLoader", "lora_name"): "7/7.safetensors",
                             ("model", "PixArtModelLoader", "model_name"): "sigma"}.items():  # fmt: skip
            node = node_of(loader)
            assert name in node.INPUT_TYPES()["required"][loader[2]][1]["options"]
            assert node.validate_inputs(name) is True and node.fingerprint_inputs(name)
            assert files.resolve(*LOADERS[loader][:1], "transformer", name, LOADERS[loader][1]).exists()
        assert walks == []

    def test_new_and_removed_ones_are_noticed(self, models: Path) -> None:
        assert files.choices("loras", "transformer") == []
        one = put(models / "loras/sub/a.safetensors")
        assert files.choices("loras", "transformer") == ["sub/a.safetensors"]
        config = put(models / "loras/sub/config.json")
        later(models / "loras/sub")
        assert files.choices("loras", "transformer") == ["sub/a.safetensors", "sub"]
        config.unlink()
        assert files.choices("loras", "transformer") == ["sub/a.safetensors"]
        one.unlink()
        later(models / "loras/sub")
        later(models / "loras")
        assert files.choices("loras", "transformer") == []

    def test_prompts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walks: list[str]) -> None:
        for kind in ("input", "output"):
            monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
        assert prompts.choices() == []
        put(tmp_path / "output/prompts/a.safetensors")
        assert prompts.choices() == ["a.safetensors [output]"]
        put(tmp_path / "output/prompts/b.safetensors")  # within the same tick of the clock
        assert prompts.choices() == ["a.safetensors [output]", "b.safetensors [output]"]
        for folder in ("output/prompts",):
            os.utime(tmp_path / folder, (1e9, 1e9))
        prompts.choices()
        walks.clear()
        assert len(prompts.choices()) == 2 and prompts.resolve("b.safetensors [output]").is_file() and walks == []
        put(tmp_path / "output/prompts/sub/c.safetensors")
        (tmp_path / "output/prompts/a.safetensors").unlink()
        assert prompts.choices() == ["b.safetensors [output]", "sub/c.safetensors [output]"]


class TestNames:
    def test_slashes_lean_either_way(self, models: Path) -> None:
        path = put(models / "loras/style/ä \u753b.safetensors")
        put(models / "loras/peft/mine/adapter_config.json")
        put(models / "loras/peft/mine/adapter_model.safetensors")
        for name in ("style/ä \u753b.safetensors", "style\\ä \u753b.safetensors"):
            assert files.resolve("loras", "transformer", name) == path
        assert files.resolve("loras", "transformer", "peft\\mine", "adapter_config.json").name == "mine"

    @pytest.mark.parametrize("name", ["STYLE/A.safetensors", "A.safetensors", "a.safetensors", "style/a.safetensor"])
    def test_a_name_close_to_one_is_told_it(self, models: Path, name: str) -> None:
        put(models / "loras/style/a.safetensors")
        with pytest.raises(errors.CheckpointError, match="not in the folder loras.*Similar: 'style/a.safetensors'"):
            files.resolve("loras", "transformer", name)

    @pytest.mark.parametrize("name", ["..\\x.safetensors", "style/../../x.safetensors", "", 5, ["a"], {"a": 1}, True])
    def test_what_is_no_name(self, models: Path, name) -> None:
        put(models / "x.safetensors")
        put(models / "loras/style/a.safetensors")
        assert "not in the folder loras" in files.name_problem("loras", "transformer", name)
        assert files.fingerprint("loras", "transformer", name) == ""

    def test_several_places_and_the_same_name_twice(self, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """extra_model_paths: the first place wins, and a config never joins another place's weights."""
        places = [tmp_path / "one", tmp_path / "two"]
        endings = folder_paths.folder_names_and_paths["diffusion_models"][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(place) for place in places], endings))
        for place in places:
            put(place / "m.safetensors")
            put(place / "both/config.json")
            put(place / "both/model.safetensors")
        put(places[0] / "split/config.json")
        put(places[1] / "split/model.safetensors")
        assert files.choices("diffusion_models", "transformer") == [
            "both/model.safetensors", "m.safetensors", "split/model.safetensors", "both"]  # fmt: skip
        assert files.resolve("diffusion_models", "transformer", "m.safetensors") == places[0] / "m.safetensors"
        assert files.resolve("diffusion_models", "transformer", "both") == places[0] / "both"
        put(places[1] / "split/config.json")
        assert files.resolve("diffusion_models", "transformer", "split") == places[1] / "split"

    def test_linked_folders_and_links_that_lead_nowhere(self, models: Path, tmp_path: Path) -> None:
        put(tmp_path / "elsewhere/config.json")
        put(tmp_path / "elsewhere/model.safetensors")
        (models / "vae/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (models / "vae/gone.safetensors").symlink_to(tmp_path / "nowhere")
        assert files.resolve("vae", "vae", "linked") == models / "vae/linked"
        with pytest.raises(errors.CheckpointError, match="is gone, or its link is broken"):
            files.resolve("vae", "vae", "gone.safetensors")

    def test_parts_of_a_pipeline(self, models: Path) -> None:
        for part in ("transformer", "text_encoder", "vae"):
            put(models / f"diffusion_models/sigma/{part}/config.json")
            put(models / f"diffusion_models/sigma/{part}/model.safetensors")
        assert files.choices("diffusion_models", "transformer")[-1] == "sigma"
        assert files.resolve("diffusion_models", "transformer", "sigma") == models / "diffusion_models/sigma/transformer"


class TestFingerprints:
    @pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader[1])
    def test_of_each_loader(self, loader: tuple[str, str, str], models: Path) -> None:
        """The file, a file of the folder, and what is read beside them: in place, and by another one in its place."""
        kind, config = LOADERS[loader]
        put(models / kind / "one.safetensors")
        folder = models / kind / "folder"
        parts = [put(folder / name) for name in (config, "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json")]
        node = node_of(loader)
        for name, changing in {"one.safetensors": [models / kind / "one.safetensors"], "folder": parts}.items():
            before = node.fingerprint_inputs(**{loader[2]: name, "strength": 1.0})
            assert before and node.fingerprint_inputs(**{loader[2]: name}) == before
            for path in changing:
                put(path, b"other")
                after = node.fingerprint_inputs(**{loader[2]: name})
                assert after != before, path
                later(path)
                before = node.fingerprint_inputs(**{loader[2]: name})
                assert before != after, path

    def test_a_neighbour_changes_nothing(self, models: Path) -> None:
        put(models / "loras/one.safetensors")
        before = files.fingerprint("loras", "transformer", "one.safetensors")
        put(models / "loras/two.safetensors")
        assert files.fingerprint("loras", "transformer", "one.safetensors") == before

    @pytest.mark.parametrize("beside", ["t5/spiece.model", "tokenizer.json", "../tokenizer/spiece.model"])
    def test_the_tokenizer_beside_a_t5(self, models: Path, beside: str) -> None:
        put(models / "text_encoders/set/text_encoder/t5.safetensors")
        name = "set/text_encoder/t5.safetensors"
        before = files.fingerprint("text_encoders", "text_encoder", name)
        put(models / "text_encoders/set/text_encoder" / beside)
        assert files.fingerprint("text_encoders", "text_encoder", name) != before

    @pytest.mark.parametrize(
        ("name", "weights", "tokenizer"),
        [
            ("t5.safetensors", "t5.safetensors", "spiece.model"), ("t5.safetensors", "t5.safetensors", "../spiece.model"),
            ("t5.safetensors", "t5.safetensors", "tokenizer/spiece.model"),
            ("t5.safetensors", "t5.safetensors", "../tokenizer/spiece.model"),
            ("t5.safetensors", "t5.safetensors", "t5/tokenizer/spiece.model"),
            ("sd3/text_encoder_3", "sd3/text_encoder_3/model.safetensors", "sd3/tokenizer_3/spiece.model"),
            ("set", "set/text_encoder/model.safetensors", "set/tokenizer/spiece.model"),
            ("set", "set/text_encoder/model.safetensors", "set/spiece.model"),
            ("own", "own/model.safetensors", "own/tokenizer/spiece.model"),
        ],
    )  # fmt: skip
    def test_a_replaced_tokenizer_that_loading_reads(self, name: str, weights: str, tokenizer: str, models: Path, t5_file: Path) -> None:
        """Damaged, it is named: so it was the one that is read."""
        state = load_file(t5_file)
        whole = bytes(state.pop("spiece_model").tolist())
        put((models / "text_encoders" / weights).parent / "config.json", b"{}")
        place = put(models / "text_encoders" / tokenizer, whole)
        save_file(state, models / "text_encoders" / weights)
        node = node_of(("text", "PixArtT5Loader", "t5_name"))
        before = node.fingerprint_inputs(t5_name=name)
        assert node.fingerprint_inputs(t5_name=name) == before
        node.execute(t5_name=name, precision="default", device="default")
        put(place, b"damaged")
        assert node.fingerprint_inputs(t5_name=name) != before
        with pytest.raises(errors.TextEncoderError, match=re.escape(tokenizer.rpartition("../")[2])):
            node.execute(t5_name=name, precision="default", device="default")

    def test_a_tokenizer_that_loading_passes_by(self, models: Path) -> None:
        """Near a model of another kind, or behind a file that is read in its place."""
        put(models / "loras/one.safetensors")
        put(models / "text_encoders/t5.safetensors")
        put(models / "text_encoders/tokenizer.json")
        names = {("loras", "transformer"): "one.safetensors", ("text_encoders", "text_encoder"): "t5.safetensors"}
        before = [files.fingerprint(*kind, name) for kind, name in names.items()]
        put(models / "loras/tokenizer.json")
        put(models / "text_encoders/spiece.model")
        assert [files.fingerprint(*kind, name) for kind, name in names.items()] == before

    def test_names_that_are_linked_or_gone(self, models: Path) -> None:
        for loader in LOADERS:
            node = node_of(loader)
            assert node.validate_inputs() is True and node.fingerprint_inputs(**{loader[2]: None}) == ""
            assert node.fingerprint_inputs(**{loader[2]: "gone.safetensors"}) == ""

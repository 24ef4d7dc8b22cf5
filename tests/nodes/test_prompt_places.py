"""Where PixArtSavePrompt writes, whatever the prefix: PixArtLoadPrompt must see it."""
from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import host

errors = host.pack_module("pixart.errors")
nodes = host.pack_module("nodes.prompts")


def encode(clip) -> list:
    """A prompt."""
    return host.pack_module("nodes.text").PixArtTextEncode.execute(clip=clip, text="A red circle").result[0]


def save(conditioning: list, prefix: str) -> None:
    """Through the node."""
    nodes.PixArtSavePrompt.execute(conditioning, prefix)


@pytest.mark.parametrize(
    ("prefix", "name"),
    [("", "prompt"), (".", "prompt"), ("./", "prompt"), (" ", "prompt"), ("mine", "mine"), ("sub/mine", "sub/mine"),
     ("sub\\mine", "sub/mine"), ("sub/", "sub"), ("/mine", "mine"), ("./a//b", "a/b"), ("ä \u753b", "ä \u753b")],
)  # fmt: skip
def test_what_is_saved_can_be_loaded(prefix: str, name: str, clip, places: Path) -> None:
    for number in (1, 2):
        save(encode(clip), prefix)
        entry = f"{name}_{number:05}.safetensors [output]"
        assert entry in nodes.PixArtLoadPrompt.INPUT_TYPES()["required"]["prompt_file"][1]["options"]
        assert nodes.PixArtLoadPrompt.validate_inputs(entry) is True and nodes.PixArtLoadPrompt.execute(entry).result[0]
    assert nodes.PixArtLoadPrompt.validate_inputs(entry.replace("/", "\\")) is True


@pytest.mark.parametrize("prefix", ["..", "../x", "sub/../../x", "..\\x"])
def test_a_prefix_that_leads_out_of_the_folder_is_refused(prefix: str, clip, places: Path) -> None:
    with pytest.raises(errors.InputError, match="outside output/prompts"):
        save(encode(clip), prefix)
    assert not list(places.rglob("*.safetensors"))

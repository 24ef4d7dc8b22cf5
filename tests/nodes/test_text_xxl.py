"""T5-XXL files, which the host knows, go through its own loader; T5 of its SD3 and Flux CLIPs gives the same states."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nodes as host_nodes
from tests.support import host
from tests.support.host_text import node

encoder = host.pack_module("nodes.host.text_encoder")


class TestLoader:
    def test_own_classes_give_the_hosts_conditioning(self, slim: Path, monkeypatch) -> None:
        """With the host's T5 settings bent to the slim sizes, its loader is an independent reference."""
        import comfy.sd

        monkeypatch.setattr(comfy.sd, "detect_te_model", lambda state_dict: comfy.sd.TEModel.T5_XXL)
        weights = encoder.read_t5(slim)
        options = {"t5xxl_model_config": encoder.host_config(weights), "dtype": torch.float16}
        theirs = comfy.sd.load_clip([str(slim)], clip_type=comfy.sd.CLIPType.PIXART, model_options=options)
        ours = encoder._from_weights(slim, "fp16", {}, False)
        for prompt in ["", "a (red:1.3) cat on a sofa, 4k"]:
            assert theirs.tokenize(prompt) == ours.tokenize(prompt)
            expected = host_nodes.CLIPTextEncode().encode(theirs, prompt)[0][0][0]
            assert torch.equal(node(ours, prompt)[0], expected)

    @pytest.mark.parametrize(
        ("precision", "scaled", "by_host"),
        [("default", False, True), ("bf16", False, False), ("bf16", True, True), ("int8", True, False), ("nf4", True, False)],
    )
    def test_which_loader(self, precision: str, scaled: bool, by_host: bool, slim: Path, clip, monkeypatch) -> None:
        """A scaled fp8 file keeps its precision, but for one that takes other layers anyway."""
        import comfy.sd

        if scaled:
            header, start = encoder.safetensors_header(slim)
            scale = {"encoder.block.0.layer.0.SelfAttention.q.scale_weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}
            monkeypatch.setattr(encoder, "safetensors_header", lambda *_: ({**header, **scale}, start))
        calls = []
        monkeypatch.setattr(comfy.sd, "load_clip", lambda ckpt_paths, **options: calls.append((ckpt_paths, options)) or clip)
        monkeypatch.setattr(encoder, "_from_weights", lambda *a: clip)
        monkeypatch.setattr(clip.patcher, "cached_patcher_init", None, raising=False)
        encoder.load_t5(str(slim), precision, "cpu")
        assert bool(calls) is by_host
        if by_host:
            paths, options = calls[0]
            assert paths == [str(slim)] and options["clip_type"] == comfy.sd.CLIPType.PIXART
            assert options["model_options"]["load_device"] == torch.device("cpu")

    @pytest.mark.parametrize("change", ["a wrapper in one block", "keys of another model"])
    def test_names_that_the_host_does_not_know_are_not_for_its_loader(self, change: str, slim: Path, tmp_path: Path, monkeypatch) -> None:
        """It would leave such weights as they were in memory, or take the file for the other model."""
        import comfy.sd

        state = load_file(slim)
        if change == "a wrapper in one block":
            state = {key.replace("encoder.block.7.", "encoder.block.7._orig_mod."): value for key, value in state.items()}
        else:
            state["text_model.encoder.layers.0.mlp.fc1.weight"] = torch.zeros(2, 2)
        save_file(state, tmp_path / "t5xxl.safetensors")
        monkeypatch.setattr(comfy.sd, "load_clip", lambda *a, **k: pytest.fail("the host's loader was called"))
        loaded = encoder.load_t5(str(tmp_path / "t5xxl.safetensors"), "default", "default")
        assert torch.equal(node(loaded, "a cat")[0], node(encoder._from_weights(slim, "default", {}, False), "a cat")[0])


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_t5_of_an_sd3_or_flux_clip(family: str, slim: Path) -> None:
    """The host's real classes: padded T5 and CLIP-L streams; PixArt gets the same states as from its own loader."""
    from types import SimpleNamespace

    import comfy.sd
    import comfy.text_encoders.flux as flux
    import comfy.text_encoders.sd3_clip as sd3

    made = {
        "sd3": lambda: (sd3.sd3_clip(clip_l=True, clip_g=True, t5=True, dtype_t5=torch.float16), sd3.SD3Tokenizer),
        "flux": lambda: (flux.flux_clip(dtype_t5=torch.float16), flux.FluxTokenizer),
    }[family]()
    weights = encoder.read_t5(slim)
    narrow = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    options = {
        "t5xxl_model_config": encoder.host_config(weights), "clip_l_model_config": narrow, "clip_g_model_config": narrow,
        "dtype": torch.float16,
    }  # fmt: skip
    target = SimpleNamespace(clip=made[0], tokenizer=made[1], params={})
    other = comfy.sd.CLIP(target, parameters=1, model_options=options)
    other.cond_stage_model.t5xxl.load_sd(weights.tensors)
    own = encoder._from_weights(slim, "fp16", {}, False)
    for prompt in ["", "a cat on a sofa, 4k", "word " * 300]:
        expected = node(own, prompt, 120)
        states, shown = node(other, prompt, 120)
        assert torch.equal(states, expected[0]) and shown == expected[1]

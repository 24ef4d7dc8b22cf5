"""Text encoder files that are damaged, foreign, incomplete or malicious: refused by name, never partly loaded."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import host, tiny_text

errors = host.pack_module("pixart.errors")
text_nodes = host.pack_module("nodes.text")
encoder = host.pack_module("nodes.host.text_encoder")


class TestBadFiles:
    def refused(self, path: Path, kind=None) -> str:
        with pytest.raises(kind or errors.TextEncoderError) as caught:
            encoder.load_t5(str(path), "default", "default")
        assert str(path) in str(caught.value)
        return str(caught.value)

    def test_truncated(self, t5_file: Path, tmp_path: Path) -> None:
        (tmp_path / "t5.safetensors").write_bytes(t5_file.read_bytes()[:-50])
        assert "download" in self.refused(tmp_path / "t5.safetensors")

    def test_transformer_chosen_as_text_encoder(self, sigma_file: Path) -> None:
        assert "not a T5 encoder" in self.refused(sigma_file)

    def test_missing_keys(self, t5_file: Path, tmp_path: Path) -> None:
        state = load_file(t5_file)
        del state["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
        save_file(state, tmp_path / "t5.safetensors")
        assert "encoder.block.1.layer.1.DenseReluDense.wo.weight" in self.refused(tmp_path / "t5.safetensors")

    def test_nan(self, t5_file: Path, tmp_path: Path) -> None:
        state = load_file(t5_file)
        state["encoder.final_layer_norm.weight"][0] = torch.nan
        save_file(state, tmp_path / "t5.safetensors")
        assert "NaN" in self.refused(tmp_path / "t5.safetensors")

    @pytest.mark.parametrize("pages", [False, True], ids=["streamed", "at once"])
    def test_weights_too_large_for_fp8(self, pages: bool, t5_file: Path, tmp_path: Path, monkeypatch) -> None:
        """The host's cast would make them NaN."""
        state = load_file(t5_file)
        state["encoder.block.1.layer.1.DenseReluDense.wo.weight"][0, 0] = -450
        save_file(state, tmp_path / "t5.safetensors")
        monkeypatch.setattr(encoder, "pages_weights", lambda: pages)
        with pytest.raises(errors.TextEncoderError, match="t5.safetensors: .*wo.weight has a weight of 450; fp8_e4m3fn holds up to 448"):
            encoder.load_t5(str(tmp_path / "t5.safetensors"), "fp8_e4m3fn", "default")

    def test_no_tokenizer_for_its_vocabulary(self, reference, tmp_path: Path) -> None:
        path = tiny_text.save_t5_file(reference, tmp_path / "t5.safetensors", tokenizer=False)
        message = self.refused(path)
        assert "256 token embeddings" in message and "spiece.model beside it" in message

    def test_tokenizer_of_another_t5(self, reference, tmp_path: Path) -> None:
        path = tiny_text.save_t5_file(reference, tmp_path / "t5.safetensors")
        state = load_file(path)
        state["shared.weight"] = state["shared.weight"][:40].clone()
        save_file(state, path)
        assert "expected ids below 40" in self.refused(path)

    @pytest.mark.parametrize("inside", [True, False], ids=["tensor", "file"])
    def test_tokenizer_of_another_model(self, inside: bool, reference, tmp_path: Path) -> None:
        """Llama's order of the first ids; as the core says it."""
        path = tiny_text.save_t5_file(reference, tmp_path / "t5.safetensors", tokenizer=False)
        content = tiny_text.tokenizer_json(("<unk>", "<s>", "</s>")).encode()
        if inside:
            save_file({**load_file(path), "tokenizer_json": torch.tensor(list(content), dtype=torch.uint8)}, path)
        else:
            (tmp_path / "tokenizer.json").write_bytes(content)
        message = self.refused(path)
        assert "has end token 2 and no padding token, so it is another model's: every T5 has 1 and 0." in message
        with pytest.raises(errors.TextEncoderError) as caught:
            host.pack_module("pixart.text.encoder").load_text_encoder(path)
        assert str(caught.value) == message

    @pytest.mark.parametrize("content", [b"", b"junk" * 9], ids=["empty", "junk"])
    @pytest.mark.parametrize("inside", [True, False], ids=["tensor", "file"])
    def test_damaged_tokenizer(self, content: bytes, inside: bool, reference, tmp_path: Path) -> None:
        """As the core names it; without an end token, an empty one can't be a T5's."""
        if inside:
            path = tmp_path / "t5.safetensors"
            tiny_text.save_t5_file(reference, path, tokenizer=False)
            save_file({**load_file(path), "spiece_model": torch.tensor(list(content), dtype=torch.uint8)}, path)
        else:
            path = tiny_text.save_t5_folder(reference, tmp_path / "t5")
            (path / "spiece.model").write_bytes(content)
        message = self.refused(path)
        assert "is not a SentencePiece model" in message if content else "has no end token" in message
        with pytest.raises(errors.TextEncoderError) as caught:
            host.pack_module("pixart.text.encoder").load_text_encoder(path)
        assert str(caught.value) == message

    def test_tokenizer_of_numbers_that_are_no_bytes(self, t5_file: Path, tmp_path: Path) -> None:
        save_file({**load_file(t5_file), "spiece_model": torch.zeros(9, dtype=torch.bfloat16)}, tmp_path / "t5.safetensors")
        assert "spiece_model is torch.bfloat16; expected the bytes" in self.refused(tmp_path / "t5.safetensors")

    def test_names_outside_the_menu(self, models: Path) -> None:
        with pytest.raises(errors.PixArtError, match="not in the folder text_encoders"):
            text_nodes.PixArtT5Loader.execute(t5_name="../x", precision="default", device="default")

    @pytest.mark.parametrize("content", [b"", b"junk" * 50], ids=["empty", "junk"])
    @pytest.mark.parametrize("name", ["t5.pth", "t5.bin"])
    def test_damaged_pickles(self, name: str, content: bytes, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        assert "download" in self.refused(tmp_path / name)

    def test_pickle_of_another_model(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2)}}, tmp_path / "t5.pth")
        assert "a CLIP text encoder" in self.refused(tmp_path / "t5.pth")

    @pytest.mark.parametrize("name", ["t5.pth", "t5.bin", "t5.pt"])
    def test_pickle_with_code_is_not_run(self, name: str, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        torch.save({"state_dict": {"shared.weight": torch.zeros(2, 2), "x": Payload()}}, tmp_path / name)
        self.refused(tmp_path / name)
        assert not (tmp_path / "ran").exists()

    def test_pickle_with_keys_that_are_no_names(self, tmp_path: Path) -> None:
        torch.save({0: torch.zeros(2), ("a",): torch.zeros(2)}, tmp_path / "t5.bin")
        assert "the keys 0, ('a',) are not names" in self.refused(tmp_path / "t5.bin")

    @pytest.mark.parametrize("keep", [100, 5000, -50])
    def test_truncated_xxl(self, keep: int, slim: Path, tmp_path: Path) -> None:
        (tmp_path / "t5xxl.safetensors").write_bytes(slim.read_bytes()[:keep])
        assert "download" in self.refused(tmp_path / "t5xxl.safetensors")

    def test_misshapen_weights(self, t5_file: Path, tmp_path: Path) -> None:
        state = load_file(t5_file)
        state["encoder.block.1.layer.1.DenseReluDense.wo.weight"] = torch.zeros(32, 63)
        save_file(state, tmp_path / "t5.safetensors")
        assert "wo.weight has shape (32, 63), expected (32, 64)" in self.refused(tmp_path / "t5.safetensors")


class TestBadXXL:
    """Files that the host would load without complaint."""

    @pytest.fixture
    def refused(self, slim: Path, tmp_path: Path, monkeypatch):
        """Loads the slim XXL, edited, through the host's own loader with its settings bent to the slim sizes."""
        import comfy.sd

        config = {"t5xxl_model_config": encoder.host_config(encoder.read_t5(slim)), "dtype": torch.float16}
        host_loader = comfy.sd.load_clip
        monkeypatch.setattr(comfy.sd, "detect_te_model", lambda state_dict: comfy.sd.TEModel.T5_XXL)
        monkeypatch.setattr(
            comfy.sd, "load_clip", lambda ckpt_paths, clip_type, **_: host_loader(ckpt_paths, clip_type=clip_type, model_options=config)
        )

        def refused(edit) -> str:
            state = load_file(slim)
            edit(state)
            save_file(state, tmp_path / "t5xxl.safetensors")
            with pytest.raises(errors.TextEncoderError) as caught:
                encoder.load_t5(str(tmp_path / "t5xxl.safetensors"), "default", "default")
            assert str(tmp_path / "t5xxl.safetensors") in str(caught.value)
            return str(caught.value)

        return refused

    def test_missing_key(self, refused) -> None:
        key = "encoder.block.7.layer.0.SelfAttention.q.weight"
        assert f"missing {key}" in refused(lambda state: state.pop(key))

    def test_misshapen_weight(self, refused) -> None:
        key = "encoder.block.7.layer.0.SelfAttention.q.weight"
        assert f"{key} has shape (4, 4)" in refused(lambda state: state.update({key: torch.zeros(4, 4)}))

    @pytest.mark.parametrize("scale", [torch.ones(()), torch.ones(16, 1)], ids=["one scale", "a scale for each row, of the host alone"])
    def test_missing_key_of_a_scaled_file(self, scale: torch.Tensor, refused) -> None:
        def edit(state) -> None:
            state.update({"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)})
            for key in [key for key in state if key.endswith("SelfAttention.q.weight")]:
                state[key] = state[key].to(torch.float8_e4m3fn)
                state[key.replace(".weight", ".scale_weight")] = scale.clone()
            del state["encoder.block.7.layer.0.SelfAttention.q.weight"]

        assert "missing encoder.block.7.layer.0.SelfAttention.q.weight" in refused(edit)

    @pytest.mark.parametrize("key", ["encoder.block.9.layer.1.DenseReluDense.wo.weight", "encoder.final_layer_norm.weight"])
    def test_nan(self, key: str, refused) -> None:
        def edit(state) -> None:
            state[key].view(-1)[-1] = torch.nan

        assert f"NaN or infinite values in {key}" in refused(edit)

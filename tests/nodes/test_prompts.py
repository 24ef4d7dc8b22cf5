"""Prompt files, the three empty negatives, token limits and cleaning on the nodes."""
from __future__ import annotations

from pathlib import Path

import comfy.sd
import pytest
import torch
from safetensors.torch import load_file

import nodes as host_nodes
from tests.support import host, tiny_text
from tests.support.host_models import difference, load_model, sample, write_model

errors = host.pack_module("pixart.errors")
text_nodes = host.pack_module("nodes.text")
nodes = host.pack_module("nodes.prompts")
core = host.pack_module("pixart.text.prompt_file")
encoder = host.pack_module("nodes.host.text_encoder")
PROMPT = "A red circle above a blue square"


@pytest.fixture(scope="module")
def reference():
    return tiny_text.tiny_t5()


@pytest.fixture(scope="module")
def clip(reference, tmp_path_factory: pytest.TempPathFactory):
    path = tiny_text.save_t5_file(reference, tmp_path_factory.mktemp("t5") / "t5.safetensors")
    return encoder.load_t5(str(path), "default", "default")


def encode(clip, text: str = PROMPT, **options):
    return text_nodes.PixArtTextEncode.execute(clip=clip, text=text, **options).result[0]


def shown(clip, text: str, **options) -> str:
    return text_nodes.PixArtTextEncode.execute(clip=clip, text=text, **options).ui.as_dict()["text"][0]


class TestLimit:
    def test_auto_asks_the_model(self, clip, sigma, alpha_1024_file: Path) -> None:
        long = "red " * 400
        assert "300 of 300 tokens" in shown(clip, long) and "300 of 300 tokens" in shown(clip, long, model=sigma)
        assert "120 of 120 tokens" in shown(clip, long, model=load_model(alpha_1024_file))
        assert encode(clip, long, max_tokens="120")[0][0].shape[1] == 120
        assert encode(clip, long, max_tokens=7, model=sigma)[0][0].shape[1] == 7  # as in graphs of the first release

    def test_host_s_own_models(self, clip) -> None:
        """By family: they don't say more."""
        from types import SimpleNamespace

        import comfy.model_base
        import comfy.supported_models as supported

        for family, limit in ((supported.PixArtAlpha, 120), (supported.PixArtSigma, 300)):
            inner = comfy.model_base.PixArt.__new__(comfy.model_base.PixArt)
            torch.nn.Module.__init__(inner)
            inner.model_config, inner.diffusion_model = family({}), torch.nn.Module()
            assert text_nodes.token_limit("auto", SimpleNamespace(model=inner)) == limit

    def test_other_models_are_refused(self, clip) -> None:
        with pytest.raises(errors.InputError, match="expected a PixArt"):
            encode(clip, model=object())

    @pytest.mark.parametrize("wanted", ["0", 0, "many", "5000", "", -1, {}])
    def test_what_is_no_limit(self, wanted) -> None:
        assert "max_tokens is" in text_nodes.PixArtTextEncode.validate_inputs(wanted)
        assert text_nodes.PixArtTextEncode.validate_inputs("auto") is text_nodes.PixArtTextEncode.validate_inputs(300) is True
        assert text_nodes.PixArtTextEncode.validate_inputs(None) is True  # linked: known when it runs


class TestPreparation:
    def test_lower_case(self, clip, models: Path) -> None:
        assert torch.equal(encode(clip, "A RED Circle", lower_case=True)[0][0], encode(clip, "a red circle")[0][0])
        assert not torch.equal(encode(clip, "A RED Circle")[0][0], encode(clip, "a red circle")[0][0])
        prepare = host.pack_module("nodes.host.tokens").prepare_text
        assert prepare("A embedding:MyFile Cat", False, True) == "a embedding:MyFile cat"

    def test_clean_caption(self, clip) -> None:
        pytest.importorskip("ftfy")
        pytest.importorskip("bs4")
        messy = "<b>A red</b> (circle:1.2) https://example.com"
        assert torch.equal(encode(clip, messy, clean_caption=True)[0][0], encode(clip, "a red circle:1.2")[0][0])


class TestNegative:
    def negative(self, convention: str, **given) -> list:
        return nodes.PixArtNegative.execute(convention=convention, **given).result[0]

    def test_one_token(self, clip) -> None:
        found = self.negative(nodes.DIFFUSERS, clip=clip)
        assert torch.equal(found[0][0], host_nodes.CLIPTextEncode().encode(clip, "")[0][0][0]) and found[0][0].shape[1] == 1

    @pytest.mark.parametrize("length", [1, 2, 9])
    def test_prompt_length(self, clip, reference, length: int) -> None:
        """transformers, padded to 300 with the mask of the end token, seen through a mask of `length`."""
        ids, mask = torch.zeros(1, 300, dtype=torch.long), torch.zeros(1, 300, dtype=torch.long)
        ids[0, 0] = mask[0, 0] = 1
        with torch.no_grad():
            expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state[:, :length]
        positive = [[torch.zeros(1, length, 32), {}]]
        before = encode(clip, "a red circle")[0][0]
        found = self.negative(nodes.SIGMA, clip=clip, positive=positive)[0]
        torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-4)
        assert found[1].get("attention_mask") is None
        assert torch.equal(encode(clip, "a red circle")[0][0], before)  # the CLIP is as it was

    def test_padding_of_the_positive_doesn_t_count(self, clip, alpha_1024_file: Path) -> None:
        """The Sigma repository looks at the negative through the positive's mask; several prompts go by the longest."""
        mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0]])
        padded = [[torch.zeros(1, 9, 32), {"attention_mask": mask}]]
        table = load_model(alpha_1024_file)
        assert self.negative(nodes.SIGMA, clip=clip, positive=padded)[0][0].shape == (1, 4, 32)
        assert self.negative(nodes.ALPHA, model=table, positive=padded)[0][0].shape[1] == 4
        both = [*padded, [torch.zeros(1, 6, 32), {}]]
        assert self.negative(nodes.SIGMA, clip=clip, positive=both)[0][0].shape == (1, 6, 32)
        long = [[torch.zeros(1, 140, 32), {"attention_mask": torch.nn.functional.pad(mask, (0, 131))}]]
        assert self.negative(nodes.ALPHA, model=table, positive=long)[0][0].shape[1] == 4

    def test_empty_positive(self, clip) -> None:
        with pytest.raises(errors.InputError, match="positive conditioning is empty"):
            self.negative(nodes.SIGMA, clip=clip, positive=[])

    def test_null_embedding_of_an_fp8_model_is_not_in_fp8(self, tmp_path: Path) -> None:
        """Its three bits would be 2 to 4 % off in every guided step."""
        path = write_model(tmp_path, null_rows=300)
        stored = load_file(path)["y_embedder.y_embedding"]
        found = host.pack_module("nodes.host.family").null_caption_of(load_model(path, weight_dtype="fp8_e4m3fn"))
        assert difference(found, stored) < 4e-3

    def test_loaded_states_lie_where_the_encoders_own_do(self, tmp_path: Path, monkeypatch) -> None:
        """On the card with --gpu-only: else ConditioningConcat would mix devices."""
        module = host.pack_module("nodes.host.prompts")
        embeddings = host.pack_module("pixart.text.embeddings").TextEmbeddings(torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool), (3,), ("",))
        host.pack_module("pixart.text.prompt_file").save_prompts(tmp_path / "p.safetensors", embeddings, ("red",))
        monkeypatch.setattr(module.management, "intermediate_device", lambda: torch.device("meta"))
        assert module.load(tmp_path / "p.safetensors", None)[0][0][0].device.type == "meta"

    def test_null_embedding(self, clip, alpha_1024_file: Path) -> None:
        model = load_model(alpha_1024_file)
        positive = encode(clip, "a red circle", max_tokens=120)
        found = self.negative(nodes.ALPHA, model=model, positive=positive)[0][0]
        table = model.model.diffusion_model.y_embedder.y_embedding
        assert torch.equal(found[0], table[: positive[0][0].shape[1]].float())
        with pytest.raises(errors.InputError, match="121 tokens, the null embedding 120"):
            self.negative(nodes.ALPHA, model=model, positive=[[torch.zeros(1, 121, 32), {}]])

    def test_all_three_draw(self, clip, tmp_path: Path) -> None:
        model = load_model(write_model(tmp_path, null_rows=300))
        positive = encode(clip)
        given = {"clip": clip, "positive": positive, "model": model}
        drawn = [sample(model, positive, self.negative(name, **given)) for name in (nodes.DIFFUSERS, nodes.SIGMA, nodes.ALPHA)]
        assert all(torch.isfinite(each).all() for each in drawn)
        assert not torch.allclose(drawn[0], drawn[1]) and not torch.allclose(drawn[1], drawn[2])

    def test_what_is_missing_is_named(self, clip, tmp_path: Path) -> None:
        positive = encode(clip)
        for convention, given, name in (
            (nodes.DIFFUSERS, {}, "clip"), (nodes.SIGMA, {"clip": clip}, "positive"),
            (nodes.SIGMA, {"positive": positive}, "clip"), (nodes.ALPHA, {"positive": positive}, "model"),
        ):  # fmt: skip
            with pytest.raises(errors.InputError, match=f"needs {name}"):
                self.negative(convention, **given)
        without = load_model(write_model(tmp_path, kind="diffusers-file"))
        with pytest.raises(errors.InputError, match="no null embedding"):
            self.negative(nodes.ALPHA, positive=positive, model=without)


def save(conditioning, prefix: str = "mine", prompt: str = "") -> str:
    return nodes.PixArtSavePrompt.execute(conditioning, prefix, prompt).ui.as_dict()["text"][0]


class TestFiles:
    def test_there_and_back(self, clip, places: Path, sigma) -> None:
        given = encode(clip, PROMPT, max_tokens=4)
        assert save(given) == "prompts/mine_00001.safetensors"
        save(given)  # nothing is overwritten
        name = "mine_00001.safetensors [output]"
        assert nodes.PixArtLoadPrompt.INPUT_TYPES()["required"]["prompt_file"][1]["options"] == [name, "mine_00002.safetensors [output]"]
        out = nodes.PixArtLoadPrompt.execute(name, sigma)
        found = out.result[0]
        assert torch.equal(found[0][0], given[0][0])
        text = out.ui.as_dict()["text"][0]
        assert PROMPT in text and "4 tokens, t5-32x2-" in text and "cut: " in text and "square" in text
        assert torch.equal(sample(sigma, found, encode(clip, "")), sample(sigma, given, encode(clip, "")))
        assert save(found, "again") and core.load_prompts(places / "output/prompts/again_00001.safetensors").prompts == (PROMPT,)

    def test_size_and_mask_are_kept(self, clip, places: Path) -> None:
        states, values = encode(clip)[0]
        mask = torch.ones(states.shape[:2], dtype=torch.long)
        mask[:, -1] = 0
        save([[states, {**values, "width": 640, "height": 480, "attention_mask": mask}]], prompt="my words")
        entry = nodes.PixArtLoadPrompt.execute("mine_00001.safetensors [output]").result[0][0][1]
        assert (entry["width"], entry["height"]) == (640, 480) and torch.equal(entry["attention_mask"], mask.bool())
        assert entry["pixart_prompt"]["prompt"] == "my words"

    @pytest.mark.parametrize("limit", ["300", "7"])
    def test_a_note_that_became_stale_is_left_out(self, limit: str, clip, places: Path) -> None:
        """The host's nodes change states and keep what else there is; a cut prompt has more tokens than states."""
        given = encode(clip, PROMPT + " and a star" * 2, max_tokens=limit)
        joined = host_nodes.ConditioningConcat().concat(given, encode(clip, "star"))[0]
        zeroed = host_nodes.ConditioningZeroOut().zero_out(given)[0]
        for name, changed in (("joined", joined), ("zeroed", zeroed)):
            save(changed, name)
            found = core.load_prompts(places / f"output/prompts/{name}_00001.safetensors")
            assert found.prompts == found.embeddings.truncated == ("",) and found.encoder == ""
            assert found.embeddings.token_counts == (changed[0][0].shape[1],)
        save(joined, "told", "both")
        assert core.load_prompts(places / "output/prompts/told_00001.safetensors").prompts == ("both",)
        save(given, "same")
        again = nodes.PixArtLoadPrompt.execute("same_00001.safetensors [output]").result[0]
        assert again[0][1]["pixart_prompt"] == given[0][1]["pixart_prompt"]
        save(host_nodes.ConditioningConcat().concat(again, again)[0], "twice")
        assert core.load_prompts(places / "output/prompts/twice_00001.safetensors").prompts == ("",)

    def test_pipeline_and_node_share_files(self, clip, places: Path, reference, tmp_path: Path) -> None:
        """The core's writer and reader, on the node's file and the other way round."""
        save(encode(clip))
        found = core.load_prompts(places / "output/prompts/mine_00001.safetensors", 32)
        core.save_prompts(places / "input/prompts/from_core.safetensors", found.embeddings, ("from the core",), found.encoder)
        out = nodes.PixArtLoadPrompt.execute("from_core.safetensors")
        assert torch.equal(out.result[0][0][0], encode(clip)[0][0]) and "from the core" in out.ui.as_dict()["text"][0]

    def test_another_width_is_refused_by_name(self, sigma, places: Path) -> None:
        save([[torch.zeros(1, 3, 48), {"pooled_output": None}]])
        with pytest.raises(errors.InputError, match="mine_00001.safetensors was made by an encoder 48 wide.*32 wide"):
            nodes.PixArtLoadPrompt.execute("mine_00001.safetensors [output]", sigma)

    @pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "absent.safetensors", "link.safetensors", ""])
    def test_names_outside_the_folders(self, name: str, places: Path) -> None:
        (places / "input/prompts").mkdir()
        for where in (places / "secret.safetensors", places / "input/secret.safetensors"):
            core.save_prompts(where, core.TextEmbeddings(torch.zeros(1, 1, 32), torch.ones(1, 1, dtype=torch.bool)))
        (places / "input/prompts/link.safetensors").symlink_to(places / "secret.safetensors")
        assert "is not a prompt file" in nodes.PixArtLoadPrompt.validate_inputs(name)
        with pytest.raises(errors.InputError, match="is not a prompt file"):
            nodes.PixArtLoadPrompt.execute(name)

    @pytest.mark.parametrize("prefix", ["../../out", "/tmp/out"])
    def test_prefix_outside_the_output_folder(self, prefix: str, clip, places: Path) -> None:
        before = sorted(places.rglob("*.safetensors"))
        try:
            save(encode(clip), prefix)
        except Exception as error:  # the host's own guard
            assert "outside" in str(error)
        for path in set(places.rglob("*.safetensors")) - set(before):
            assert path.is_relative_to(places / "output")
        assert not list(Path("/tmp").glob("out_0*.safetensors"))

    def test_changes_are_noticed(self, clip, places: Path) -> None:
        save(encode(clip))
        name = "mine_00001.safetensors [output]"
        first = nodes.PixArtLoadPrompt.fingerprint_inputs(name)
        other = core.TextEmbeddings(torch.zeros(1, 9, 32), torch.ones(1, 9) > 0)
        core.save_prompts(places / "output/prompts/mine_00001.safetensors", other)
        assert nodes.PixArtLoadPrompt.fingerprint_inputs(name) != first and nodes.PixArtLoadPrompt.validate_inputs(name) is True

    def test_what_a_file_can_t_keep_is_refused(self, clip, places: Path) -> None:
        (states, values), = encode(clip)
        with pytest.raises(errors.InputError, match="also holds area, strength"):
            save([[states, {**values, "area": (1, 1, 0, 0), "strength": 1.0}]])
        with pytest.raises(errors.InputError, match="2 prompts; expected one"):
            save([*encode(clip), *encode(clip)])
        with pytest.raises(errors.InputError, match=r"shape \(1, 768\)"):
            save([[torch.zeros(1, 768), {}]])
        assert not list(places.rglob("*.safetensors"))


@pytest.mark.parametrize("precision", ["default", "fp32", "bf16", "fp16", "fp8_e4m3fn", "int8", "nf4"])
def test_fingerprint_is_the_core_s(precision: str, reference, tmp_path: Path) -> None:
    """Of the same file in the same precision, so that files of both can be told to be of one encoder."""
    if precision in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    path = tiny_text.save_t5_file(reference, tmp_path / "t5.safetensors")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    stored = None if dtype or precision == "default" else precision
    expected = host.pack_module("pixart.text.encoder").load_text_encoder(path, dtype=dtype, precision=stored).fingerprint
    found = encode(encoder.load_t5(str(path), precision, "default"))[0][1]["pixart_prompt"]["encoder"]
    assert found == expected and found.startswith("t5-32x2-")


def test_weights_of_a_foreign_kind_encode_without_a_fingerprint(clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a tensor class of another pack, that refuses to be looked into."""

    class Foreign:
        def __getitem__(self, rows):
            raise KeyError("packed")

    tokens = host.pack_module("nodes.host.tokens")
    shared = type("Embedding", (), {"weight": Foreign()})()
    transformer = clip.cond_stage_model.t5xxl.transformer
    strange = type("T5", (), {"shared": shared, "encoder": transformer.encoder})()
    stream = type("Stream", (), {"transformer": strange})()
    other = type("CLIP", (), {"cond_stage_model": type("Model", (), {"t5xxl": stream})()})()
    assert tokens._fingerprint(other) == ""


def test_conditioning_survives_the_host(clip, sigma) -> None:
    """The note on the prompt passes through the host's own nodes."""
    both = host_nodes.ConditioningCombine().combine(encode(clip), encode(clip, "star"))[0]
    assert torch.isfinite(sample(sigma, both, encode(clip, ""))).all()
    assert comfy.sd.CLIP is type(clip)

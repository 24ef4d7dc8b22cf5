"""The pipeline against diffusers' PixArt pipelines on the same weights and noise."""
import logging

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from pixart import Pipeline
from pixart.cpu import fastest_dtype
from pixart.errors import InputError, UnsupportedError
from pixart.sampling import make_scheduler
from pixart.text.encoder import TextEmbeddings
from tests.support.tiny_pipeline import CAPTION_WIDTH, make_parts, padded_embeddings
from tests.support.tiny_text import save_t5_folder, tiny_t5

PROMPTS = ["a red circle above a blue square", "small star"]
FAST = {"steps": 2, "progress": False}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("sigma"))


@pytest.fixture(scope="module")
def pipe(parts):
    return Pipeline.from_files(transformer=parts.folder, text_encoder=parts.folder, vae=parts.folder)


def assert_near(found, expected, tolerance=1e-5):
    """Relative error of the whole tensor; random weights make latents of any size."""
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < tolerance


def run_diffusers(pipeline_class, parts, prompts, negatives, length, **options):
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    theirs = pipeline_class(None, None, parts.vae, parts.transformer, scheduler)
    theirs.set_progress_bar_config(disable=True)
    states, mask = padded_embeddings(parts.t5, prompts, length)
    if negatives:
        negative_states, negative_mask = padded_embeddings(parts.t5, negatives, length)
        options |= {"negative_prompt_embeds": negative_states, "negative_prompt_attention_mask": negative_mask}
    # a negative prompt must be None beside negative embeddings
    result = theirs(prompt_embeds=states, prompt_attention_mask=mask, negative_prompt=None, **options)
    return result.images


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_sigma_pictures_equal_diffusers(parts, pipe, guidance):
    latents = torch.randn(2, 4, 26, 38, generator=torch.manual_seed(5))
    expected = run_diffusers(
        diffusers.PixArtSigmaPipeline, parts, PROMPTS, ["", ""] if guidance > 1 else None, 300, latents=latents,
        num_inference_steps=4, guidance_scale=guidance, width=300, height=200, output_type="np",
    )  # fmt: skip
    found = pipe(PROMPTS, steps=4, guidance=guidance, width=300, height=200, latents=latents, output="np", progress=False)
    assert found.shape == expected.shape == (2, 200, 300, 3)
    assert expected.std() > 0.01  # not a blank picture
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_alpha_micro_conditioned_latents_equal_diffusers(tmp_path):
    parts = make_parts(tmp_path, pixels=1024, micro=True, scale=0.18215)
    ours = Pipeline.from_files(transformer=tmp_path, text_encoder=tmp_path, variant="alpha-1024")
    assert (ours.base_size, ours.max_tokens) == (1024, 120)
    latents = torch.randn(1, 4, 64, 256, generator=torch.manual_seed(5))
    expected = run_diffusers(
        diffusers.PixArtAlphaPipeline, parts, PROMPTS[:1], ["tree"], 120, latents=latents, num_inference_steps=2,
        width=1600, height=400, output_type="latent",
    )  # fmt: skip
    found = ours(PROMPTS[0], "tree", width=1600, height=400, latents=latents, output="latent", **FAST)
    assert_near(found, expected)


def test_defaults_are_those_of_diffusers_sigma_pipeline():
    import inspect

    theirs = inspect.signature(diffusers.PixArtSigmaPipeline.__call__).parameters
    ours = inspect.signature(Pipeline.__call__).parameters
    for name, other in {
        "steps": "num_inference_steps", "guidance": "guidance_scale", "images_per_prompt": "num_images_per_prompt",
        "use_bins": "use_resolution_binning", "negative_prompt": "negative_prompt",
    }.items():  # fmt: skip
        assert ours[name].default == theirs[other].default
    scheduler = make_scheduler()
    assert (scheduler.config.algorithm_type, scheduler.config.solver_order) == ("dpmsolver++", 2)
    assert scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    "scheduler", [diffusers.DDIMScheduler(prediction_type="v_prediction"), diffusers.FlowMatchEulerDiscreteScheduler()]
)
def test_a_scheduler_for_another_prediction_is_refused(pipe, scheduler):
    other = Pipeline(pipe.transformer, pipe.text_encoder, pipe.vae, scheduler=scheduler)
    with pytest.raises(InputError, match="prediction_type"):
        other("star", **FAST)


@pytest.mark.parametrize("scheduler", [diffusers.LCMScheduler(), diffusers.DDIMScheduler(trained_betas=[0.1, 0.2])])
def test_a_scheduler_with_other_betas_is_refused_and_its_remedy_works(pipe, scheduler):
    other = Pipeline(pipe.transformer, pipe.text_encoder, pipe.vae, scheduler=scheduler)
    with pytest.raises(InputError, match="beta_start=0.0001, beta_end=0.02, beta_schedule='linear'"):
        other("star", **FAST)
    mended = type(scheduler).from_config(scheduler.config, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None)
    latent = Pipeline(pipe.transformer, pipe.text_encoder, pipe.vae, scheduler=mended)("star", output="latent", **FAST)
    assert latent.isfinite().all()


def test_seed_gives_the_noise_of_diffusers_and_the_same_picture_twice(pipe):
    first = pipe("red", seed=7, output="latent", **FAST)
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first, pipe("red", latents=noise, output="latent", **FAST))
    assert not torch.allclose(first, pipe("red", seed=8, output="latent", **FAST))


def test_one_seed_a_picture_makes_each_independent_of_its_batch(pipe):
    batch = pipe("red", seed=[7, 8], images_per_prompt=2, output="latent", **FAST)
    alone = pipe("red", seed=8, output="latent", **FAST)
    assert_near(batch[1:], alone)


def test_a_prompt_does_not_depend_on_its_neighbours(pipe):
    together = pipe(PROMPTS, seed=[1, 2], output="latent", **FAST)
    for index, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, seed=index + 1, output="latent", **FAST)
        assert_near(together[index : index + 1], alone)


def test_images_per_prompt_keeps_prompts_together(pipe):
    found = pipe(PROMPTS, seed=[1, 1, 1, 1], images_per_prompt=2, output="latent", **FAST)
    assert_near(found[0], found[1])
    assert_near(found[2], found[3])
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_conditional_and_unconditional_are_one_forward_a_step(pipe):
    shapes = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: shapes.append((args[0].shape, args[2].shape)))
    try:
        pipe(PROMPTS, "night", seed=0, output="latent", steps=3, progress=False)
        assert len(shapes) == 3 and all(latent[0] == context[0] == 4 for latent, context in shapes)
        shapes.clear()
        pipe(PROMPTS, guidance=1.0, seed=0, output="latent", steps=3, progress=False)
        assert [latent[0] for latent, _ in shapes] == [2, 2, 2]
    finally:
        hook.remove()


def test_embeddings_in_and_out(pipe):
    expected = pipe(PROMPTS, "tree", seed=3, output="latent", **FAST)
    embeds, negative = pipe.encode(PROMPTS), pipe.encode("tree")
    bare = Pipeline(pipe.transformer, vae=pipe.vae, base_size=256)
    found = bare(prompt_embeds=embeds, negative_prompt_embeds=negative, seed=3, output="latent", **FAST)
    assert torch.equal(found, expected)
    with pytest.raises(InputError, match="no text encoder"):
        bare(prompt_embeds=embeds, seed=3, **FAST)  # the negative prompt needs one
    bare(prompt_embeds=embeds, seed=3, guidance=1, output="latent", **FAST)


def test_negative_prompt_matters_and_may_differ_by_prompt(pipe):
    plain = pipe(PROMPTS, seed=3, output="latent", **FAST)
    negated = pipe(PROMPTS, ["", "tree"], seed=3, output="latent", **FAST)
    assert_near(plain[0], negated[0])
    assert not torch.allclose(plain[1], negated[1], atol=1e-3)
    with pytest.raises(InputError, match="3 negative prompts for 2 prompts"):
        pipe(PROMPTS, ["a", "b", "c"], **FAST)


def test_prompts_are_lower_cased_as_diffusers_does_unless_told(pipe):
    assert torch.equal(pipe.encode("A Red STAR ").states, pipe.encode("a red star").states)
    assert not torch.equal(pipe.encode("A Red STAR", lower_case=False).states, pipe.encode("a red star").states)


@pytest.mark.parametrize("use_bins", [True, False])
@pytest.mark.parametrize("size", [(17, 33), (256, 256), (250, 131), (1, 1)])
def test_any_wanted_size_comes_out(pipe, size, use_bins):
    width, height = size
    images = pipe("red", width=width, height=height, use_bins=use_bins, seed=0, guidance=1, steps=1, progress=False)
    assert images[0].size == size and images[0].mode == "RGB"


def test_sizes_without_bins_are_drawn_as_they_are(pipe, caplog):
    with caplog.at_level(logging.WARNING, logger="pixart"):
        assert pipe("red", width=256, height=256, use_bins=False, output="latent", **FAST).shape[-2:] == (32, 32)
        assert not caplog.records
        assert pipe("red", width=600, height=300, use_bins=False, output="latent", **FAST).shape[-2:] == (38, 75)
    assert caplog.text.count("nearest is 352x176: use_bins=True draws it") == 1
    latents = torch.randn(1, 4, 5, 3)
    assert pipe("red", latents=latents, output="pt", **FAST).shape == (1, 3, 40, 24)


def test_a_size_far_from_every_bin_is_reported_with_the_remedy(pipe, caplog):
    with caplog.at_level(logging.WARNING, logger="pixart"):
        pipe("red", width=100, height=90, output="latent", **FAST)
        assert not caplog.records
        pipe("red", width=2000, height=2000, output="latent", **FAST)
        pipe("red", width=1000, height=100, output="latent", **FAST)
    assert "2000x2000 is far" in caplog.text and "nearest is 512x128: it is drawn at that size" in caplog.text


def test_latents_of_another_shape_are_refused(pipe):
    with pytest.raises(InputError, match=r"expected \(2, 4, 32, 32\)"):
        pipe(PROMPTS, latents=torch.randn(1, 4, 32, 32), width=256, height=256, **FAST)


def test_outputs(pipe):
    run = {"seed": 1, "width": 200, "height": 100, **FAST}
    picture, array, tensor = (pipe("red", output=kind, **run) for kind in ("pil", "np", "pt"))
    assert array.shape == (1, 100, 200, 3) and tensor.shape == (1, 3, 100, 200)
    assert 0 <= array.min() and array.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(np.asarray(picture[0]), array[0] * 255, atol=0.51)


def test_callback_sees_every_step_and_can_stop(pipe):
    seen = []
    pipe("red", steps=3, progress=False, output="latent", callback=lambda *step: seen.append(step))
    assert [index for index, _, _ in seen] == [0, 1, 2] and seen[0][1] == 999
    assert seen[0][2].shape == (1, 4, 32, 32)
    seen.clear()
    stopped = pipe("red", steps=9, seed=1, progress=False, output="latent", callback=lambda i, t, x: seen.append(x) or i < 2)
    assert len(seen) == 3 and torch.equal(stopped, seen[-1])

    def explode(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("red", progress=False, callback=explode)
    pipe("red", output="latent", **FAST)  # and it works again


@pytest.mark.parametrize("prompt", ["", "red " * 10_000])
def test_empty_and_endless_prompts(pipe, prompt):
    assert torch.isfinite(pipe(prompt, seed=0, output="latent", **FAST)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width": 0}, "width is 0; expected 1 to 16384"),
        ({"height": -5, "use_bins": False}, "height is -5"),
        ({"width": 10**7}, "16384"),
        ({"steps": 0}, "steps is 0; expected a whole number, 1 to 1000"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": "4.5"}, "guidance is '4.5'"),
        ({"guidance": None}, "guidance is None"),
        ({"images_per_prompt": 0}, "images_per_prompt"),
        ({"output": "jpg"}, "pil, np, pt, latent"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"seed": 2**70}, "seed is"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
        ({"prompt": []}, "No prompts"),
        ({"prompt": None}, "Give either prompt or prompt_embeds"),
        ({"prompt": 5}, "prompt is 5; expected a string"),
        ({"prompt": [5]}, "expected a string or a list"),
    ],
)
def test_bad_input_is_named(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe(**{"prompt": "red", "progress": False, **options})


def test_embeddings_of_another_width_are_refused(pipe):
    wide = TextEmbeddings(torch.zeros(1, 3, 99), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(InputError, match=rf"\(prompts, tokens, {CAPTION_WIDTH}\)"):
        pipe(prompt_embeds=wide, **FAST)


def test_parts_that_do_not_fit_are_refused_before_anything_runs(parts, pipe, tmp_path):
    save_t5_folder(tiny_t5(width=48), tmp_path, pipeline=True)
    with pytest.raises(InputError, match="48 wide.*32 wide"):
        Pipeline.from_files(transformer=parts.folder, text_encoder=tmp_path)
    with pytest.raises(InputError, match='output="latent"'):
        Pipeline(pipe.transformer, pipe.text_encoder)("red", **FAST)


def test_fp16_weights_run_in_what_the_cpu_is_fast_in_unless_told(parts, tmp_path):
    half = parts.transformer.half()
    half.save_pretrained(tmp_path)
    half.float()
    assert Pipeline.from_files(transformer=tmp_path).dtype == fastest_dtype(torch.float16) != torch.float16
    assert Pipeline.from_files(transformer=tmp_path, dtype=torch.float16).dtype == torch.float16


def test_bf16_runs_and_fp16_overflow_is_an_error(parts, pipe):
    half = Pipeline.from_files(
        transformer=parts.folder, text_encoder=parts.folder, vae=parts.folder, dtype=torch.bfloat16
    )
    found = half("red", seed=1, output="latent", **FAST)
    assert found.dtype == torch.float32
    cosine = torch.cosine_similarity(found.flatten(), pipe("red", seed=1, output="latent", **FAST).flatten(), dim=0)
    assert cosine > 0.98
    hook = pipe.transformer.register_forward_hook(lambda module, args, result: result * float("inf"))
    try:
        with pytest.raises(UnsupportedError, match="NaN or infinite"):
            pipe("red", output="latent", **FAST)
    finally:
        hook.remove()

"""Workflows of few steps: consistency models, one-step models, and an ordinary model with the optimized schedule."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .. import DISTILLED
from .builder import DEMO, DEMO_NOTE, PROMPT, Workflow, alpha, sigma
from .family import FamilyWorkflow, from_folder

LCM_NOTE = """

LCM needs no negative prompt: with cfg 1 each step is one forward pass. The scheduler "simple" gives LCM's own timesteps
(999, 759, 499, 259 in four steps). For LCM-LoRA and Flash, load their base model and add PixArtLoraLoader before LCM sampling.
Put adapter_config.json beside the LoRA file: its lora_alpha / r decides how strong the LoRA is."""
OPTIMIZED_NOTE = """

The timesteps of the schedule "optimized" were found by a search, for 4 to 16 steps of dpmpp_2m. More of them lie at low noise than in
sgm_uniform. How much that helps depends on the model. Compare it with KSampler, sgm_uniform and as many steps."""


def few_step_consistency() -> Workflow:
    """PixArt-delta's LCM: four steps without guidance. LCM-LoRA and Flash run the same way."""
    flow = from_folder(alpha("PixArt-XL-2-1024-MS.pth"), "PixArt-alpha/PixArt-LCM-XL-2-1024-MS")
    flow.note += LCM_NOTE
    model, t5, vae = flow.loaders("alpha-1024")
    sampling = flow.add("ModelSamplingDiscrete", "LCM sampling", 1, 3, model=[model, 0], sampling="lcm", zsnr=False)
    positive = flow.text("Prompt", t5, PROMPT, 120, 0)
    negative = flow.text("Negative prompt", t5, "", 120, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base="1024", width=1024, height=1024, batch_size=1)
    settings = {"steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple"}
    flow.decode(flow.sample("Sampler", sampling, positive, negative, [size, 0], **settings), vae, "pixart-lcm")
    return flow


def one_step() -> Workflow:
    """PixArt-DMD: one step at timestep 400."""
    flow = from_folder(alpha("PixArt-XL-2-512x512.pth"), "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512")
    model, t5, vae = flow.loaders("alpha-512")
    positive = flow.text("Prompt", t5, PROMPT, 120, 0)
    negative = flow.text("Negative prompt", t5, "", 120, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base="512", width=512, height=512, batch_size=1)
    step = flow.add("PixArtOneStep", "One step", 1, 3, model=[model, 0], timestep=400)
    sampled = flow.sample_custom("Sampler", model, positive, negative, [size, 0], [step, 0], [step, 1], cfg=1.0)
    flow.decode(sampled, vae, "pixart-dmd")
    return flow


DISTILLED_NOTE = """
{file} -> demo/weights/loras
Made with: python -m pixart train configs/train/{recipe}.json

{advice} Bypass the LoRA to see what the model draws in so few steps without it.
"""


def demo_distilled(kind: str, recipe: str, advice: str) -> tuple[FamilyWorkflow, str, tuple[str, str], str, list[Any]]:
    """The demo with a LoRA that distils it: the flow, its model, prompts, VAE and empty latent."""
    file = DISTILLED[kind].name
    flow = FamilyWorkflow(DEMO, DEMO_NOTE + DISTILLED_NOTE.format(file=file, recipe=recipe, advice=advice))
    model, t5, vae = flow.loaders("demo")
    model = flow.add("PixArtLoraLoader", "Distilled LoRA", 1, 0, model=[model, 0], lora_name=file, strength=1.0)
    texts = flow.text("Prompt", t5, "a red circle above a blue square", 300, 1), flow.text("Negative prompt", t5, "", 300, 2)
    size = flow.add("PixArtResolution", "Size", 1, 3, base="256", width=256, height=256, batch_size=1)
    return flow, model, texts, vae, [size, 0]


def demo_few_steps() -> Workflow:
    """The demo in four steps, by the LCM-LoRA that this project distilled."""
    flow, model, texts, vae, latent = demo_distilled("lcm", "demo-lcm-lora", "Four steps without guidance (cfg 1).")
    sampling = flow.add("ModelSamplingDiscrete", "LCM sampling", 1, 4, model=[model, 0], sampling="lcm", zsnr=False)
    settings = {"steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple"}
    flow.decode(flow.sample("Sampler", sampling, *texts, latent, **settings), vae, "pixart-lcm-demo")
    return flow


def demo_one_step() -> Workflow:
    """The demo in one step, by distribution matching."""
    flow, model, texts, vae, latent = demo_distilled("dmd", "demo-dmd", "One step from noise at timestep 400, without guidance (cfg 1).")
    step = flow.add("PixArtOneStep", "One step", 1, 4, model=[model, 0], timestep=400)
    sampled = flow.sample_custom("Sampler", model, *texts, latent, [step, 0], [step, 1], cfg=1.0)
    flow.decode(sampled, vae, "pixart-dmd-demo")
    return flow


def optimized() -> Workflow:
    """An ordinary model in ten steps, at timesteps that were searched for few."""
    weights = sigma("PixArt-Sigma-XL-2-1024-MS.pth")
    flow = FamilyWorkflow(weights, weights.note() + OPTIMIZED_NOTE)
    model, t5, vae = flow.loaders("sigma-1024")
    texts = flow.text("Prompt", t5, PROMPT, 300, 0), flow.text("Negative prompt", t5, "", 300, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base="1024", width=1024, height=1024, batch_size=1)
    solver = flow.add("KSamplerSelect", "Solver", 1, 3, sampler_name="dpmpp_2m")
    levels = flow.add(
        "PixArtTimesteps", "Optimized steps", 1, 4, model=[model, 0], timesteps="999, 759, 499, 259", schedule="optimized", steps=10
    )
    sampled = flow.sample_custom("Sampler", model, *texts, [size, 0], [solver, 0], [levels, 0], cfg=4.5)
    flow.decode(sampled, vae, "pixart-optimized")
    return flow


FEW_STEPS_WORKFLOWS: Mapping[str, Callable[[], Workflow]] = {
    "lcm": few_step_consistency,
    "dmd": one_step,
    "lcm-demo": demo_few_steps,
    "dmd-demo": demo_one_step,
    "optimized": optimized,
}

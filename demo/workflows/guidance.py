"""Workflows with adapters and guidance: a stack of LoRA, perturbed attention, a prompt for each region."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .builder import DEMO, DEMO_NOTE, Workflow


def lora_stack() -> Workflow:
    """Two LoRA, one after the other; each can be bypassed."""
    names = ("pixart-demo-red-blue.safetensors", "pixart-demo-green-yellow.safetensors")
    note = "\nTwo LoRAs that swap colours: red with blue, and green with yellow. The prompt's red and green come out as blue and yellow. "
    note += "Bypass one (Ctrl+B) to turn it off.\n\n" + "\n".join(f"{name} -> demo/weights/loras" for name in names)
    flow = Workflow(DEMO, DEMO_NOTE + note)
    model, t5, vae = flow.loaders("demo")
    for row, name in enumerate(names):
        model = flow.add("PixArtLoraLoader", f"LoRA {row + 1}", 1, row, model=[model, 0], lora_name=name, strength=1.0)
    positive = flow.text("Prompt", t5, "a red circle left of a green square", 300, 2)
    negative = flow.text("Negative prompt", t5, "", 300, 3)
    size = flow.add("PixArtResolution", "Size", 1, 4, base="256", width=256, height=256, batch_size=1)
    flow.decode(flow.sample("Sampler", model, positive, negative, [size, 0]), vae, "pixart-lora-stack")
    return flow


def perturbed_attention() -> Workflow:
    """Perturbed-attention guidance on top of CFG, and the same picture without it."""
    note = "\nThe upper sampler uses PixArtPAG, the lower one doesn't. For PixArt XL use block 14 and scale 3 to 5."
    flow = Workflow(DEMO, DEMO_NOTE + note)
    model, t5, vae = flow.loaders("demo")
    guided = flow.add(
        "PixArtPAG", "Perturbed-attention guidance", 1, 0, model=[model, 0], kind="perturbed attention", blocks="4", scale=2.0,
        start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    positive = flow.text("Prompt", t5, "a green triangle left of a yellow square", 300, 1)
    negative = flow.text("Negative prompt", t5, "", 300, 2)
    size = flow.add("PixArtResolution", "Size", 1, 3, base="256", width=256, height=256, batch_size=1)
    for row, (title, chosen, prefix) in enumerate((("With PAG", guided, "pixart-pag"), ("Without", model, "pixart-pag-off"))):
        flow.decode(flow.sample(title, chosen, positive, negative, [size, 0], row), vae, prefix, row)
    return flow


def regional_prompts() -> Workflow:
    """One prompt for each half of a wide picture; each half has a size that the model was trained at."""
    note = "\nEach half has its own prompt, and a size that the model was trained at. x, y, width and height are in pixels."
    flow = Workflow(DEMO, DEMO_NOTE + note)
    model, t5, vae = flow.loaders("demo")
    areas = []
    halves = (("Left", "a red circle on a white background"), ("Right", "a blue square on a white background"))
    for row, (side, prompt) in enumerate(halves):
        text = flow.text(f"{side} half", t5, prompt, 300, row)
        place = {"width": 256, "height": 256, "x": 256 * row, "y": 0}
        areas.append(flow.add("ConditioningSetArea", f"{side} area", 2, row + 1, conditioning=[text, 0], strength=1.0, **place))
    both = {"conditioning_1": [areas[0], 0], "conditioning_2": [areas[1], 0]}
    positive = flow.add("ConditioningCombine", "Both halves", 2, 3, **both)
    negative = flow.text("Negative prompt", t5, "", 300, 2)
    size = flow.add("EmptyLatentImage", "Size", 1, 3, width=512, height=256, batch_size=1)
    flow.decode(flow.sample("Sampler", model, positive, negative, [size, 0]), vae, "pixart-regional-prompts")
    return flow


GUIDANCE_WORKFLOWS: Mapping[str, Callable[[], Workflow]] = {
    "lora-stack": lora_stack,
    "pag": perturbed_attention,
    "regional-prompts": regional_prompts,
}

"""Workflows of the rest of the family: SA-Solver, ControlNet, two stages, refiner, decoder, inpainting at full size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from launch.workflow_ui import Placement

from .builder import DEMO, DEMO_NOTE, HUGGING_FACE, PROMPT, Weights, Workflow, alpha, sigma

SA_SOLVER_NOTE = """
SA-Solver with the settings of the PixArt-alpha paper: predictor and corrector of order 2, 25 steps, cfg 3, noise (tau 1) for
0.2 <= t <= 0.8. The extra 0.001 in both percents keeps the steps at the borders on the same side as in the paper's code."""
TWO_STAGE_NOTE = """

Stage 1 was trained for timesteps 999 to 400, stage 2 for 400 to 0. With 20 steps of sgm_uniform, step 12 is timestep 400.
With another number of steps, hand over after 0.6 of them."""


@dataclass(frozen=True)
class File:
    """A file beside a model's three, and where it comes from; `url` is empty where there is no single file to download."""

    name: str
    url: str
    directory: str
    page: str = ""  # for the note, in place of an address

    def note(self) -> str:
        """Folder and origin."""
        return f"{self.name} -> models/{self.directory}\n{self.url or self.page}"

    def models(self) -> list[dict[str, str]]:
        """What the missing-models dialog needs."""
        return [{"name": self.name, "url": self.url, "directory": self.directory}] if self.url else []


class FamilyWorkflow(Workflow):
    """A workflow with nodes that text to image has no need of."""

    def load(self, kind: str, title: str, column: int, row: int, widget: str, file: File, **inputs: Any) -> str:
        """A loader node of a file beside the model's three; the note names it."""
        number = self.add(kind, title, column, row, **{widget: file.name}, **inputs)
        self.places[number] = Placement(column, row, file.models())
        self.note += f"\n\n{file.note()}"
        return number

    def sample_part(
        self, title: str, model: str, texts: tuple[str, str], latent: list[Any], start: int, end: int, leftover: bool = False, row: int = 0
    ) -> str:
        """Some of 20 steps with the defaults of PixArt-Sigma; the first part adds the noise, `leftover` keeps what is left of it."""
        return self.add(
            "KSamplerAdvanced", title, 2, row, model=[model, 0], add_noise="disable" if start else "enable", noise_seed=0, steps=20,
            cfg=4.5, sampler_name="dpmpp_2m", scheduler="sgm_uniform", positive=[texts[0], 0], negative=[texts[1], 0],
            latent_image=latent, start_at_step=start, end_at_step=end, return_with_leftover_noise="enable" if leftover else "disable",
        )  # fmt: skip

    def sample_custom(
        self, title: str, model: str, positive: str, negative: str, latent: list[Any], sampler: list[Any], sigmas: list[Any], cfg: float
    ) -> str:
        """A SamplerCustom with its own sampler and sigmas."""
        return self.add(
            "SamplerCustom", title, 2, 0, model=[model, 0], add_noise=True, noise_seed=0, cfg=cfg, positive=[positive, 0],
            negative=[negative, 0], sampler=sampler, sigmas=sigmas, latent_image=latent,
        )  # fmt: skip

    def sample_controlled(self, model: str, texts: tuple[str, str], control: str, hint: str, vae: str, latent: list[Any]) -> str:
        """A KSampler whose prompts are under a ControlNet."""
        applied = self.add(
            "ControlNetApplyAdvanced", "Apply ControlNet", 2, 1, positive=[texts[0], 0], negative=[texts[1], 0], control_net=[control, 0],
            image=[hint, 0], vae=[vae, 0], strength=1.0, start_percent=0.0, end_percent=1.0,
        )  # fmt: skip
        sampler = self.sample("Sampler", model, applied, applied, latent)
        self.graph[sampler]["inputs"]["negative"] = [applied, 1]
        return sampler


def from_folder(base: Weights, repository: str) -> FamilyWorkflow:
    """A workflow of `base` with the transformer of a diffusers repository, as a folder of the repository's name."""
    name = repository.split("/")[1]
    weights = replace(base, transformer=name, transformer_url="")
    row = f"{name} -> models/diffusion_models\n"
    return FamilyWorkflow(weights, weights.note().replace(row, f"{row}{HUGGING_FACE}/{repository} (the folder transformer)", 1))


DELTA_CONTROLNET = File(
    "PixArt-XL-2-1024-ControlNet.pth",
    f"{HUGGING_FACE}/PixArt-alpha/PixArt-ControlNet/resolve/main/PixArt-XL-2-1024-ControlNet.pth",
    "controlnet",
)
HED = File("ControlNetHED.pth", f"{HUGGING_FACE}/PixArt-alpha/PixArt-alpha/resolve/main/ControlNetHED.pth", "controlnet")
STAGE_2_REPOSITORY = "terminusresearch/pixart-900m-1024-ft-v0.7-stage2"
STAGE_2 = File(
    STAGE_2_REPOSITORY.split("/")[1], "", "diffusion_models", f"{HUGGING_FACE}/{STAGE_2_REPOSITORY} (the folder transformer)"
)
SDXL_REFINER = File(
    "sd_xl_refiner_1.0.safetensors",
    f"{HUGGING_FACE}/stabilityai/stable-diffusion-xl-refiner-1.0/resolve/main/sd_xl_refiner_1.0.safetensors",
    "checkpoints",
)
CONSISTENCY_DECODER = File("consistency-decoder", "", "vae", f"{HUGGING_FACE}/openai/consistency-decoder (config.json and weights)")


def sa_solver() -> Workflow:
    """SA-Solver as the paper sets it: order 2, 25 steps, guidance 3, noise for 0.2 <= t <= 0.8."""
    flow = FamilyWorkflow(DEMO, DEMO_NOTE + SA_SOLVER_NOTE)
    model, t5, vae = flow.loaders("demo")
    positive = flow.text("Prompt", t5, "a red circle above a blue square", 300, 0)
    negative = flow.text("Negative prompt", t5, "", 300, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base="256", width=256, height=256, batch_size=1)
    solver = flow.add(
        "SamplerSASolver", "SA-Solver", 1, 3, model=[model, 0], eta=1.0, sde_start_percent=0.201, sde_end_percent=0.801,
        s_noise=1.0, predictor_order=2, corrector_order=2, use_pece=False, simple_order_2=True,
    )  # fmt: skip
    steps = flow.add("BasicScheduler", "Steps", 1, 4, model=[model, 0], scheduler="sgm_uniform", steps=25, denoise=1.0)
    sampled = flow.sample_custom("Sampler", model, positive, negative, [size, 0], [solver, 0], [steps, 0], cfg=3.0)
    flow.decode(sampled, vae, "pixart-sa-solver")
    return flow


def controlnet() -> Workflow:
    """PixArt-delta's ControlNet: the soft edges of a picture drawn anew."""
    weights = alpha("PixArt-XL-2-1024-MS.pth")
    flow = FamilyWorkflow(weights, weights.note())
    model, t5, vae = flow.loaders("alpha-1024")
    positive = flow.text("Prompt", t5, PROMPT, 120, 0)
    negative = flow.text("Negative prompt", t5, "", 120, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base="1024", width=1024, height=1024, batch_size=1)
    control = flow.load("PixArtControlNetLoader", "ControlNet", 0, 3, "control_net_name", DELTA_CONTROLNET)
    picture = flow.add("LoadImage", "Picture", 0, 4, image="pixart-scene.png")
    fitted = flow.add("PixArtCropToSize", "Fit to size", 1, 3, image=[picture, 0], width=[size, 1], height=[size, 2])
    edges = flow.load("PixArtHED", "Edges", 1, 4, "hed_name", HED, image=[fitted, 0])
    sampled = flow.sample_controlled(model, (positive, negative), control, edges, vae, [size, 0])
    flow.decode(sampled, vae, "pixart-controlnet")
    return flow


def demo_controlnet() -> Workflow:
    """The same with the demo's own ControlNet, which reads the host's Canny edges."""
    note = (
        "\npixart-demo-controlnet.safetensors -> demo/weights/controlnet\n"
        "Make it with: python -m pixart train configs/train/demo-controlnet.json\n"
        "\nOutlines come from the picture, colours from the prompt.\n"
    )
    flow = FamilyWorkflow(
        DEMO, DEMO_NOTE + note + "\nThe picture is demo/inputs/pixart-scene.png; put it, or your own, in ComfyUI's input folder."
    )
    model, t5, vae = flow.loaders("demo")
    positive = flow.text("Prompt", t5, "a blue circle above a green square", 300, 0)
    negative = flow.text("Negative prompt", t5, "", 300, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base="256", width=256, height=256, batch_size=1)
    control = flow.add("PixArtControlNetLoader", "ControlNet", 0, 3, control_net_name="pixart-demo-controlnet.safetensors")
    picture = flow.add("LoadImage", "Picture", 0, 4, image="pixart-scene.png")
    fitted = flow.add("PixArtCropToSize", "Fit to size", 1, 3, image=[picture, 0], width=[size, 1], height=[size, 2])
    edges = flow.add("Canny", "Edges", 1, 4, image=[fitted, 0], low_threshold=0.1, high_threshold=0.3)
    sampled = flow.sample_controlled(model, (positive, negative), control, edges, vae, [size, 0])
    flow.decode(sampled, vae, "pixart-controlnet-demo")
    return flow


def two_stages() -> Workflow:
    """900M v0.7: stage 1 draws the composition, down to timestep 400, stage 2 the details."""
    flow = from_folder(sigma("PixArt-Sigma-XL-2-1024-MS.pth"), "terminusresearch/pixart-900m-1024-ft-v0.7-stage1")
    flow.note += TWO_STAGE_NOTE
    first, t5, vae = flow.loaders("sigma-900m")
    second = flow.load(
        "PixArtModelLoader", "PixArt model, stage 2", 0, 3, "model_name", STAGE_2, variant="sigma-900m", weight_dtype="default"
    )
    positive = flow.text("Prompt", t5, PROMPT, 300, 0)
    negative = flow.text("Negative prompt", t5, "", 300, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base="1024", width=1024, height=1024, batch_size=1)
    texts = (positive, negative)
    noisy = flow.sample_part("Sampler, stage 1", first, texts, [size, 0], 0, 12, leftover=True)
    flow.decode(flow.sample_part("Sampler, stage 2", second, texts, [noisy, 0], 12, 10000, row=1), vae, "pixart-900m")
    return flow


def refiner() -> Workflow:
    """Sigma's latent straight into the SDXL refiner: both speak the SDXL VAE's language."""
    weights = sigma("PixArt-Sigma-XL-2-1024-MS.pth")
    flow = FamilyWorkflow(weights, weights.note())
    model, t5, vae = flow.loaders("sigma-1024")
    positive = flow.text("Prompt", t5, PROMPT, 300, 0)
    negative = flow.text("Negative prompt", t5, "", 300, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base="1024", width=1024, height=1024, batch_size=1)
    drawn = flow.sample("Sampler", model, positive, negative, [size, 0])
    loaded = flow.load("CheckpointLoaderSimple", "SDXL refiner", 0, 3, "ckpt_name", SDXL_REFINER)
    texts = [
        flow.add("CLIPTextEncodeSDXLRefiner", title, 1, row, ascore=score, width=[size, 1], height=[size, 2], text=text, clip=[loaded, 1])
        for title, row, score, text in (("Refiner prompt", 3, 6.0, PROMPT), ("Refiner negative prompt", 4, 2.5, ""))
    ]
    settings = {"denoise": 0.3, "cfg": 5.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    flow.decode(flow.sample("Refiner", loaded, *texts, [drawn, 0], row=1, **settings), vae, "pixart-sdxl-refiner")
    return flow


def consistency_decoder() -> Workflow:
    """alpha's latent decoded by DALL-E 3's consistency decoder, which draws small faces and letters better."""
    weights = alpha("PixArt-XL-2-1024-MS.pth")
    flow = FamilyWorkflow(weights, weights.note().rpartition("\n\n")[0])  # without the VAE that the decoder replaces
    model = flow.add(
        "PixArtModelLoader", "PixArt model", 0, 0, model_name=weights.transformer, variant="alpha-1024", weight_dtype="default"
    )
    t5 = flow.add("PixArtT5Loader", "T5 text encoder", 0, 1, t5_name=weights.t5, precision="default", device="default")
    vae = flow.load("PixArtConsistencyDecoder", "Consistency decoder", 0, 2, "vae_name", CONSISTENCY_DECODER)
    positive = flow.text("Prompt", t5, PROMPT, 120, 0)
    negative = flow.text("Negative prompt", t5, "", 120, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base="1024", width=1024, height=1024, batch_size=1)
    flow.decode(flow.sample("Sampler", model, positive, negative, [size, 0]), vae, "pixart-consistency-decoder")
    return flow


def inpaint_released() -> Workflow:
    """Only the masked part of a picture drawn anew, by Sigma-1024."""
    weights = sigma("PixArt-Sigma-XL-2-1024-MS.pth")
    advice = "\n\nPaint a mask on the picture (right click); both are cropped to the trained size nearest to 1024x1024."
    flow = FamilyWorkflow(weights, weights.note() + advice)
    model, t5, vae = flow.loaders("sigma-1024")
    positive = flow.text("Prompt", t5, PROMPT, 300, 0)
    negative = flow.text("Negative prompt", t5, "", 300, 1)
    size = flow.add("PixArtResolution", "Size", 1, 2, base="1024", width=1024, height=1024, batch_size=1)
    picture = flow.add("LoadImage", "Picture and mask", 0, 3, image="pixart-inpaint.png")
    painted = flow.add("MaskToImage", "Mask as picture", 1, 5, mask=[picture, 1])
    fitted, cut = (
        flow.add("PixArtCropToSize", title, 1, row, image=[source, 0], width=[size, 1], height=[size, 2])
        for title, row, source in (("Fit picture", 3, picture), ("Fit mask", 6, painted))
    )
    mask = flow.add("ImageToMask", "Mask", 1, 7, image=[cut, 0], channel="red")
    encoded = flow.add("VAEEncode", "Encode", 1, 4, pixels=[fitted, 0], vae=[vae, 0])
    latent = flow.add("SetLatentNoiseMask", "Draw only the mask", 1, 8, samples=[encoded, 0], mask=[mask, 0])
    flow.decode(flow.sample("Sampler", model, positive, negative, [latent, 0]), vae, "pixart-inpaint-sigma-1024")
    return flow


FAMILY_WORKFLOWS: Mapping[str, Callable[[], Workflow]] = {
    "sa-solver": sa_solver,
    "controlnet": controlnet,
    "controlnet-demo": demo_controlnet,
    "900m-two-stage": two_stages,
    "sdxl-refiner": refiner,
    "consistency-decoder": consistency_decoder,
    "inpaint-sigma-1024": inpaint_released,
}

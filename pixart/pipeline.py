"""Text to pictures: prompts -> T5 -> transformer and DPM-Solver++ -> VAE -> pictures of the wanted size."""
from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import merge_file
from .canvas import Canvas, canvas_of_latents, choose_canvas, crop_to_wanted
from .checkpoints.load import load_transformer
from .config import get_variant
from .cpu import fastest_dtype
from .errors import InputError
from .guidance import PerturbedGuidance
from .habits import plain_number, unknown_arguments
from .kv_compress import KVCompression
from .logs import get_logger
from .model import PIXELS_PER_LATENT, PixArtTransformer
from .output import check_output, to_output
from .samplers import DPMSolver, Sampler, find_sampler, sampler_for
from .sampling import Callback, Preview, Source, check_scheduler, denoise, initial_noise, make_scheduler, sources_of
from .sampling_note import SamplingNote, read_note
from .schedules import USUAL, timesteps_of
from .text.captions import prepare
from .text.encoder import TextEmbeddings, TextEncoder, concatenate, load_text_encoder
from .text.given import check_embeddings, given_embeddings
from .text.prompt_file import save_prompts
from .vae import Vae, load_vae

logger = get_logger(__name__)

MAX_STEPS = 1000  # timesteps of the training schedule
MAX_STRENGTH = 100


class Pipeline:
    """Draws pictures from prompts. `from_files` loads one; the parts may also be given one by one.

    base_size: pixels whose bins are used; max_tokens: of a prompt; latent_scale is the VAE's concern.
    scheduler: any of diffusers' for noise prediction on PixArt's betas (default DPM-Solver++ 2M).
    """

    def __init__(
        self,
        transformer: PixArtTransformer,
        text_encoder: TextEncoder | None = None,
        vae: Vae | None = None,
        *,
        base_size: int = 1024,
        max_tokens: int = 300,
        scheduler: Any = None,
    ) -> None:
        config = transformer.config
        if text_encoder is not None and text_encoder.width != config.caption_channels:
            raise InputError(
                f"The text encoder is {text_encoder.width} wide, but the transformer was trained on captions "
                f"{config.caption_channels} wide. Give the T5 that belongs to the model "
                "(T5-v1.1-XXL, 4096 wide, for the released ones)."
            )
        if vae is not None and vae.latent_channels != config.in_channels:
            raise InputError(
                f"The VAE's latents have {vae.latent_channels} channels, the transformer's {config.in_channels}. "
                "Give the VAE the model was trained with."
            )
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.vae = vae
        self.base_size = base_size
        self.max_tokens = max_tokens
        self.scheduler = scheduler
        self.note: SamplingNote | None = None  # how the loaded weights are to be sampled, where they were distilled

    @classmethod
    def from_files(
        cls,
        transformer: str | Path,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        tokenizer: str | Path | None = None,
        variant: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        ema: bool = False,
        text_precision: str | None = None,
    ) -> Pipeline:
        """Loads every part; each path is a file or folder, also a diffusers pipeline's folder.

        Without a text encoder, calls need `prompt_embeds`; without a VAE, `output="latent"`.
        dtype: of transformer and T5 (default: as stored, but on a CPU `cpu.fastest_dtype` chooses the transformer's);
        the VAE runs in fp32 unless dtype is bf16. text_precision: int8, nf4, fp4 or fp8_e4m3fn for T5's linear layers.
        """
        model = load_transformer(transformer, variant=variant, dtype=dtype, device=device, ema=ema)
        if dtype is None and torch.device(device).type == "cpu":
            model.to(fastest_dtype(getattr(torch, model.detection.dtype)))
        found = model.detection
        encoder = load_text_encoder(text_encoder, tokenizer, dtype, device, text_precision) if text_encoder else None
        # The SDXL VAE overflows in fp16.
        vae_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        decoder = load_vae(vae, found.latent_scale, vae_dtype, device, found.latent_shift) if vae else None
        base = found.base_size or get_variant(found.variant).base_size
        made = cls(model, encoder, decoder, base_size=base, max_tokens=found.max_tokens)
        made._heed(transformer)
        return made

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return next(self.transformer.parameters()).dtype

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        steps: int = 20,
        guidance: float = 4.5,
        width: int | None = None,
        height: int | None = None,
        use_bins: bool = True,
        seed: int | Sequence[int] | None = None,
        images_per_prompt: int = 1,
        latents: Tensor | None = None,
        prompt_embeds: TextEmbeddings | Tensor | str | Path | None = None,
        negative_prompt_embeds: TextEmbeddings | Tensor | str | Path | None = None,
        lower_case: bool = True,
        clean_caption: bool = False,
        output: str = "pil",
        callback: Callback | None = None,
        progress: bool = True,
        kv_compression: KVCompression | Sequence[KVCompression] | None = (),
        perturbed: PerturbedGuidance | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        sampler: Sampler | str | None = None,
        preview: Preview | None = None,
        schedule: str = USUAL,
        **unknown: Any,
    ) -> Any:
        """Draws images_per_prompt pictures for each prompt; defaults are those of diffusers' Sigma pipeline.

        width, height: wanted pixels (default: the model's base size); with use_bins the nearest trained
        size is drawn, then resized and cropped. guidance <= 1 runs without the negative prompt.
        seed: one for the whole batch, or one a picture. latents: initial noise (B, C, h, w), unit variance.
        prompt_embeds, negative_prompt_embeds: from `encode`, a prompt file, or states (B, M, C) as diffusers gives them, with
        their mask (B, M) in the argument of that name (default: every token is real). None for a prompt is the empty one.
        clean_caption: by the reference's rules (`pip install ftfy beautifulsoup4`); they lower-case too.
        sampler: a name in `pixart.samplers`, or one from there with settings of its own (default: the pipeline's scheduler).
        callback(step, timestep, latents): returning False ends sampling there. preview(step, latents): the picture as foreseen.
        schedule: "usual", or "optimized" for 4 to 16 steps of dpm++: more of them at low noise.
        kv_compression: training-free, an approximation that makes large pictures cheaper; see `kv_compress`.
        perturbed: perturbed-attention or skip-layer guidance; one more forward per step.
        output: "pil" -> list of pictures, "np" -> (B, H, W, 3) and "pt" -> (B, 3, H, W) in 0..1,
        "latent" -> (B, C, h, w) in the model's latent space. Numbers may be numpy's. Raises InputError, also for an argument
        that it doesn't have.
        """
        if unknown:
            raise InputError(unknown_arguments(unknown, inspect.signature(self.__call__).parameters))
        steps, images_per_prompt, guidance = (plain_number(value) for value in (steps, images_per_prompt, guidance))
        self._check(steps, guidance, images_per_prompt, output)
        timesteps = timesteps_of(schedule, steps)
        scheduler = self._scheduler(sampler, steps, guidance, chosen=timesteps is not None)
        given = {
            "prompt_embeds": (prompt_embeds, prompt_attention_mask),
            "negative_prompt_embeds": (negative_prompt_embeds, negative_prompt_attention_mask),
        }
        width_of_captions = self.transformer.config.caption_channels
        embeds = [given_embeddings(name, *parts, width_of_captions) for name, parts in given.items()]
        positive, negative = self._embed(prompt, negative_prompt, *embeds, guidance > 1, (lower_case, clean_caption))
        batch = positive.states.shape[0] * images_per_prompt
        canvas = self._canvas(width, height, use_bins, latents)
        source = sources_of(seed, batch)
        noise = self._noise(batch, canvas, source, latents)
        context = positive.repeat(images_per_prompt)
        if negative is not None:
            context = concatenate(negative.repeat(images_per_prompt), context)
        size = None
        if self.transformer.config.micro_condition:
            size = torch.tensor([positive.size or (canvas.drawn_height, canvas.drawn_width)], device=self.device)
        found = denoise(
            self.transformer,
            noise,
            context.to(self.device, self.dtype),
            scheduler,
            steps=steps,
            guidance=None if negative is None else guidance,
            size=size,
            callback=callback,
            progress=progress,
            kv_compression=kv_compression,
            perturbed=perturbed,
            source=source,
            preview=preview,
            timesteps=timesteps,
        )
        return found if output == "latent" else to_output(self._decode(found, canvas), output)

    def load_lora(self, path: str | Path, strength: float = 1.0, text_strength: float | None = None) -> str:
        """Merges an adapter (LoRA, LoHa, LoKr, DoRA, OFT ...) into the loaded weights, of T5 too if it has such layers.

        path: a file of any trainer, or a PEFT folder; it stays as it is. strength: 1 as trained, negative for the opposite; several add
        up. text_strength: of the layers of T5, as `strength` if None; 0 leaves them out. Returns one line, which is
        logged too: how much was applied, and what was left out because nothing is lost without it. To take an adapter
        off exactly, load the pipeline anew. Raises CheckpointError and InputError, and then changes nothing: an
        adapter is applied whole or not at all.
        """
        strength, text_strength = plain_number(strength), plain_number(strength if text_strength is None else text_strength)
        for name, value in (("strength", strength), ("text_strength", text_strength)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_STRENGTH:
                raise InputError(f"{name} is {value!r}; expected a number from -{MAX_STRENGTH} to {MAX_STRENGTH}, usually 0 to 1.")
        fit = merge_file(path, strength, self.transformer, getattr(self.text_encoder, "model", None), text_strength)
        logger.log(logging.WARNING if fit.left else logging.INFO, "LoRA %s", fit.describe())
        if strength > 0:
            self._heed(path)
        return fit.describe()

    def _heed(self, path: str | Path) -> None:
        """Draws from now on as a distilled model's file says, unless a sampler or scheduler is given, and logs it."""
        note = read_note(path)
        if note is not None:
            self.note = note
            logger.info("%s: %s", Path(path).name, note.describe())

    def encode(
        self,
        prompts: str | Sequence[str],
        max_tokens: int | None = None,
        lower_case: bool = True,
        clean_caption: bool = False,
    ) -> TextEmbeddings:
        """T5 states of prompts, for `prompt_embeds`; lower-cased and stripped, or cleaned, as diffusers does it."""
        if self.text_encoder is None:
            raise InputError("This pipeline has no text encoder: give text_encoder= when loading, or prompt_embeds=.")
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"prompt is {prompts!r}; expected a string or a list of strings.")
        texts = [prepare(text, clean_caption, lower_case) for text in texts]
        return self.text_encoder.encode(texts, max_tokens or self.max_tokens)

    def save_prompt(self, path: str | Path, prompt: str | Sequence[str], **preparation: Any) -> Path:
        """Encodes as `encode` does into a file for `prompt_embeds`, which PixArt Load Prompt reads too (ComfyUI's input/prompts)."""
        settings = {"max_tokens": self.max_tokens, "lower_case": True, "clean_caption": False, **preparation}
        found = self.encode(prompt, **settings)
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        return save_prompts(path, found, prompts, self.text_encoder.fingerprint, **settings)

    def _check(self, steps: int, guidance: float, images_per_prompt: int, output: str) -> None:
        for name, value, limit in (("steps", steps, MAX_STEPS), ("images_per_prompt", images_per_prompt, 10_000)):
            if not isinstance(value, int) or not 1 <= value <= limit:
                raise InputError(f"{name} is {value!r}; expected a whole number, 1 to {limit}.")
        if not isinstance(guidance, Real) or not 0 <= guidance < 1e4:
            raise InputError(f"guidance is {guidance!r}; expected 0 to 10000, usually 1 to 10.")
        check_output(output)
        if self.vae is None and output != "latent":
            raise InputError('This pipeline has no VAE: give vae= when loading, or ask for output="latent".')

    def _scheduler(self, sampler: Sampler | str | None, steps: int, guidance: float, chosen: bool) -> Any:
        """chosen: its timesteps come from a schedule of `schedules`."""
        if sampler is None and self.scheduler is None and self.note is not None:
            sampler = sampler_for(self.note)
        if sampler is not None:
            found = find_sampler(sampler, self.note)
            found.check(steps, guidance)
            if chosen and not isinstance(found, DPMSolver):
                raise InputError(f"The optimized schedule is made for the sampler {DPMSolver.name}, not {found.name}; use the usual one.")
            return found.scheduler()
        if self.scheduler is None:
            return make_scheduler()
        check_scheduler(self.scheduler)
        return self.scheduler

    def _embed(
        self, prompt: str | Sequence[str] | None, negative_prompt: str | Sequence[str], embeds: TextEmbeddings | None,
        negative_embeds: TextEmbeddings | None, guided: bool, preparation: tuple[bool, bool],
    ) -> tuple[TextEmbeddings, TextEmbeddings | None]:  # fmt: skip
        """Embeddings of the prompts and, with guidance, as many of the negative prompts."""
        if (prompt is None) == (embeds is None):
            raise InputError("Give either prompt or prompt_embeds" + (", not both." if embeds is not None else "."))
        positive = embeds if embeds is not None else self.encode(prompt, None, *preparation)
        negative = None
        if guided:
            negative = negative_embeds
            if negative is None:
                negative = self.encode("" if negative_prompt is None else negative_prompt, None, *preparation)
        for name, part in (("prompt_embeds", positive), ("negative_prompt_embeds", negative)):
            if part is not None:
                check_embeddings(name, part, self.transformer.config.caption_channels)
        count = positive.states.shape[0]
        if negative is not None and negative.states.shape[0] not in (1, count):
            raise InputError(f"{negative.states.shape[0]} negative prompts for {count} prompts; expected 1 or {count}.")
        if negative is not None and negative.states.shape[0] != count:
            negative = negative.repeat(count)
        return positive, negative

    def _canvas(self, width: int | None, height: int | None, use_bins: bool, latents: Tensor | None) -> Canvas:
        step = self._pixels_per_latent
        if latents is not None and latents.ndim == 4 and width is None and height is None:
            return canvas_of_latents(latents, step)
        return choose_canvas(
            self.base_size if width is None else width, self.base_size if height is None else height, self.base_size, use_bins, step
        )

    @property
    def _pixels_per_latent(self) -> int:
        return self.vae.pixels_per_latent if self.vae is not None else PIXELS_PER_LATENT

    def _noise(self, batch: int, canvas: Canvas, source: Source, latents: Tensor | None) -> Tensor:
        step = self._pixels_per_latent
        shape = (batch, self.transformer.config.in_channels, canvas.drawn_height // step, canvas.drawn_width // step)
        if latents is None:
            return initial_noise(shape, source).to(self.device)
        if tuple(latents.shape) != shape:
            raise InputError(f"latents have shape {tuple(latents.shape)}; expected {shape} for these prompts and size.")
        return latents.to(self.device, torch.float32)

    def _decode(self, latents: Tensor, canvas: Canvas) -> Tensor:
        """Pictures (B, 3, height, width) in 0..1, of the wanted size."""
        return crop_to_wanted(self.vae.decode(latents), canvas).clamp(0, 1)

"""Guidance away from a weakened prediction of the same model, through the host's post-CFG hook."""
from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.samplers
from torch import Tensor

from ...pixart.errors import InputError
from ...pixart.guidance import PERTURBED_ATTENTION, PerturbedGuidance, parse_blocks
from .transformer import IDENTITY_BLOCKS, SKIPPED_BLOCKS, HostTransformer


def guide_by_perturbation(model: Any, kind: str, blocks: str, scale: float, start: float, end: float) -> Any:
    """A clone of MODEL whose guided prediction is pushed away from one with changed blocks.

    guided + scale * (cond - perturbed): equation 13 of arXiv:2403.17377 on top of CFG, as diffusers' PAG pipelines
    have it; linear, so the same for noise and for denoised latents. kind: of pixart.guidance. start, end: part of
    the noise schedule, 0 to 1. Raises InputError for blocks that the model doesn't have, an empty range, and other models.
    """
    network = model.model.diffusion_model
    if not isinstance(network, HostTransformer):
        raise InputError(f"This MODEL is {type(network).__name__}, in which blocks can't be perturbed. Load PixArt with PixArtModelLoader.")
    PerturbedGuidance(blocks, scale, kind, start, end)  # raises for values that the pipeline refuses too
    chosen = tuple(sorted(parse_blocks(blocks, network.config.depth)))
    sampling = model.get_model_object("model_sampling")
    highest, lowest = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    always = start <= 0 and end >= 1  # reading sigma waits for the GPU

    def guide(args: dict[str, Any]) -> Tensor:
        """Called by the host's sampler after CFG, at each step."""
        if scale == 0 or not (always or lowest <= args["sigma"][0].item() <= highest):
            return args["denoised"]
        conds = [_weakened(args["cond"], kind, chosen)]
        (perturbed,) = comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])
        return args["denoised"] + scale * (args["cond_denoised"] - perturbed)

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(guide)
    return patched


def _weakened(conds: list[dict[str, Any]], kind: str, blocks: tuple[int, ...]) -> list[dict[str, Any]]:
    """A copy of the host's conditions that tells the network, and the ControlNets, which blocks to weaken."""
    name = IDENTITY_BLOCKS if kind == PERTURBED_ATTENTION else SKIPPED_BLOCKS
    told = {name: comfy.conds.CONDConstant(blocks)}
    return [{**cond, "model_conds": {**cond["model_conds"], **told}} for cond in conds]

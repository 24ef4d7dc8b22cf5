"""Few-step models: timesteps as SIGMAS, and the one step of DMD."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pixart.logs import get_logger
from ..pixart.schedules import FEWEST, MOST, optimized_timesteps
from ..pixart.timesteps import DMD_TIMESTEP, LAST_TIMESTEP, parse_timesteps
from .host.menus import check_choice, check_number
from .host.one_step import many_step_warning, one_step_sampler, timestep_sigmas
from .host.schema import schema

log = get_logger(__name__)
LIST, OPTIMIZED = SCHEDULES = ("list", "optimized")


class PixArtTimesteps(io.ComfyNode):
    """Timesteps as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """For SamplerCustom."""
        return schema(
            node_id="PixArtTimesteps",
            display_name="PixArt Timesteps",
            category="PixArt",
            description="Turns PixArt timesteps (999 is pure noise) into SIGMAS for SamplerCustom. A last step to 0 is added. LCM and "
            "Flash use 999, 759, 499, 259 for four steps. The schedule optimized is for few steps of an ordinary model.",
            search_aliases=["sigmas", "manual sigmas", "custom timesteps", "lcm timesteps", "optimal steps", "align your steps", "gits"],
            inputs=[
                io.Model.Input("model", tooltip="The model that gives the noise levels. Connect it after ModelSamplingDiscrete."),
                io.String.Input("timesteps", default="999, 759, 499, 259", tooltip="Whole numbers from 999 down to 0."),
                io.Combo.Input(
                    "schedule", options=list(SCHEDULES), default=LIST, optional=True,
                    tooltip="list: the timesteps above. optimized: timesteps found by a search, for few steps of an ordinary model with "
                    "the sampler dpmpp_2m; the list is ignored.",
                ),
                io.Int.Input("steps", default=8, min=FEWEST, max=MOST, optional=True, tooltip="Only used by optimized."),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model: Any, timesteps: str, schedule: str = LIST, steps: int = 8) -> io.NodeOutput:
        """Parses the list, or takes the schedule's, and asks the model for its sigmas."""
        if check_choice("schedule", schedule, SCHEDULES) == OPTIMIZED:
            chosen = optimized_timesteps(int(check_number("steps", steps, FEWEST, MOST, whole=True)))
        else:
            chosen = parse_timesteps(str(timesteps))
        return io.NodeOutput(timestep_sigmas(model, chosen))


class PixArtOneStep(io.ComfyNode):
    """Sampler and sigmas of one-step models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """For SamplerCustom with cfg 1."""
        return schema(
            node_id="PixArtOneStep",
            display_name="PixArt One Step",
            category="PixArt",
            description="The sampler and sigmas for PixArt-DMD, for SamplerCustom with cfg 1: one step from pure noise of unit "
            "variance at timestep 400. Use the first output of SamplerCustom.",
            search_aliases=["dmd", "one step sampler", "distribution matching distillation"],
            inputs=[
                io.Model.Input("model", tooltip="A one-step model, such as PixArt-Alpha-DMD-XL-2-512x512."),
                io.Int.Input(
                    "timestep", default=DMD_TIMESTEP, min=1, max=LAST_TIMESTEP,
                    tooltip="The timestep the model was trained at: 400 for PixArt-DMD.",
                ),
            ],
            outputs=[io.Sampler.Output(), io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model: Any, timestep: int) -> io.NodeOutput:
        """(SAMPLER, SIGMAS); warns if the model's file looks like one for many steps."""
        timestep = check_number("timestep", timestep, 1, LAST_TIMESTEP, whole=True)
        warning = many_step_warning(model)
        if warning:
            log.warning("%s", warning)
        return io.NodeOutput(one_step_sampler(), timestep_sigmas(model, [timestep]))

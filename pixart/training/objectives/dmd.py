"""Distribution matching distillation: one step from noise, trained on the difference of two scores.

One-step Diffusion with Distribution Matching Distillation (Yin and others, 2023), as PixArt trains it (train_pixart_dmd.py): the
frozen model says what real pictures would be, a second one, trained all the time on what the generator draws, what the
generator's are. By default without the first paper's regression pairs: the fake score makes several updates for each of the
generator's, the two time-scale rule of DMD2 (Yin and others, 2024). Pictures aren't looked at; captions and sizes are.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...sampling_note import dmd_note, note_metadata
from ...timesteps import DMD_TIMESTEP, LAST_TIMESTEP
from ..batch import Batch, Source
from ..diffusion import NoiseSchedule
from ..draws import Draws
from ..guided import check_guidance, draw_guidance, guided_noise
from ..initialize import is_dry
from ..pairs import Pairs, check_loss
from ..teachers import make_teacher, networks_of
from ..trained import twin
from . import Turn, denoise

STEADY = 1e-5  # beside the mean that gradients are divided by
NEEDS_TEACHER = True  # random first weights have nothing to teach
WHOLE_RUN = ("pairs", "pair_loss", "lpips_net", "vae", "teacher")  # no stage has others


@dataclass(frozen=True)
class Settings:
    """The defaults are the reference's, with DMD2's updates of the fake score in place of pairs."""

    timestep: int = DMD_TIMESTEP  # where the one step begins; 400 is PixArt-DMD's
    guidance: float | tuple[float, float] = 3.0  # cfg of the real score
    score_timesteps: tuple[int, int] = (1, 998)  # between which both scores are asked, each as likely
    fake_updates: int = 5  # of the fake score for each step; 1 is the first paper's, which needs pairs
    fake_rate: float = 1.0  # the fake score's learning rate, times the recipe's
    pairs: str | None = None  # folder of `python -m pixart pairs`: noise and what the teacher makes of it
    pair_loss: str = "lpips"  # of decoded pictures, or "l2" of latents
    pair_weight: float = 0.25
    pair_share: float = 0.5  # pairs in a step, of the batch; at least one
    lpips_net: str = "vgg"  # or alex, squeeze
    vae: str | None = None  # that decodes for LPIPS; a small one, such as TAESD, is enough
    teacher: str | None = None  # the real score; null is what the run begins with

    @property
    def runs_network_twice(self) -> bool:
        """Whether a step's gradients are sums over two forwards."""
        return self.pairs is not None


class Part(denoise.Part):
    """See `objectives.Objective`.

    Memory: three networks. Of PixArt's 0.6 billion weights in fp32 each takes 2.4 GB, and generator and fake score up to 7.2 GB more for
    gradients and AdamW: 22 GB, and 2.4 more with an average. As LoRA they share the frozen weights: 2.4 GB once, and some ten MB for each.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._schedule: NoiseSchedule | None = None

    def wrap(self, network: nn.Module, source: Source) -> nn.Module:
        self.network, self.source = network, source
        self.real = make_teacher(network, self.settings.teacher, "dmd")
        self.fake = twin(network, trained=True)
        chosen = self.settings
        read = chosen.pairs is not None and not is_dry()
        self.pairs = Pairs(chosen.pairs, self.real, chosen.vae, chosen.pair_loss, chosen.lpips_net) if read else None
        return network

    def losses(self, settings: Settings, model: nn.Module, conditions: dict[str, Any], batch: Batch, draws: Draws) -> dict[str, Tensor]:
        self.settings = settings  # of the stage
        start = draws.normal("noise", batch.latent.shape[1:]).to(batch.latent.device)
        drawn = self.drawn(settings, model, start, conditions)
        wanted = drawn.detach() - self._direction(settings, drawn.detach(), conditions, draws)
        losses = {"matching_loss": 0.5 * (drawn - wanted).square().mean(dim=(1, 2, 3))}
        if self.pairs is not None:
            losses["pair_loss"] = settings.pair_weight * self._pair_loss(settings, model, conditions, batch, draws)
        return losses

    def drawn(self, settings: Settings, model: nn.Module, start: Tensor, conditions: dict[str, Any]) -> Tensor:
        """The generator's pictures of unit noise (B, C, H, W): one step."""
        timestep = torch.full((len(start),), settings.timestep, device=start.device)
        predicted = model(start, timestep, **conditions)[:, : start.shape[1]].float()
        return self.schedule(start.device).predicted_latent(start, predicted, timestep)

    @torch.no_grad()
    def _direction(self, settings: Settings, drawn: Tensor, conditions: dict[str, Any], draws: Draws) -> Tensor:
        """What lies between the two scores' pictures, in units of the teacher's own distance (DMD, equations 7 and 8)."""
        noisy, _, timestep = self._noised(settings, drawn, draws, "score")
        guidance = draw_guidance(settings.guidance, draws).to(drawn.device)
        real = guided_noise(self.real, noisy, timestep, conditions, self.source.null_context, guidance)
        fake = self.fake(noisy, timestep, **conditions)[:, : drawn.shape[1]].float()
        schedule = self.schedule(drawn.device)
        of_real, of_fake = (schedule.predicted_latent(noisy, noise, timestep) for noise in (real, fake))
        distance = (drawn - of_real).abs().mean(dim=(1, 2, 3), keepdim=True)
        return (of_fake - of_real) / (distance + STEADY)

    def _noised(self, settings: Settings, latent: Tensor, draws: Draws, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, their noise and timesteps (B,), between those at which scores are asked."""
        least, most = settings.score_timesteps
        timestep = (least + (draws.uniform(f"{purpose} timestep") * (most - least + 1)).long().clamp(max=most - least)).to(latent.device)
        noise = draws.normal(f"{purpose} noise", latent.shape[1:]).to(latent.device)
        return self.schedule(latent.device).add_noise(latent, noise, timestep), noise, timestep

    def _pair_loss(self, settings: Settings, model: nn.Module, conditions: dict[str, Any], batch: Batch, draws: Draws) -> Tensor:
        """Distance (B,) between what the generator and the teacher make of the same noise, so that the batch's mean is that of its pairs.

        The first rows of the whole batch have a pair each, whatever parts and processes it is computed in.
        """
        count = max(1, round(settings.pair_share * batch.total))
        own = [place for place, row in enumerate(draws.rows) if row < count]
        losses = batch.latent.new_zeros(len(batch.latent), dtype=torch.float32)
        if own:
            pair = self.pairs.draw(draws, [draws.rows[place] for place in own], batch.latent.shape[2:], conditions)
            distance = self.pairs.distance(self.drawn(settings, model, pair.noise, pair.conditions), pair.latent)
            losses[own] = distance.float() * (batch.total / count)
        return losses

    def companions(self) -> Mapping[str, nn.Module]:
        return {**networks_of(self.real), "fake": self.fake}

    def turns(self, settings: Settings) -> Sequence[Turn]:
        return [Turn("fake", number, settings.fake_rate) for number in range(settings.fake_updates)]

    def companion_losses(
        self, turn: Turn, settings: Settings, model: nn.Module, conditions: dict[str, Any], batch: Batch, draws: Draws
    ) -> dict[str, Tensor]:
        """The fake score denoises what the generator draws now."""
        purpose = f"fake {turn.number}"
        start = draws.normal(purpose, batch.latent.shape[1:]).to(batch.latent.device)
        with torch.no_grad():
            drawn = self.drawn(settings, self.network, start, conditions)
        noisy, noise, timestep = self._noised(settings, drawn, draws, purpose)
        predicted = model(noisy, timestep, **conditions)[:, : drawn.shape[1]].float()
        return {"fake_loss": (predicted - noise).square().mean(dim=(1, 2, 3))}

    def metadata(self, settings: Settings) -> dict[str, str]:
        return note_metadata(dmd_note(settings.timestep))


def check(settings: Settings) -> None:
    """Raises ConfigError for what no run can have."""
    check_guidance(settings.guidance)
    least, most = settings.score_timesteps
    if not 0 <= least <= most <= LAST_TIMESTEP:
        raise ConfigError(f"score_timesteps are {[least, most]}; expected two of 0 to {LAST_TIMESTEP}, the lower one first.")
    if not 1 <= settings.timestep <= LAST_TIMESTEP:
        raise ConfigError(f"timestep is {settings.timestep}; expected 1 to {LAST_TIMESTEP}, 400 for PixArt-DMD's.")
    if settings.fake_updates < 1 or not settings.fake_rate > 0:
        raise ConfigError(
            f"fake_updates is {settings.fake_updates} and fake_rate {settings.fake_rate}; expected 1 or more, and more than 0: "
            "a fake score that doesn't follow the generator leads it astray."
        )
    check_loss(settings.pair_loss, settings.lpips_net, settings.vae, settings.pairs is not None)
    if not settings.pair_weight >= 0 or not 0 < settings.pair_share <= 1:
        raise ConfigError(f"pair_weight is {settings.pair_weight} and pair_share {settings.pair_share}; expected 0 or more, and 0 to 1.")

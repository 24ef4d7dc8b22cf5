"""Pairs for DMD's regression: noise, and the picture that the teacher's solver makes of it. `pair_commands.py` draws them."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, autocast, nn

from ..errors import ConfigError
from .draws import Draws
from .teacher import Teacher

INFO = "info.json"
LOSSES = ("lpips", "l2")
NETS = ("vgg", "alex", "squeeze")
# Of the answer to one fixed question: weights that were rounded to 16 bits since differ by 0.4 %, a fine-tune by more
TOLERANCE = {torch.float32: 0.002, torch.bfloat16: 0.01, torch.float16: 0.01}
SAME_SIZE = 1.5  # areas of the bins of one base size differ by less
PROBED_TIMESTEP = 500
SIZES = ("in_channels", "caption_channels", "micro_condition")  # of a transformer
PIECES = ("noise", "latent", "context", "context_mask", "size")


@dataclass(frozen=True)
class Pair:
    """Some pairs of one size: noise and latent (n, C, H, W), and what the network was told of them."""

    noise: Tensor
    latent: Tensor
    conditions: dict[str, Any]


class Pairs:
    """A folder of pairs, and the distance between pictures of theirs."""

    def __init__(self, folder: str, teacher: Teacher, vae: str | None, loss: str, net: str) -> None:
        """Raises ConfigError for a folder without pairs, or with another model's."""
        self.folder = Path(folder)
        info = read_info(self.folder)
        self.files = pair_files(self.folder)
        if not self.files:
            raise ConfigError(f"{folder} holds no pairs. Draw some: python -m pixart pairs RECIPE {folder}")
        check_probe(info, teacher, self.folder)
        device = next(teacher.network.parameters()).device
        self.distance = squares if loss == "l2" else perceptual(vae, info, net, device)
        self._device = device

    def draw(self, draws: Draws, rows: Sequence[int], size: Sequence[int], conditions: dict[str, Any]) -> Pair:
        """A pair for each of a batch's rows, of one file, the same for every process count.

        size: height and width of the latents in training; conditions: which of them the network is told. Raises ConfigError for
        pairs of another base size.
        """
        file = self.files[int(draws.shared("pairs").integers(len(self.files)))]
        with open_pairs(file) as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}
        here, there = (height * width for height, width in (size, found["noise"].shape[2:]))
        if not 1 / SAME_SIZE <= here / there <= SAME_SIZE:
            told = " instead of ".join("{}x{}".format(*(8 * side for side in reversed(each))) for each in (found["noise"].shape[2:], size))
            raise ConfigError(f"{file} has pairs of {told} px. Draw pairs with this recipe: their size is its last stage's.")
        picks = [int(draws.of_row(row, "pair").integers(len(found["noise"]))) for row in rows]
        chosen = {name: value[picks].to(self._device) for name, value in found.items()}
        told = {"context": chosen["context"].float(), "context_mask": chosen["context_mask"].bool()}
        if "size" in conditions:
            told["size"] = chosen["size"]
        return Pair(chosen["noise"].float(), chosen["latent"].float(), told)


def check_loss(loss: str, net: str, vae: str | None, used: bool) -> None:
    """Raises ConfigError for a distance that can't be; used: whether there are pairs."""
    if loss not in LOSSES or net not in NETS:
        raise ConfigError(f"pair_loss is {loss!r}, lpips_net {net!r}; expected one of {', '.join(LOSSES)}, and of {', '.join(NETS)}.")
    if used and loss == "lpips" and vae is None:
        raise ConfigError("pair_loss is 'lpips', which compares pictures: set vae to one that decodes them, or choose 'l2'.")


def open_pairs(file: Path) -> Any:
    """A file of pairs; raises ConfigError where it is damaged."""
    try:
        opened = safe_open(str(file), framework="pt")
        if set(opened.keys()) == set(PIECES):
            return opened
        found = ", ".join(sorted(opened.keys()))
    except (SafetensorError, OSError) as error:
        found = str(error)
    raise ConfigError(f"{file}: no pairs ({found}); expected {', '.join(PIECES)}. Remove the file, and draw it again.")


def pair_files(folder: Path) -> list[Path]:
    """Whole files of pairs, in order."""
    return sorted(file for file in folder.glob("*.safetensors") if file.stem.isdigit())


def read_info(folder: Path) -> dict[str, Any]:
    """What the pairs were drawn with; raises ConfigError."""
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        return {**info, "probe": [float(value) for value in info["probe"]], "latent_scale": float(info["latent_scale"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} is not a folder of pairs ({error}). Draw some: python -m pixart pairs RECIPE {folder}") from None


@torch.no_grad()
def probe(predict: Callable[..., Tensor], network: nn.Module) -> list[float]:
    """The answer to a fixed question, by which weights are known again, whatever file or adapter they lie in.

    predict: of `network`, a transformer, with adapters or without.
    """
    parameter, config = next(network.parameters()), network.config
    latent = torch.linspace(-2, 2, config.in_channels * 64).sin().reshape(1, config.in_channels, 8, 8)
    context = torch.linspace(-1, 1, 2 * config.caption_channels).reshape(1, 2, config.caption_channels)
    latent, context = latent.to(parameter), context.to(parameter)
    timestep, mask = torch.tensor([PROBED_TIMESTEP], device=parameter.device), torch.ones(1, 2, dtype=torch.bool, device=parameter.device)
    answer = predict(latent, timestep, context, mask)[0, : config.in_channels, ::2, ::2]
    return [round(float(value), 4) for value in answer.flatten()]


def check_probe(info: dict[str, Any], teacher: Teacher, folder: Path) -> None:
    """Raises ConfigError for pairs that other weights have drawn."""
    config = teacher.network.config
    ours = {name: getattr(config, name) for name in SIZES}
    theirs = {name: info.get(name) for name in SIZES}
    if ours != theirs:
        differing = ", ".join(f"{name} {theirs[name]} instead of {ours[name]}" for name in SIZES if ours[name] != theirs[name])
        raise ConfigError(f"{folder} was made for another model: {differing}. Draw pairs with this recipe.")
    now, then = torch.tensor(probe(teacher, teacher.network)), torch.tensor(info["probe"])
    tolerance = TOLERANCE[next(teacher.network.parameters()).dtype]
    if now.shape != then.shape or not float((now - then).norm() / now.norm().clamp_min(1e-6)) <= tolerance:
        raise ConfigError(f"{folder} was drawn by other weights than the teacher of this run. Draw pairs with this recipe.")


def squares(drawn: Tensor, wanted: Tensor) -> Tensor:
    """(B,): mean squared difference of latents."""
    return (drawn - wanted).square().mean(dim=(1, 2, 3))


def perceptual(vae: str, info: dict[str, Any], net: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Learned perceptual distance of decoded latents (Zhang and others, 2018); gradients reach the first argument.

    Raises ConfigError where torchmetrics is missing, or its network's weights can't be had.
    """
    from ..vae import load_vae

    decoder = load_vae(vae, info["latent_scale"], device=device, latent_shift=float(info.get("latent_shift", 0)))
    network = lpips_network(net).to(device)

    def picture(latent: Tensor) -> Tensor:
        decoded = decoder.module.decode(latent * decoder.factor + decoder.shift)
        return (decoded.sample if hasattr(decoded, "sample") else decoded).float().clamp(-1, 1)

    def distance(drawn: Tensor, wanted: Tensor) -> Tensor:
        with autocast(device.type, enabled=False):
            with torch.no_grad():
                target = picture(wanted)
            return network(picture(drawn), target).flatten(1).mean(1)

    return distance


def lpips_network(net: str) -> nn.Module:
    """network(pictures, pictures), both (B, 3, H, W) in -1..1."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type=net).net.requires_grad_(False).eval()
    except (ImportError, OSError) as error:  # its network's weights are downloaded once
        raise ConfigError(
            f"pair_loss 'lpips' can't be used ({error}): `pip install torchmetrics torchvision`, and let torchvision download the "
            f"weights of {net} once; or choose pair_loss 'l2'."
        ) from None

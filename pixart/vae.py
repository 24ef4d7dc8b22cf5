"""The picture's autoencoder: diffusers' AutoencoderKL and AutoencoderTiny, in the model's latent space."""
from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .autoencoder_config import build_autoencoder
from .checkpoints.content import called
from .checkpoints.parts import require_tensors
from .checkpoints.read import read_tensors
from .checkpoints.shards import WEIGHTS_NAME
from .config import Variant
from .errors import CheckpointError, InputError, UnsupportedError
from .json_files import read_json
from .logs import get_logger

if TYPE_CHECKING:
    from PIL.Image import Image

logger = get_logger(__name__)

PREFIXES = ("", "first_stage_model.", "vae.")  # the last two in files that hold other models too
MARKS = ("decoder.conv_in.weight", "decoder.layers.0.weight", "taesd_")  # beginnings of keys
REMEDIES = {
    0.18215: "an SD1 VAE, e.g. stabilityai/sd-vae-ft-ema, as alpha needs",
    1.5305: "SD3's VAE, of 16 channels",
    0.3611: "Flux's VAE, of 16 channels",
    0.13025: "the SDXL VAE, e.g. PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers, as Sigma needs",
}
# LDM's names of AutoencoderKL -> diffusers'; `decoder.up` counts from the other end, see _to_diffusers
LDM_NAMES = (
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.0)\.(?:q|query)\.", r"\1.to_q."),
    (r"(attentions\.0)\.(?:k|key)\.", r"\1.to_k."),
    (r"(attentions\.0)\.(?:v|value)\.", r"\1.to_v."),
    (r"(attentions\.0)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
)


class Vae:
    """Pictures to model latents and back.

    `module` is an AutoencoderKL or AutoencoderTiny; its latent is `model latent * factor + shift`.
    """

    def __init__(self, module: nn.Module, factor: float, shift: float = 0.0) -> None:
        self.module = module
        self.factor = factor
        self.shift = shift

    @property
    def pixels_per_latent(self) -> int:
        """How much smaller a latent's side is than the picture's."""
        return 2 ** (len(self.module.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.module.config.latent_channels

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in 0..1 to model latents (B, C, H/8, W/8), the mean of the distribution."""
        return self.distribution(images)[0]

    @torch.no_grad()
    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the model latents of pictures, as of `encode`; None for a VAE that has but one latent."""
        step = self.pixels_per_latent
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % step or images.shape[3] % step:
            raise InputError(
                f"images have shape {tuple(images.shape)}; expected (batch, 3, height, width), sides multiples of {step}."
            )
        encoded = self.module.encode(self._place(images) * 2 - 1)
        if not hasattr(encoded, "latent_dist"):
            return (encoded.latents.float() - self.shift) / self.factor, None
        mean, std = encoded.latent_dist.mode(), encoded.latent_dist.std
        return (mean.float() - self.shift) / self.factor, std.float() / self.factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Model latents (B, C, h, w) to pictures (B, 3, 8h, 8w), fp32, around 0..1 but not clamped."""
        latents = latents.float() * self.factor + self.shift
        return self.module.decode(self._place(latents)).sample.float() / 2 + 0.5

    def _place(self, tensor: Tensor) -> Tensor:
        parameter = next(self.module.parameters())
        return tensor.to(parameter.device, parameter.dtype)


def decode_pictures(path: str | Path, variant: Variant, latents: Tensor) -> list[Image]:
    """Pictures of latents (B, C, H, W) in a variant's space; the VAE is loaded for this call alone, onto the latents' device."""
    from PIL import Image

    vae = load_vae(path, variant.latent_scale, device=latents.device, latent_shift=variant.latent_shift)
    arrays = vae.decode(latents).clamp(0, 1).mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def load_vae(
    path: str | Path,
    latent_scale: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    latent_shift: float = 0.0,
) -> Vae:
    """Loads a diffusers folder (or a pipeline's, with vae/), a single .safetensors file, or the VAE in an all-in-one file.

    Files: AutoencoderKL in LDM or diffusers names, AutoencoderTiny in diffusers or TAESD names.
    latent_scale, latent_shift: the model's; a VAE that says otherwise is reported in the log.
    Raises CheckpointError or UnsupportedError saying what to do.
    """
    path = Path(path)
    tensors, config, source = _read(path)
    taesd = any(key.startswith("taesd_decoder.") for key in tensors)
    factor, shift = 1.0, 0.0
    if taesd:
        factor, shift = _taesd_space(tensors, latent_scale)
        tensors = _taesd_to_diffusers(tensors)
    name = config.get("_class_name") or ("AutoencoderTiny" if "decoder.layers.0.weight" in tensors else "AutoencoderKL")
    if name == "AutoencoderTiny":
        config = config or _tiny_config(tensors, path)
    elif name == "AutoencoderKL":
        tensors = _to_diffusers(tensors)
        config = config or _kl_config(tensors, path)
        factor, shift = 1 / latent_scale, latent_shift
    else:
        raise UnsupportedError(f"{path} is a {name}; expected an AutoencoderKL or AutoencoderTiny.")
    module = _build(name, config, {key: value.to(dtype) for key, value in tensors.items()}, path, source)
    if name == "AutoencoderKL":
        _check_scale(config, latent_scale, path)
    elif not taesd:
        factor = 1 / (config.get("scaling_factor") or 1.0)
    module.enable_slicing()  # one picture at a time: the same result in a fraction of the memory
    return Vae(module.to(device), factor, shift)


def _read(path: Path) -> tuple[dict[str, Tensor], dict, Path]:
    """Tensors without prefix, the folder's config.json, and the file that tells the settings: that one, or the weights'."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a VAE folder or a .safetensors file.")
    config: dict = {}
    if path.is_dir():
        path = path / "vae" if (path / "vae").is_dir() else path
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is not a VAE folder: expected config.json and {WEIGHTS_NAME}.safetensors.")
        config = read_json(path / "config.json")
    raw = {str(key): value for key, value in read_tensors(path).state_dict.items()}  # a pickle may have any keys
    prefix = next((p for p in PREFIXES if any(key.startswith(tuple(p + mark for mark in MARKS)) for key in raw)), None)
    if prefix is None:
        raise CheckpointError(
            f"{called(path)} is not a VAE: no decoder.conv_in, decoder.layers or taesd_decoder among its {len(raw)} keys "
            f"({', '.join(sorted(raw)[:3])}, ...). Give {' or '.join(REMEDIES.values())}."
        )
    tensors = {key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)}
    require_tensors(tensors, called(path))
    return tensors, config, path / "config.json" if config else path


def _taesd_space(tensors: dict[str, Tensor], latent_scale: float) -> tuple[float, float]:
    """Factor and shift from model latents to what a TAESD file's decoder takes.

    The host decodes (latent / latent_scale - vae_shift) * vae_scale; without vae_scale the decoder is
    TAESD's own and takes model latents.
    """
    if "vae_scale" not in tensors:
        return 1.0, 0.0
    scale = float(tensors["vae_scale"])
    shift = float(tensors["vae_shift"]) if "vae_shift" in tensors else 0.0
    return scale / latent_scale, -shift * scale


def _taesd_to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """TAESD's names to AutoencoderTiny's, which counts no clamp at the decoder's start."""
    renamed = {}
    for key, value in tensors.items():
        side, _, rest = key.partition(".")
        index, _, rest = rest.partition(".")
        if side == "taesd_encoder":
            renamed[f"encoder.layers.{index}.{rest}"] = value
        elif side == "taesd_decoder":
            renamed[f"decoder.layers.{int(index) - 1}.{rest}"] = value
    return renamed


def _tiny_config(tensors: dict[str, Tensor], path: Path) -> dict:
    first, last = "decoder.layers.0.weight", "encoder.layers.0.weight"
    if first not in tensors or last not in tensors:
        raise CheckpointError(f"{path}: half a TAESD; expected both an encoder and a decoder.")
    widths = {"encoder": tensors[last].shape[0], "decoder": tensors[first].shape[0]}
    return {
        "latent_channels": tensors[first].shape[1],
        **{f"{side}_block_out_channels": (width,) * 4 for side, width in widths.items()},
    }


def _to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LDM's and old diffusers' names to today's, attention as matrices; today's pass unchanged."""
    ups = {int(m[1]) for m in (re.match(r"decoder\.up\.(\d+)\.", key) for key in tensors) if m}
    renamed = {}
    for key, value in tensors.items():
        if not key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
            continue  # training leftovers of LDM files, such as loss.* and model_ema.*
        up = re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", key)
        if up:
            kind = "resnets" if up[2] == "block" else "upsamplers.0"
            key = f"decoder.up_blocks.{max(ups) - int(up[1])}.{kind}.{up[3]}"
        for pattern, replacement in LDM_NAMES:
            key = re.sub(pattern, replacement, key)
        if ".attentions.0.to_" in key and value.ndim == 4:
            value = value[..., 0, 0]
        renamed[key] = value
    return renamed


def _kl_config(tensors: dict[str, Tensor], path: Path) -> dict:
    """AutoencoderKL's settings, from shapes."""
    count = len({m[1] for m in (re.match(r"encoder\.down_blocks\.(\d+)\.", key) for key in tensors) if m})
    firsts = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(count)]
    missing = [key for key in (*firsts, "decoder.conv_in.weight") if key not in tensors]
    if missing or not firsts:
        raise CheckpointError(f"{path}: not a whole AutoencoderKL, without {missing[0] if missing else 'an encoder'}.")
    channels = [tensors[key].shape[0] for key in firsts]
    layers = len({m[1] for m in (re.match(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", key) for key in tensors) if m})
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "layers_per_block": layers,
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": 32 if channels[0] % 32 == 0 else channels[0],
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in tensors,
    }


def _check_scale(config: dict, latent_scale: float, path: Path) -> None:
    own = config.get("scaling_factor")
    if own is not None and abs(own - latent_scale) > 1e-4:
        remedy = REMEDIES.get(latent_scale, f"a VAE with scaling_factor {latent_scale}")
        logger.warning(
            "The VAE %s has scaling_factor %s, but the model was trained with %s, so colours and shapes will be wrong. "
            "Give %s; or, if the model's family was guessed wrongly, give variant=.",
            path, own, latent_scale, remedy,
        )  # fmt: skip


def _build(name: str, config: dict, tensors: dict[str, Tensor], path: Path, source: Path) -> nn.Module:
    """The diffusers module holding the tensors themselves; all missing, unknown and misshapen keys raise at once."""
    try:
        import diffusers
    except ImportError as error:
        raise UnsupportedError(f"Decoding pictures needs the diffusers library ({error}): `pip install diffusers`.") from None
    remedy = "Download the VAE again" + (", or choose its weight file, which needs no config." if source.name == "config.json" else ".")
    with torch.device("meta"):
        module = build_autoencoder(getattr(diffusers, name), config, source, name, remedy)
    expected = {key: value.shape for key, value in module.state_dict().items()}
    problems = [f"missing {key}" for key in expected if key not in tensors]
    problems += [f"unknown {key}" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {tuple(value.shape)}, expected {tuple(expected[key])}"
        for key, value in tensors.items()
        if key in expected and value.shape != expected[key]
    ]
    problems += [f"NaN or infinite values in {key}" for key, value in tensors.items() if not value.isfinite().all()]
    if problems:
        raise CheckpointError(f"{path} is not a complete {name}: {'; '.join(problems)}.")
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)

"""The command line: `python -m pixart COMMAND`; `-h` lists the commands."""
from __future__ import annotations

import argparse
import json
import logging
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .app.command import add_app_command
from .config import variant_names
from .device import check_device
from .errors import InputError, PixArtError
from .merge_command import add_merge_command
from .scale.caption_commands import add_caption_command
from .scale.commands import add_many_options, run_many
from .scale.where import LOCAL
from .schedules import SCHEDULES
from .text.commands import add_text_commands
from .text.names import PRECISIONS
from .training.commands import add_training_commands
from .training.data.commands import add_data_commands
from .training.pair_commands import add_pair_commands

DEMO_WEIGHTS = Path(__file__).resolve().parent.parent / "demo" / "weights"
DEMO_FILES = {
    "transformer": DEMO_WEIGHTS / "diffusion_models/pixart-demo-transformer.safetensors",
    "text_encoder": DEMO_WEIGHTS / "text_encoders/pixart-demo-t5.safetensors",
    "vae": DEMO_WEIGHTS / "vae/pixart-demo-vae.safetensors",
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SAMPLER_NAMES = ("dpm++", "sa-solver", "lcm", "one-step")  # of samplers.py, which imports torch
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
USER_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code: 0, 2 for an error it explained, 130 if interrupted."""
    given = make_parser().parse_args(arguments)
    level = logging.INFO if given.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)
    if not given.verbose:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises on a kernel at every start, of no use but for 4 bits
    try:
        given.run(given)
    except (PixArtError, OSError) as error:
        sys.stderr.write(f"pixart: {error}\n")
        return USER_ERROR
    except ImportError as error:
        sys.stderr.write(f"pixart: {_advise_on_import(error, given.command)}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("pixart: interrupted\n")
        return INTERRUPTED
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="python -m pixart", description="PixArt text to image.")
    parser.add_argument("--version", action="version", version=f"pixart {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is loaded and why")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands.add_parser("generate", help="draw pictures from prompts (default: with the demo model)"))

    inspect = commands.add_parser("inspect", help="say which PixArt a weight file is, and why")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_reading_options(inspect)
    inspect.set_defaults(run=_inspect)

    convert = commands.add_parser("convert", help="rewrite a weight file in another layout, without loss")
    convert.add_argument("source", type=Path)
    convert.add_argument("destination", type=Path)
    convert.add_argument("--to", choices=("original", "diffusers"), required=True)
    convert.add_argument(
        "--kv-compression", metavar="MODE:RATIO:FIRST-LAST",
        help="for weights trained with a compression that doesn't show in them, e.g. uniform:2:14-27; recorded in the new file",
    )  # fmt: skip
    _add_reading_options(convert)
    convert.set_defaults(run=_convert)

    add_merge_command(commands)
    add_app_command(commands, _parts, demo_loras=DEMO_WEIGHTS / "loras", dtypes=DTYPES)
    add_text_commands(commands, default_encoder=DEMO_FILES["text_encoder"])
    add_caption_command(commands)
    add_data_commands(commands)
    add_training_commands(commands)
    add_pair_commands(commands)
    return parser


def _add_reading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", choices=("auto", *variant_names()), default="auto", help="the variant, if the weights can't tell")
    parser.add_argument("--ema", action="store_true", help="take state_dict_ema from an original .pth")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", nargs="+", help="one or more, each in quotes")
    parser.add_argument("--negative", default="", help="what the picture should not show")
    parser.add_argument("--transformer", type=Path, help="file or folder; a diffusers pipeline's folder is enough on its own")
    parser.add_argument("--text-encoder", type=Path, help="T5: Hugging Face folder or .safetensors")
    parser.add_argument("--tokenizer", type=Path, help="folder, tokenizer.json or spiece.model, if not beside the T5")
    parser.add_argument("--vae", type=Path, help="diffusers folder or .safetensors")
    _add_reading_options(parser)
    parser.add_argument("--sampler", choices=SAMPLER_NAMES, help="default: what the file was distilled for, if it says so, else dpm++")
    parser.add_argument("--schedule", choices=SCHEDULES, default=SCHEDULES[0], help="optimized: for 4 to 16 steps of dpm++")
    parser.add_argument("--steps", type=int, help="default: what the sampler is made for, 20 for dpm++")
    parser.add_argument("--cfg", type=float, help="guidance scale; 1 turns guidance off (default: the sampler's, 4.5 for dpm++)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's base size)")
    parser.add_argument("--height", type=int, help="pixels (default: the model's base size)")
    parser.add_argument("--no-bins", action="store_true", help="draw exactly the size asked for, not the nearest trained one")
    parser.add_argument("--images", type=int, default=1, help="pictures for each prompt")
    parser.add_argument("--seed", type=int, help="default: a random one, which is printed; with --prompts: 0, then one more per picture")
    parser.add_argument("--output", type=Path, help="picture (default: pixart.png); several get a number. With --prompts: a folder")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: as the weights are stored")
    parser.add_argument("--t5-precision", choices=PRECISIONS, help="for T5's linear layers; int8, nf4, fp4 need bitsandbytes")
    parser.add_argument("--clean-caption", action="store_true", help="clean prompts as the reference cleans captions")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    add_many_options(parser)
    parser.set_defaults(run=_generate)


def _generate(given: argparse.Namespace) -> None:
    if (given.prompt is None) == (given.prompts is None):
        raise InputError("Give --prompt with one or more texts, or --prompts with a file of them.")
    if given.prompts is not None:
        given.sampler = given.sampler or _sampler_of_file(given)
        run_many(given, _parts(given), DTYPES.get(given.dtype))
        return
    if given.on != LOCAL:
        raise InputError(f"--on {given.on} is for many prompts; give them as a file with --prompts.")
    _generate_few(given, given.output or Path("pixart.png"))


def _sampler_of_file(given: argparse.Namespace) -> str:
    from .samplers import sampler_for
    from .sampling_note import read_note

    return sampler_for(read_note(_parts(given)["transformer"])).name


def _generate_few(given: argparse.Namespace, output: Path) -> None:
    import torch

    from .pipeline import Pipeline
    from .samplers import find_sampler, sampler_for

    if output.suffix.lower() not in PICTURE_SUFFIXES:
        raise InputError(f"--output is {output}; expected a name ending in {', '.join(PICTURE_SUFFIXES)}.")
    pipe = Pipeline.from_files(
        **_parts(given),
        tokenizer=given.tokenizer,
        variant=given.variant,
        dtype=getattr(torch, DTYPES[given.dtype]) if given.dtype else None,
        device=check_device(given.device),
        text_precision=given.t5_precision,
        ema=given.ema,
    )
    seed = secrets.randbelow(2**32) if given.seed is None else given.seed
    sampler = find_sampler(given.sampler or sampler_for(pipe.note), pipe.note)
    pictures = pipe(
        given.prompt,
        given.negative,
        sampler=sampler,
        schedule=given.schedule,
        steps=sampler.steps if given.steps is None else given.steps,
        guidance=sampler.guidance if given.cfg is None else given.cfg,
        width=given.width,
        height=given.height,
        use_bins=not given.no_bins,
        seed=seed,
        images_per_prompt=given.images,
        clean_caption=given.clean_caption,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.write(f"seed {seed}\n")
    for number, picture in enumerate(pictures, start=1):
        name = output if len(pictures) == 1 else output.with_stem(f"{output.stem}-{number}")
        picture.save(name)
        sys.stdout.write(f"{name}\n")


def _inspect(given: argparse.Namespace) -> None:
    from .checkpoints import inspect_file

    report = inspect_file(given.file, variant=given.variant, ema=given.ema)
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) if given.json else report.describe()
    sys.stdout.write(f"{text}\n")


def _convert(given: argparse.Namespace) -> None:
    from .checkpoints import convert_file

    written = convert_file(
        given.source, given.destination, to=given.to, ema=given.ema, variant=given.variant, kv_compression=given.kv_compression
    )
    sys.stdout.write(f"{written}\n")


def _advise_on_import(error: ImportError, command: str) -> str:
    """What to do about a module that can't be imported; the demo's are in the repository alone."""
    missing = (error.name or "").partition(".")[0]
    if missing == "demo":
        return f"{command} needs the repository's demo folder, which is not here; run it in the repository's root."
    if isinstance(error, ModuleNotFoundError) and missing:
        return f"{command} needs the Python package {missing}, which is not installed: `pip install \".[pipeline]\"` in the repository."
    return f"{command} can't import what it needs ({error}): `pip install \".[pipeline]\"` in the repository."


def _parts(given: argparse.Namespace) -> dict[str, Path]:
    """Paths of transformer, text encoder and VAE: all given, or in one pipeline folder, or all the demo's."""
    parts = {"transformer": given.transformer, "text_encoder": given.text_encoder, "vae": given.vae}
    if given.transformer is None:
        absent = [str(path) for name, path in DEMO_FILES.items() if parts[name] is None and not path.is_file()]
        if absent:
            raise InputError(f"No --transformer was given, and the demo model is not here: {', '.join(absent)}.")
        return {name: path or DEMO_FILES[name] for name, path in parts.items()}
    for name, path in parts.items():
        if path is None and (given.transformer / name).is_dir():
            parts[name] = given.transformer
        elif path is None:
            raise InputError(f"--{name.replace('_', '-')} is needed with --transformer {given.transformer}.")
    return parts

"""`python -m pixart encode` and `quantize`."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..config import variant_names
from ..device import check_device
from .names import PRECISIONS, STORED_PRECISIONS

AUTO, TRANSFORMER_PRECISION = "auto", "fp8"


def add_text_commands(commands: argparse._SubParsersAction, default_encoder: Path) -> None:
    """Adds both to the command line. default_encoder: the demo's T5."""
    encode = commands.add_parser("encode", help="encode prompts once: a text file with one per line -> prompt files")
    encode.add_argument("prompts", type=Path, help="UTF-8 text, one prompt per line")
    encode.add_argument("out", type=Path, help="folder for 00001.safetensors, ...; run again to resume")
    encode.add_argument("--text-encoder", type=Path, default=default_encoder, help="T5: folder or file (default: the demo's)")
    encode.add_argument("--tokenizer", type=Path, help="folder, tokenizer.json or spiece.model, if not beside the T5")
    encode.add_argument("--precision", choices=PRECISIONS, help="default: as the weights are stored")
    encode.add_argument("--max-tokens", type=int, default=300, help="300 for Sigma, 120 for alpha")
    encode.add_argument("--batch-size", type=int, default=8)
    encode.add_argument("--clean-caption", action="store_true", help="clean prompts as the reference cleans captions")
    encode.add_argument("--keep-case", action="store_true", help="don't lower-case prompts")
    encode.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    encode.set_defaults(run=_encode)

    quantize = commands.add_parser("quantize", help="save a T5 in 8 or 4 bits, so that it loads fast, or a transformer in fp8")
    quantize.add_argument("source", type=Path, help="T5 or transformer: folder or weight file")
    quantize.add_argument("destination", type=Path, help="T5: a new folder; transformer: a .safetensors")
    quantize.add_argument(
        "--precision", choices=(*STORED_PRECISIONS, TRANSFORMER_PRECISION), required=True,
        help=f"{TRANSFORMER_PRECISION} is for the transformer, in ComfyUI's scaled format; the others are for T5",
    )  # fmt: skip
    quantize.add_argument("--variant", choices=(AUTO, *variant_names()), default=AUTO, help="of the transformer, if the weights can't tell")
    quantize.add_argument("--device", default="auto", help="where to quantize: auto, cpu, cuda, ...")
    quantize.set_defaults(run=_quantize)


def _encode(given: argparse.Namespace) -> None:
    from .batch import encode_file
    from .encoder import load_text_encoder

    encoder = load_text_encoder(
        given.text_encoder, given.tokenizer, device=check_device(given.device), precision=given.precision
    )
    written = encode_file(
        given.prompts,
        given.out,
        encoder,
        max_tokens=given.max_tokens,
        batch_size=given.batch_size,
        clean_caption=given.clean_caption,
        lower_case=not given.keep_case,
        progress=_show("prompts"),
    )
    sys.stdout.write("".join(f"{path}\n" for path in written))


def _quantize(given: argparse.Namespace) -> None:
    from ..checkpoints.quantize import quantize_transformer
    from .folder import quantize_folder

    if given.precision == TRANSFORMER_PRECISION:
        sys.stdout.write(f"{quantize_transformer(given.source, given.destination, given.variant)}\n")
        return
    device = check_device(given.device)
    written = quantize_folder(given.source, given.destination, given.precision, device, _show("tensors"))
    sys.stdout.write(f"{written}\n")


def _show(what: str) -> Callable[[int, int], None]:
    """Progress on the terminal; elsewhere the last line alone."""

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done}/{total} {what}" + ("\n" if done == total else ""))
        elif done == total:
            sys.stderr.write(f"{done}/{total} {what}\n")
        sys.stderr.flush()

    return progress

"""`python -m pixart caption FOLDER`."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..device import check_device
from ..errors import InputError, PixArtError
from .where import LOCAL, add_where_options, leads, run, where

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer
    from .caption_stage import CaptionSettings, CaptionStage

MODEL, SMALL_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct", "HuggingFaceTB/SmolVLM-500M-Instruct"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PREVIEWED = 10
SHEETS = (".png", ".jpg", ".webp")


def add_caption_command(commands: argparse._SubParsersAction) -> None:
    """Adds it to the command line."""
    parser = commands.add_parser("caption", help="caption a folder of pictures with a vision-language model")
    parser.add_argument("folder", type=Path, help="folder of pictures, subfolders too; run again to resume")
    parser.add_argument(
        "--model", default=MODEL,
        help=f"transformers' image-text-to-text model: folder, or name on the Hugging Face Hub (default: {MODEL}; small: {SMALL_MODEL})",
    )  # fmt: skip
    parser.add_argument("--prompt", help="what to ask; {alt} stands for the text the picture came with (default: a built-in one)")
    parser.add_argument("--alt-text", metavar="PLACE", help="where such texts are: an ending such as .alt, or a field of metadata.jsonl")
    parser.add_argument("--to", default=".txt", metavar="PLACE", help="where captions go, likewise (default: .txt, so name.txt)")
    parser.add_argument("--overwrite", action="store_true", help="also caption pictures that already have captions")
    parser.add_argument("--captions", type=int, default=1, metavar="N", help="captions per picture; equal ones are kept once")
    parser.add_argument("--temperature", type=float, default=0.2, help="0: always the most likely word (default: 0.2)")
    parser.add_argument("--max-tokens", type=int, default=256, help="maximum length of a caption, in the model's tokens (default: 256)")
    parser.add_argument("--max-side", type=int, default=1024, help="pixels; larger pictures are shrunk first (default: 1024)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: as the weights are stored")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument(
        "--preview", nargs="?", type=Path, const=Path("caption-preview.png"), metavar="FILE",
        help=f"caption {PREVIEWED} pictures onto one contact sheet (default: caption-preview.png) and write nothing else",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="only measure the existing captions")
    parser.add_argument("--text-encoder", type=Path, help="T5 whose tokenizer counts tokens for the report: folder or file")
    parser.add_argument("--tokenizer", type=Path, help="its tokenizer alone is enough: folder, tokenizer.json or spiece.model")
    parser.add_argument("--clip", metavar="PLACE", help="a CLIP of transformers, for the report's CLIP score")
    add_where_options(parser)
    parser.set_defaults(run=_caption)


def _caption(given: argparse.Namespace) -> None:
    from .caption_files import picture_names
    from .caption_stage import CaptionStage

    chosen, settings = where(given), _settings(given)
    names = picture_names(given.folder)
    if given.preview:
        _preview(given, settings, names, chosen.device)
        return
    stage = CaptionStage(given.folder, settings, names)
    tokenizer = _tokenizer(given)  # a wrong path is told before the hours of work
    rows = [] if given.report else _work(stage, given, chosen)
    if not leads():
        return
    _report(stage, given, names, tokenizer)
    failed = [row for row in rows if "error" in row]
    for row in failed:
        sys.stdout.write(f"failed: {row['error']}\n")
    if failed:
        raise PixArtError(f"{len(failed)} of {len(names)} pictures have no caption. Run the command again to try them once more.")


def _settings(given: argparse.Namespace) -> CaptionSettings:
    from .caption_stage import ALT, CaptionSettings
    from .stage import identity

    for name, least in (("captions", 1), ("max_tokens", 1), ("max_side", 1), ("batch_size", 1), ("temperature", 0)):
        if not least <= getattr(given, name) < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} is {getattr(given, name)}; expected at least {least}.")
    if given.captions > 1 and given.temperature == 0:
        raise InputError(f"--captions is {given.captions}, but all would be the same at --temperature 0; choose e.g. 0.7.")
    if given.alt_text == given.to:
        raise InputError(f"--alt-text and --to are both {given.to}; captions would replace the texts they are made from.")
    if given.prompt is not None and ALT in given.prompt and not given.alt_text:
        raise InputError(f"--prompt holds {ALT}; say where these texts are with --alt-text.")
    local = Path(given.model)
    return CaptionSettings(
        model=str(local.absolute()) if local.exists() else given.model, weights=identity(local), dtype=DTYPES.get(given.dtype),
        prompt=given.prompt, alt_text=given.alt_text, to=given.to, temperature=given.temperature, max_tokens=given.max_tokens,
        count=given.captions, max_side=given.max_side, seed=given.seed, batch=given.batch_size, overwrite=given.overwrite,
    )  # fmt: skip


def _work(stage: CaptionStage, given: argparse.Namespace, chosen: object) -> list[dict]:
    from .book import Book
    from .many import forget_failures

    if leads():
        forget_failures(stage)
        book = Book(stage)
        if given.overwrite and all(book.is_done(chunk) for chunk in stage.chunks):
            for chunk in stage.chunks:  # the run before came to its end: this is a new one
                book.forget(chunk)
    try:
        run([stage], chosen)
    finally:
        rows = stage.collect() if leads() else []
    return rows


def _report(stage: CaptionStage, given: argparse.Namespace, names: list[str], tokenizer: Tokenizer | None) -> None:
    from .caption_report import clip_scores, describe, describe_scores

    texts = stage.texts
    captions = {name: found for name in names if (found := texts.get(name))}
    lines = describe(captions, len(names), tokenizer)
    if given.clip:
        lines += describe_scores(clip_scores(stage.place, captions, given.clip, check_device(given.device)))
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _preview(given: argparse.Namespace, settings: CaptionSettings, names: list[str], device: str) -> None:
    from .caption_sheet import draw_sheet
    from .caption_stage import CaptionStage
    from .stage import cut
    from .where import Where, threads

    if given.on != LOCAL:
        raise InputError(f"--preview is {PREVIEWED} pictures, for --on local.")
    _check_sheet(given.preview, given.folder)
    step = max(len(names) / PREVIEWED, 1)
    chosen = [names[int(number * step)] for number in range(min(PREVIEWED, len(names)))]
    stage = CaptionStage(given.folder, settings, names)
    with threads(Where(threads=given.threads, device=device)):
        worker = stage.open(device)
        rows = [row for chunk in cut(chosen, settings.batch, {}) for row in worker.caption(chunk.items)]
    for row in rows:
        if "error" in row:
            sys.stdout.write(f"failed: {row['error']}\n")
    shown = {row["file"]: row["captions"] for row in rows if "captions" in row}
    if not shown:
        raise PixArtError("None of the pictures could be captioned.")
    given.preview.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(stage.place, shown).save(given.preview)
    sys.stdout.write(f"{given.preview}\n")


def _check_sheet(sheet: Path, folder: Path) -> None:
    """Before the model is loaded."""
    if sheet.suffix.lower() not in SHEETS:
        raise InputError(f"--preview is {sheet}; expected a file that ends in {', '.join(SHEETS)}.")
    if sheet.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"--preview is {sheet}, which would become one of the pictures in {folder}; choose a file outside of it.")


def _tokenizer(given: argparse.Namespace) -> Tokenizer | None:
    """That of the report, None if none was given."""
    from ..text.encoder import find_tokenizer_of, open_weights
    from ..text.tokenizer import load_tokenizer

    if given.text_encoder:
        return find_tokenizer_of(open_weights(given.text_encoder)[0], given.tokenizer)
    return load_tokenizer(given.tokenizer) if given.tokenizer else None

"""Many prompts from a text file, one prompt file each; a run that was stopped goes on where it was."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from .captions import prepare
from .embeddings import TextEmbeddings
from .encoder import TextEncoder
from .prompt_file import load_prompts, save_prompts

Progress = Callable[[int, int], None]


def encode_file(
    prompts: str | Path,
    out: str | Path,
    encoder: TextEncoder,
    *,
    max_tokens: int = 300,
    batch_size: int = 8,
    clean_caption: bool = False,
    lower_case: bool = True,
    progress: Progress | None = None,
) -> list[Path]:
    """Encodes each line of a UTF-8 text file into the folder `out`, as 00001.safetensors for line 1, and so on.

    Empty lines are passed over. Files that hold the same prompt, encoder and settings already are kept.
    progress(done, total) counts prompts. Returns all paths, in order. Raises InputError.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1.")
    settings = {"max_tokens": max_tokens, "clean_caption": clean_caption, "lower_case": lower_case}
    lines = _lines(Path(prompts))
    paths = {number: Path(out) / f"{number:05}.safetensors" for number in lines}
    todo = [n for n, text in lines.items() if not _is_done(paths[n], text, encoder.fingerprint, settings)]
    # Neighbours in length share a batch, so that little of it is padding
    todo.sort(key=lambda number: len(lines[number]))
    done = len(lines) - len(todo)
    if progress is not None:
        progress(done, len(lines))
    for start in range(0, len(todo), batch_size):
        numbers = todo[start : start + batch_size]
        found = encoder.encode([prepare(lines[n], clean_caption, lower_case) for n in numbers], max_tokens)
        for row, number in enumerate(numbers):
            save_prompts(paths[number], one_prompt(found, row), (lines[number],), encoder.fingerprint, **settings)
        done += len(numbers)
        if progress is not None:
            progress(done, len(lines))
    return list(paths.values())


def _lines(path: Path) -> dict[int, str]:
    """Line number -> prompt."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as UTF-8 text ({error}); expected one prompt per line.") from None
    # Not splitlines(): it also breaks at form feeds and other signs that may stand in a prompt
    found = {number: line.strip() for number, line in enumerate(text.split("\n"), start=1) if line.strip()}
    if not found:
        raise InputError(f"{path} holds no prompt; expected one per line.")
    return found


def _is_done(path: Path, prompt: str, encoder: str, settings: dict) -> bool:
    if not path.is_file():
        return False
    try:
        found = load_prompts(path)
    except InputError:
        return False  # damaged or something else: written anew
    return found.prompts == (prompt,) and found.encoder == encoder and found.settings == settings


def one_prompt(found: TextEmbeddings, row: int) -> TextEmbeddings:
    """One prompt without the padding that its batch gave it."""
    length = int(found.mask[row].sum())
    return TextEmbeddings(
        found.states[row : row + 1, :length], found.mask[row : row + 1, :length], (found.token_counts[row],), (found.truncated[row],)
    )

"""Prompt files and the host's CONDITIONING: where they lie, and what of a conditioning can be kept in one."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import torch
from torch import Tensor

from ...pixart.errors import InputError
from ...pixart.text.embeddings import TextEmbeddings
from ...pixart.text.prompt_file import load_prompts, save_prompts
from .family import caption_width_of
from .files import walk
from .tokens import PROMPT_KEY

DEFAULT_NAME = "prompt"
FOLDER = "prompts"  # under input/ and output/
ENDING = ".safetensors"
KEPT = {"attention_mask", "width", "height", "pooled_output", PROMPT_KEY}  # pooled_output: PixArt reads none


def choices() -> list[str]:
    """Menu entries: input/prompts, then output/prompts marked as the host marks such files."""
    return [*_files(folder_paths.get_input_directory(), ""), *_files(folder_paths.get_output_directory(), " [output]")]


def resolve(name: str) -> Path:
    """Path of a menu entry; raises InputError for a name that is not in the menu."""
    found = {**_files(folder_paths.get_output_directory(), " [output]"), **_files(folder_paths.get_input_directory(), "")}
    name = name.replace("\\", "/") if isinstance(name, str) else name
    if not isinstance(name, str) or name not in found:
        raise InputError(
            f"{name!r} is not a prompt file: expected a {ENDING} file in the folder {FOLDER} of ComfyUI's input or output. "
            "Put it there and refresh the page (key R)."
        )
    return found[name]


def save(conditioning: list, prefix: str, prompt: str) -> Path:
    """Writes one conditioning to output/prompts, under a name that is not taken yet; raises InputError for what a file can't keep."""
    if len(conditioning) != 1:
        raise InputError(f"The conditioning has {len(conditioning)} prompts; expected one. Save them one by one.")
    states, values = conditioning[0]
    lost = sorted(name for name, value in values.items() if name not in KEPT and value is not None)
    if lost:
        raise InputError(
            f"The conditioning also holds {', '.join(lost)}, which a prompt file can't keep. Save it right after "
            "PixArtTextEncode, and apply such nodes after PixArtLoadPrompt."
        )
    if states.ndim != 3:
        raise InputError(f"The conditioning has shape {tuple(states.shape)}; expected (batch, tokens, channels).")
    note = _note(states, values)
    size = (int(values["height"]), int(values["width"])) if values.get("height") and values.get("width") else None
    rows = states.shape[0]
    embeddings = TextEmbeddings(
        states, _mask(states, values.get("attention_mask")), (note.get("count", states.shape[1]),) * rows,
        (note.get("cut", ""),) * rows, size=size,
    )  # fmt: skip
    folder, name, counter, _, _ = folder_paths.get_save_image_path(_inside(prefix), folder_paths.get_output_directory())
    path = next(p for n in range(counter, 10**6) if not (p := Path(folder) / f"{name}_{n:05}{ENDING}").exists())
    return save_prompts(path, embeddings, (prompt or note.get("prompt", ""),) * rows, note.get("encoder", ""))


def _inside(prefix: str) -> str:
    """The prefix under output/prompts, where PixArtLoadPrompt looks; raises InputError for one that leads out of it."""
    parts = [part for part in prefix.replace("\\", "/").split("/") if part.strip() not in ("", ".")]
    if ".." in parts:
        raise InputError(f"filename_prefix is {prefix!r}, which lies outside output/{FOLDER}; expected a name in it, or sub/name.")
    return "/".join([FOLDER, *(parts or [DEFAULT_NAME])])


def load(path: Path, model: Any | None) -> tuple[list, str]:
    """(CONDITIONING, what to show on the node); raises InputError naming the file if it doesn't fit the model."""
    found = load_prompts(path, None if model is None else caption_width_of(model))
    embeddings = found.embeddings
    values: dict[str, Any] = {"pooled_output": None}
    if not bool(embeddings.mask.all()):
        values["attention_mask"] = embeddings.mask
    if embeddings.size:
        values["height"], values["width"] = embeddings.size
    cut = next(iter(embeddings.truncated), "")
    values[PROMPT_KEY] = {
        "prompt": next(iter(found.prompts), ""), "encoder": found.encoder, "count": next(iter(embeddings.token_counts), 0),
        "kept": embeddings.states.shape[1], "cut": cut,
    }  # fmt: skip
    shown = [*found.prompts, f"{embeddings.states.shape[1]} tokens, {found.encoder or 'encoder unknown'}"]
    # Where the host's text encoders put theirs, so that both can be joined: on the card with --gpu-only
    states = embeddings.states.to(management.intermediate_device(), torch.float32)
    return [[states, values]], "\n".join([*shown, f"cut: {cut}"] if cut else shown)


def tokens_of(conditioning: list) -> int:
    """Real tokens of the longest prompt, at least 1; raises InputError for a conditioning without any."""
    if not conditioning:
        raise InputError("The positive conditioning is empty; connect an encoded prompt, from PixArtTextEncode.")
    return max(1, *(int(_mask(states, values.get("attention_mask")).sum(dim=1).max()) for states, values in conditioning))


def _note(states: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """What was noted of the prompt; {} where another node has changed the states since and left the note."""
    note = values.get(PROMPT_KEY) or {}
    return note if note.get("kept") == states.shape[1] and bool(states.any()) else {}


def _mask(states: Tensor, given: Tensor | None) -> Tensor:
    """bool (B, M), True where there is no mask."""
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    if given is not None:
        given = given.reshape(-1, given.shape[-1]).cpu() != 0
        length = min(given.shape[-1], mask.shape[-1])
        mask[:, :length] = given[:, :length]
    return mask


def _files(base: str, mark: str) -> dict[str, Path]:
    """Menu entry -> path, of the prompt files under a folder of the host; links that lead out of it are left out."""
    folder = Path(base) / FOLDER
    if not folder.is_dir():
        return {}
    inside = folder.resolve()
    found = [path for path in walk(folder) if path.suffix == ENDING and path.is_file() and path.resolve().is_relative_to(inside)]
    return {path.relative_to(folder).as_posix() + mark: path for path in found}

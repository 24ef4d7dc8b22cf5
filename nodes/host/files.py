"""Names of model files and folders: listed for menus, resolved again inside the host's folders only, and told apart when they change."""
from __future__ import annotations

import difflib
import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import folder_paths

from ...pixart.errors import CheckpointError
from ...pixart.text.tokenizer import tokenizer_files

CONFIG = "config.json"
WEIGHT_ENDINGS = (".safetensors", ".bin")  # of the weights in a Hugging Face folder
OTHER_PARTS = {"transformer", "text_encoder", "vae", "tokenizer", "scheduler"}  # of a whole pipeline
TEXT_ENCODER = "text_encoder"  # the component that is read together with a tokenizer
BESIDE_WEIGHTS = (  # what else may be read together with a weight file, by its place
    CONFIG, "adapter_config.json",
    *(f"{stem}.index.json" for stem in (
        "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "model.safetensors", "pytorch_model.bin",
    )),
    "../model_index.json", "../scheduler/scheduler_config.json", "../vae/config.json",
)  # fmt: skip

CLOCK_TICK_NS = 20_000_000  # file systems note times this coarsely


def choices(kind: str, component: str, config: str = CONFIG) -> list[str]:
    """Menu entries of a model folder: the host's files, then folders in Hugging Face layout.

    kind: the host's folder name ("diffusion_models", "text_encoders", "loras"); component: the subfolder
    that counts where a folder holds a whole pipeline ("transformer", "text_encoder"); config: the file
    by which such a folder is known. The host's own listing is asked, which walks only where a folder has changed.
    """
    files = folder_paths.get_filename_list(kind)
    return [*files, *sorted(name for name, parts in _by_entry(files, component).items() if _folder(kind, parts, config))]


def resolve(kind: str, component: str, name: str, config: str = CONFIG) -> Path:
    """Path of a menu entry; raises CheckpointError for a name that is not in the menu.

    Slashes may lean either way, as clients on another system write them.
    """
    files = folder_paths.get_filename_list(kind)
    wanted = _posix(name) if isinstance(name, str) else ""
    listed = name if name in files else next((file for file in files if _posix(file) == wanted), None)
    found = folder_paths.get_full_path(kind, listed) if listed is not None else None
    if found is not None:
        return Path(found)
    folder = _folder(kind, _by_entry(files, component).get(wanted, {}), config)
    if folder is None:
        raise CheckpointError(_not_found(kind, name, choices(kind, component, config), vanished=listed is not None))
    return folder


def name_problem(kind: str, component: str, name: Any, config: str = CONFIG) -> bool | str:
    """For `validate_inputs`: True, or what is wrong with a name. None is a linked input, which is known only when it runs."""
    try:
        return name is None or bool(resolve(kind, component, name, config))
    except CheckpointError as error:
        return str(error)


def fingerprint(kind: str, component: str, name: Any, config: str = CONFIG) -> str:
    """For `fingerprint_inputs`: changes with the file, or with any file of the folder, that a menu entry names.

    Times and sizes only: nothing is read, no folder is walked. "" for a linked input or a name that is in no menu.
    """
    try:
        path = resolve(kind, component, name, config) if name is not None else None
    except CheckpointError:
        return ""
    if path is None:
        return ""
    files = [path]
    if path.is_dir():
        files += sorted(path / PurePosixPath(_posix(file)).name for file in folder_paths.get_filename_list(kind)
                        if _posix(file).rpartition("/")[0].endswith(path.name))  # fmt: skip
    folder = path if path.is_dir() else path.parent
    files += [folder / beside for beside in BESIDE_WEIGHTS]
    if component == TEXT_ENCODER:
        files += tokenizer_files(path)
    return ";".join(filter(None, map(stamp, files)))


def stamp(path: Path) -> str:
    """Name, time and size of a file or folder; "" if there is none."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{path}:{found.st_mtime_ns}:{found.st_size}"


def walk(folder: Path) -> tuple[Path, ...]:
    """Files anywhere under a folder that isn't one of the host's model folders; walked anew only where a folder in it has changed."""
    known = _walked.get(folder)
    if known is None or any(_changed_at(place) != at for place, at in known[0].items()):
        began = time.time_ns()
        times: dict[Path, int] = {folder: _changed_at(folder)}  # taken before a folder is listed, so that nothing is missed
        files: list[Path] = []
        for place, folders, names in os.walk(folder):
            times |= {inner: _changed_at(inner) for inner in (Path(place, name) for name in folders)}
            files += [Path(place, name) for name in names]
        known = (times, tuple(sorted(files)))
        _walked.pop(folder, None)
        if all(abs(began - at) > CLOCK_TICK_NS for at in times.values()):  # else a second change could bear the same time
            _walked[folder] = known
    return known[1]


_walked: dict[Path, tuple[dict[Path, int], tuple[Path, ...]]] = {}  # folder -> (when each folder in it had changed, files)


def _changed_at(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0  # gone, or not there yet


def _posix(name: str) -> str:
    return name.replace("\\", "/")


def _by_entry(files: list[str], component: str) -> dict[str, dict[str, list[str]]]:
    """Menu entry -> the folders it may stand for, each with its weight files; all relative to the host's folder."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in files:
        folder = _posix(file).rpartition("/")[0]
        if folder and file.endswith(WEIGHT_ENDINGS):
            outer, _, last = folder.rpartition("/")
            if last not in OTHER_PARTS - {component}:
                entry = outer if last == component and outer else folder
                found.setdefault(entry, {}).setdefault(folder, []).append(file)
    return found


def _folder(kind: str, parts: dict[str, list[str]], config: str) -> Path | None:
    """The first folder that holds both the config and weights: names are the host's, for all its places together."""
    return next(_folders(kind, parts, config), None)


def _folders(kind: str, parts: dict[str, list[str]], config: str) -> Iterator[Path]:
    for base in map(Path, folder_paths.get_folder_paths(kind)):
        for folder in sorted(parts):
            if (base / folder / config).is_file() and any((base / file).is_file() for file in parts[folder]):
                yield base / folder


def _not_found(kind: str, name: Any, menu: list[str], vanished: bool) -> str:
    places = ", ".join(folder_paths.get_folder_paths(kind))
    if str(name).lower().endswith(".gguf"):
        return (
            f"{name!r} is a GGUF file, which this node doesn't read: load it with ComfyUI-GGUF's nodes (CLIPLoaderGGUF with type pixart "
            "for T5, UnetLoaderGGUF), whose CLIP and MODEL fit here, or choose a .safetensors file."
        )
    if vanished:
        return f"{name!r} was in the folder {kind} and is gone, or its link is broken; expected under {places}. Put it back."
    wanted = _posix(str(name)).lower()
    near = [entry for entry in menu if _posix(entry).lower().rpartition("/")[2] == wanted.rpartition("/")[2]]
    near = near or difflib.get_close_matches(str(name), menu[:2000], n=3)
    return (
        f"{name!r} is not in the folder {kind}: expected one of the files or Hugging Face folders under {places}. "
        + (f"Similar: {', '.join(map(repr, near[:3]))}. " if near else "")
        + "Put it there and refresh the page (key R)."
    )

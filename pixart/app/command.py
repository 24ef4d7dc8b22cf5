"""`python -m pixart app`."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from ..config import variant_names
from ..device import check_device
from ..text.names import PRECISIONS

Parts = Callable[[argparse.Namespace], Mapping[str, Path]]


def add_app_command(commands: argparse._SubParsersAction, parts: Parts, demo_loras: Path, dtypes: Mapping[str, str]) -> None:
    """Adds it to the command line. parts: transformer, text_encoder and vae of the arguments, the demo's by default."""
    app = commands.add_parser("app", help="a page for the browser: one prompt box, no graph (default: with the demo model)")
    app.add_argument("--transformer", type=Path, help="file or folder; a diffusers pipeline's folder is enough on its own")
    app.add_argument("--text-encoder", type=Path, help="T5: Hugging Face folder or .safetensors")
    app.add_argument("--tokenizer", type=Path, help="folder, tokenizer.json or spiece.model, if not beside the T5")
    app.add_argument("--vae", type=Path, help="diffusers folder or .safetensors")
    app.add_argument("--loras", type=Path, help="a folder whose LoRAs the page offers (default: the demo's, for the demo)")
    app.add_argument("--variant", choices=("auto", *variant_names()), default="auto", help="the variant, if the weights can't tell")
    app.add_argument("--ema", action="store_true", help="take state_dict_ema from an original .pth")
    app.add_argument("--dtype", choices=tuple(dtypes), help="default: as the weights are stored")
    app.add_argument("--t5-precision", choices=PRECISIONS, help="for T5's linear layers; int8, nf4, fp4 need bitsandbytes")
    app.add_argument(
        "--t5", choices=("auto", "keep", "release"), default="auto",
        help="whether T5 stays in memory while it draws (auto: if there is room)",
    )  # fmt: skip
    app.add_argument(
        "--few-steps", choices=("auto", "lcm", "one-step", "no"), default="auto",
        help="what the transformer was distilled for (auto: guessed from its name)",
    )  # fmt: skip
    app.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    app.add_argument("--output", type=Path, default=Path("output"), help="folder for pictures; the page can read only this one")
    app.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for every machine that can reach this one (default: this one only)")
    app.add_argument("--port", type=int, default=7860, help="0: any free port")
    app.add_argument("--share", choices=("no", "yes"), default="no", help="yes: a public link through Gradio's tunnel")
    app.set_defaults(run=lambda given: _app(given, parts(given), demo_loras, dtypes))


def _app(given: argparse.Namespace, parts: Mapping[str, Path], demo_loras: Path, dtypes: Mapping[str, str]) -> None:
    import torch

    from . import server

    address = server.check_free(server.Address(given.host, given.port, given.share == "yes"))  # before minutes of loading
    folder = server.prepare(given.output)
    from .line import Line
    from .model import Model, Places

    loras = demo_loras if given.loras is None and given.transformer is None and demo_loras.is_dir() else given.loras
    places = Places(
        **parts,
        tokenizer=given.tokenizer,
        loras=loras,
        variant=given.variant,
        ema=given.ema,
        dtype=getattr(torch, dtypes[given.dtype]) if given.dtype else None,
        device=check_device(given.device),
        t5_precision=given.t5_precision,
        t5=given.t5,
        few_steps=given.few_steps,
    )
    server.serve(Line(Model(places), folder), folder, address)

#!/usr/bin/env python3
"""One command from a prompt to a picture: python3 quickstart.py "a red circle above a blue square".

Needs Python 3.10 or later and nothing else. It makes .venv beside this file, installs what is
missing, starts a ComfyUI of its own with this pack and the demo models, queues the demo workflow
and saves the picture in output/. Only the first run uses the network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("quickstart.py needs Python 3.10 or later; this is Python " + sys.version.split()[0] + ".")

from demo import DISTILLED, WEIGHTS
from launch import checkout, environment, graph, host
from launch.errors import LaunchError

ROOT = Path(__file__).absolute().parent
WORK = ROOT / ".quickstart"
LAST_PORT = 65535
MOST_WORKERS = 4  # processes of the test suite, 2 to 3 GB each
A_DAY = 86400.0  # a slow machine is no error; progress is shown, and Ctrl-C stops
STEPS, CFG = {False: 12, True: 4}, {False: 4.5, True: 1.0}  # by --fast; 12 draw outlines as well as 20, see demo/README.md


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red circle above a blue square", help="what to draw")
    parser.add_argument("--negative", default="", help="what not to draw")
    parser.add_argument("--seed", type=int, default=0, help="number that sets the noise")
    parser.add_argument("--steps", type=int, default=argparse.SUPPRESS, help="sampling steps (default: 12; with --fast 4)")
    cfg = "how strictly the prompt is followed (default: 4.5; with --fast 1)"
    parser.add_argument("--cfg", type=float, default=argparse.SUPPRESS, help=cfg)
    parser.add_argument("--fast", action="store_true", help="draw in four steps, with the LoRA that distils the demo")
    parser.add_argument("--width", type=int, default=256, help="wanted width; the nearest trained size is used")
    parser.add_argument("--height", type=int, default=256, help="wanted height")
    parser.add_argument("--output", type=png_file, help="PNG file to write (default: a new one in output/)")
    parser.add_argument("--cpu", action="store_true", help="don't use the GPU")
    parser.add_argument("--port", type=port_number, help="port of the ComfyUI that is started (default: a free one)")
    parser.add_argument("--serve", action="store_true", help="keep ComfyUI running, to open the graph in the browser")
    parser.add_argument("--standalone", action="store_true", help="draw with pixart.Pipeline, without ComfyUI")
    parser.add_argument("--test", nargs=argparse.REMAINDER, help="run the test suite; what follows goes to pytest")
    given = parser.parse_args(arguments)
    given.steps, given.cfg = getattr(given, "steps", STEPS[given.fast]), getattr(given, "cfg", CFG[given.fast])
    return given


def png_file(text: str) -> Path:
    """Of --output, refused before anything is installed or drawn."""
    path = Path(text).absolute()
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a PNG file; expected one that ends in .png")
    return path


def port_number(text: str) -> int:
    """Of --port."""
    if not text.isdecimal() or not 1 <= int(text) <= LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number from 1 to {LAST_PORT}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    given = parse(arguments)
    try:
        with host.signals_raise():
            if given.test is not None:
                return run_tests(given.test)
            check_weights(given.fast)
            (draw_standalone if given.standalone else draw_in_comfyui)(given)
            return 0
    except LaunchError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder of another user
        print(f"quickstart: {error}. This folder and --output must be writable, with space left.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: stopped", file=sys.stderr)
        return 130


def draw_in_comfyui(given: argparse.Namespace) -> None:
    """Start a ComfyUI, queue the demo workflow, save its picture and say where; then the host ends, or serves."""
    path, stem = output_path(given), "lcm-demo" if given.fast else "demo"
    comfyui = checkout.find_comfyui(ROOT)
    python = install(environment.host_profile(comfyui))
    if comfyui is None:
        comfyui = checkout.pypi_comfyui(python, WORK)
    base = checkout.BaseDirectory(WORK / "base")
    base.prepare(ROOT, {}, (ROOT / "demo/inputs").glob("*.png"))
    prompt = graph.load(ROOT / f"workflows/api/{stem}.json")
    settings = {
        "prompt": given.prompt, "negative": given.negative, "seed": given.seed, "steps": given.steps,
        "cfg": given.cfg, "width": given.width, "height": given.height,
    }  # fmt: skip
    graph.configure(prompt, settings)
    workflow = graph.configured_workflow(graph.load(ROOT / f"workflows/{stem}.json"), prompt)
    (base.folder / f"user/default/workflows/{stem}.json").write_text(json.dumps(workflow), encoding="utf-8")
    say(f"Starting ComfyUI from {comfyui} (log: {WORK / 'host.log'})")
    cpu = given.cpu or host.accelerator(python) == "cpu"
    with host.Host(python, comfyui, base.folder, cpu=cpu, port=given.port, log=WORK / "host.log") as server:
        started = time.monotonic()
        try:
            picture = server.client.save(prompt, workflow, A_DAY, show_progress)
        except OSError as error:
            raise LaunchError(f"ComfyUI stopped answering ({error}). The end of its log:\n{server.log_tail()}") from None
        saved = base.folder / "output" / picture["subfolder"] / picture["filename"]
        path.write_bytes(saved.read_bytes())  # sooner than over HTTP
        say(f"Drawn in {time.monotonic() - started:.1f} s, seed {given.seed}.")
        if given.serve:
            serve(server, path, stem)
        else:
            say("To open the graph in the browser: python3 quickstart.py --serve, or drop the PNG on any ComfyUI with this pack.")
            say(str(path))


def serve(server: host.Host, picture: Path, stem: str) -> None:
    """Keep the host running until Ctrl-C."""
    say(f"Open {server.url} in the browser; the graph is in the Workflows panel (w) as {stem}. Ctrl-C stops ComfyUI.")
    say(str(picture))
    try:
        while server.process is not None and server.process.poll() is None:
            time.sleep(0.5)
    except KeyboardInterrupt:
        return
    raise LaunchError(f"ComfyUI stopped by itself. The end of its log:\n{server.log_tail()}")


def draw_standalone(given: argparse.Namespace) -> None:
    """Draw with pixart.Pipeline in a process of the environment, and say where the picture is."""
    path = output_path(given)
    python = install(environment.standalone_profile())
    device = "cpu" if given.cpu else host.accelerator(python)
    command = [str(python), "-m", "launch.standalone", "--output", str(path), "--device", device]
    for name in ("negative", "seed", "steps", "cfg", "width", "height"):
        command.append(f"--{name}={getattr(given, name)}")
    command += [f"--lora={DISTILLED['lcm']}"] if given.fast else []
    command += ["--", given.prompt]  # which may begin with a dash
    if subprocess.call(command, cwd=ROOT, env=host.environment()) != 0:
        raise LaunchError("pixart.Pipeline failed; its message is above.")
    say(str(path))


def run_tests(arguments: list[str]) -> int:
    """Install the test extras and run pytest; its exit status."""
    comfyui = checkout.find_comfyui(ROOT)
    profile = environment.test_profile(comfyui, ROOT)
    if arguments:
        return subprocess.call([str(install(profile)), "-m", "pytest", *arguments], cwd=ROOT)
    with browser_installed():
        python = install(profile)
    if comfyui is None:
        checkout.pypi_comfyui(python, WORK)  # here, since the tests' processes would all make it
    cores = os.cpu_count() or 1
    workers = min(MOST_WORKERS, cores)
    # In the folders' order: else files of few tests come last, and some of those are the longest
    command = [str(python), "-m", "pytest", "-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    threads = max(1, cores // workers)
    environ = {"OMP_NUM_THREADS": str(threads), **os.environ}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the tests start a hundred processes, which would all compile this pack
    return subprocess.call(command, cwd=ROOT, env=environ)


@contextlib.contextmanager
def browser_installed() -> Iterator[None]:
    """Debian's chromium for the browser test, installed meanwhile where this user may; the test says so otherwise."""
    if any(map(shutil.which, environment.BROWSERS)) or not shutil.which("apt-get") or getattr(os, "geteuid", lambda: 1)() != 0:
        yield
        return
    say("Installing chromium for the browser test")
    commands = "apt-get update -qq; apt-get install -y -qq --no-install-recommends chromium"
    quiet = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    with subprocess.Popen(["sh", "-c", commands], env=quiet, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as process:
        try:
            yield
        except BaseException:
            process.terminate()
            raise


def install(profile: environment.Profile) -> Path:
    """The environment's interpreter, with `profile` installed."""
    venv = environment.Environment(ROOT / ".venv")
    if venv.is_ready(profile):
        return venv.python
    say(f"Installing the {profile.name} packages into {venv.folder} (first run only: about 6 GB, some minutes)")
    venv.ensure(profile)
    return venv.python


def check_weights(fast: bool = False) -> None:
    """Stop early when the clone lacks the demo models."""
    missing = [str(file.relative_to(ROOT)) for file in WEIGHTS.values() if not file.is_file()]
    if missing:
        raise LaunchError(
            f"the demo models are missing: {', '.join(missing)}. They are part of the repository: "
            "restore them with git checkout -- demo/weights"
        )
    if fast and not DISTILLED["lcm"].is_file():
        raise LaunchError(
            f"--fast needs {DISTILLED['lcm'].relative_to(ROOT)}, which is made by training: python -m pixart train "
            "configs/train/demo-lcm-lora.json. Draw without --fast until then"
        )


def output_path(given: argparse.Namespace) -> Path:
    """Where the picture goes: --output, else a free name in output/ made from the prompt."""
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        return given.output
    folder = ROOT / "output"
    folder.mkdir(exist_ok=True)
    stem = "-".join(re.findall(r"[a-z0-9]+", given.prompt.lower()))[:60].strip("-") or "picture"
    names = (f"{stem}-{given.seed}{'' if n == 1 else f'-{n}'}.png" for n in range(1, 100000))
    return next(folder / name for name in names if not (folder / name).exists())


def show_progress(_node: str, done: int, total: int) -> None:
    """One line that is redrawn on a terminal and written once at the end elsewhere."""
    if sys.stderr.isatty():
        bar = "#" * (30 * done // max(total, 1))
        print(f"\r  step {done}/{total} [{bar:<30}]", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or done % 5 == 0:
        print(f"  step {done}/{total}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A line for the user, at once."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

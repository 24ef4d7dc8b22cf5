"""T5 at every precision: load seconds and peak, resident bytes, seconds per prompt, cosine to fp32; beside plain transformers.

`python -m benchmarks text` measures each case in a fresh process on random weights of the XXL shape (fewer layers with
--layers, which the report says) and writes results/text.{json,md,png} after each; run again, it measures what is missing.
Memory is read from /proc (Linux), and from the card with --device cuda.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.text_report import TextResult, read_text_results, write_text_results
from benchmarks.xxl import CONFIG, XXL, first_layers, reference_states, sizes, write_weights

TOKENS = (20, 300)
GIB = 2**30
TIMEOUT = 3600  # seconds per case
ROOM = 1.15  # of the resident size: the most that loading may take
RESULTS = Path(__file__).parent / "results"
OURS, PLAIN, WRITTEN = "pixart", "transformers", "pixart, written once"
REFERENCE, WRITE = "reference", "write"  # children that measure nothing
FP32, BF16, FP16 = "fp32", "bf16", "fp16"
DTYPES = {FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16}
CASES = (
    (OURS, FP32), (OURS, BF16), (OURS, FP16), (PLAIN, BF16),
    *((who, precision) for precision in ("int8", "nf4") for who in (OURS, WRITTEN, PLAIN)),
    (OURS, "fp8_e4m3fn"), (PLAIN, FP32), *((who, "fp4") for who in (OURS, WRITTEN, PLAIN)),
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measures the cases that have no result yet; or, as the child it starts, does one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks text", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=XXL["num_layers"], help="of the encoder; fewer where memory or time is short")
    parser.add_argument("--width", type=int, default=XXL["d_model"], help="d_model; d_ff and heads follow (for trying it out)")
    parser.add_argument("--precision", nargs="+", help="only these")
    parser.add_argument("--loader", nargs="+", choices=(OURS, PLAIN, WRITTEN), help="only these")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of text.json, text.md and text.png")
    parser.add_argument("--work", type=Path, help="folder that keeps the weights, 20 GB (default: a temporary one)")
    parser.add_argument("--again", action="store_true", help="measure everything anew")
    parser.add_argument("--note", default="", help="a sentence on the state of the machine, for the report")
    parser.add_argument("--child", nargs=3, metavar=("SOURCE", "WHO", "PRECISION"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        source, who, precision = given.child
        print(json.dumps(child(Path(source), who, precision, given.device)))
        return
    shape = sizes(given.layers, given.width)
    results = {} if given.again else read_text_results(given.out, shape, given.device)
    wanted = [
        (who, precision) for who, precision in CASES if precision in (given.precision or [precision]) and who in (given.loader or [who])
    ]  # fmt: skip
    missing = [case for case in wanted if "error" in results.get(case, {"error": "not measured"})]
    with workplace(given.work) as place:
        for case, found in run(place / f"{given.layers}x{given.width}", shape, missing, given.device):
            results[case] = found
            rows = [TextResult(*each, results[each]) for each in CASES if each in results]
            write_text_results(given.out, rows, shape, given.device, given.note)  # a run that is stopped leaves what it found


@contextmanager
def workplace(given: Path | None) -> Iterator[Path]:
    """The folder that was given, which stays, or a temporary one."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="pixart-text-") as made:
        yield Path(made)


def run(place: Path, shape: dict[str, Any], cases: list[tuple[str, str]], device: str) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Every case in a process of its own, on as many layers as fit into memory; fp32 states are made first, for the cosine."""
    if not cases:
        return
    source = write_weights(place / "bf16", shape)
    if not all(_states_file(source, tokens).is_file() for tokens in TOKENS):
        failed = run_child(source, REFERENCE, FP32, "cpu")
        if "error" in failed:
            raise RuntimeError(f"the reference in fp32 failed: {failed['error']}")
    for who, precision in cases:
        layers = layers_that_fit(shape, precision, free_memory(device))
        chosen = source if layers == shape["num_layers"] else first_layers(source, layers)
        found = {}
        if who == WRITTEN and not _seconds_file(chosen, precision).is_file():
            found = run_child(chosen, WRITE, precision, device)  # its reading is measured in a process that hasn't quantized
        if "error" not in found:
            found = run_child(chosen, who, precision, device)
        found["layers"] = layers
        print(f"{who} {precision}: {found}", file=sys.stderr, flush=True)
        yield (who, precision), found


def run_child(source: Path, who: str, precision: str, device: str) -> dict[str, Any]:
    """What `child` returns in a process of its own, or {"error": last line}."""
    command = [sys.executable, "-m", "benchmarks", "text", "--device", device, "--child", str(source), who, precision]
    try:
        done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIMEOUT} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    return json.loads(lines[-1])


def free_memory(device: str) -> int:
    """Bytes that can be had on the device."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def layers_that_fit(shape: dict[str, Any], precision: str, free: int) -> int:
    """All layers, or as many as fit with room for loading; before it is quantized, a weight is in bf16."""
    from pixart.text.weights import expected_shapes

    def itemsize(name: str) -> int:
        return 4 if precision == FP32 or (precision == FP16 and ".wo." in name) else 2  # wo overflows in fp16

    counts = {name: itemsize(name) * prod(size) for name, size in expected_shapes(shape).items()}
    layer = sum(count for name, count in counts.items() if name.startswith("encoder.block.0."))
    fitting = (free / ROOM - sum(counts.values())) // layer + shape["num_layers"]
    return int(max(1, min(fitting, shape["num_layers"])))


def child(source: Path, who: str, precision: str, device: str) -> dict[str, Any]:
    """One job in this process."""
    if who == REFERENCE:
        return write_reference(source)
    return write_folder(source, precision, device) if who == WRITE else measure(source, who, precision, device)


def write_reference(source: Path) -> dict[str, Any]:
    """Writes the fp32 states of each number of tokens beside the weights."""
    from safetensors.torch import save_file

    vocabulary = json.loads((source / CONFIG).read_text(encoding="utf-8"))["vocab_size"]
    for tokens, states in zip(TOKENS, reference_states(source, [_ids(tokens, vocabulary) for tokens in TOKENS])):
        save_file({"states": states.contiguous()}, str(_states_file(source, tokens)))
    return {}


def write_folder(source: Path, precision: str, device: str) -> dict[str, Any]:
    """Quantizes `source` once, and notes the seconds it took beside it."""
    from pixart.text.folder import quantize_folder

    place = _written(source, precision)
    shutil.rmtree(place, ignore_errors=True)
    started = time.perf_counter()
    quantize_folder(source, place, precision, device)
    _seconds_file(source, precision).write_text(str(time.perf_counter() - started), encoding="utf-8")
    return {}


def _written(source: Path, precision: str) -> Path:
    return source.with_name(source.name.replace("bf16", precision, 1))


def _seconds_file(source: Path, precision: str) -> Path:
    return _written(source, precision).with_suffix(".seconds")


def _states_file(source: Path, tokens: int) -> Path:
    return source.with_name(f"{source.name}-fp32-{tokens}.safetensors")


def _ids(tokens: int, vocabulary: int) -> Tensor:
    """(1, tokens), the same each time."""
    return torch.randint(2, 32000, (1, tokens), generator=torch.Generator().manual_seed(tokens)) % vocabulary


def measure(source: Path, who: str, precision: str, device: str) -> dict[str, Any]:
    """Loads an encoder in this process and encodes; raises what the loader raises."""
    with watched(device) as loading:
        model = load(_written(source, precision) if who == WRITTEN else source, who, precision, device)
    found = {"load": loading, "resident_gib": resident(model) / GIB, "encode": {}, "cosine": {}}
    with torch.no_grad():
        model(input_ids=_ids(TOKENS[0], model.config.vocab_size).to(device))  # the first run sets things up
        for tokens in TOKENS:
            ids = _ids(tokens, model.config.vocab_size).to(device)
            with watched(device) as encoding:
                states = model(input_ids=ids).last_hidden_state.float().cpu()
            found["encode"][tokens] = encoding
            found["cosine"][tokens] = _cosine(_states_file(source, tokens), states)
    if who == WRITTEN:
        found["write_seconds"] = float(_seconds_file(source, precision).read_text(encoding="utf-8"))
    return found


def load(place: Path, who: str, precision: str, device: str) -> Any:
    """The model alone, without tokenizer."""
    dtype = DTYPES.get(precision)
    if who == PLAIN:
        return _load_plain(place, precision, dtype, device)
    from pixart.text.encoder import build_model, open_weights

    return build_model(*open_weights(place, dtype, None if dtype else precision), device)


def _load_plain(place: Path, precision: str, dtype: torch.dtype | None, device: str) -> Any:
    """As transformers' documentation loads it: `wo` stays unquantized."""
    from transformers import T5EncoderModel

    from pixart.text.folder import bitsandbytes_config

    if dtype is not None:
        return T5EncoderModel.from_pretrained(place, dtype=dtype).to(device).eval()
    config = bitsandbytes_config(precision)
    return T5EncoderModel.from_pretrained(place, quantization_config=config, dtype=torch.bfloat16, device_map={"": device}).eval()


def resident(model: Any) -> int:
    """Bytes of parameters and buffers, and of what bitsandbytes' layers hold beside them."""
    from pixart.text.quantize import resident_bytes

    seen = resident_bytes(model)
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        parts = [] if state is None else [state.absmax, state.code]
        parts += [getattr(getattr(state, "state2", None), name, None) for name in ("absmax", "code")]
        parts.append(getattr(parameter, "SCB", None))
        seen += sum(part.nbytes for part in parts if part is not None)
    return seen


def _cosine(reference: Path, states: Tensor) -> float | None:
    """Lowest per-token cosine to the states of fp32; None where there are none of so few layers."""
    from safetensors.torch import load_file

    if not reference.is_file():
        return None
    return float(torch.cosine_similarity(states, load_file(reference)["states"], dim=-1).min())


@contextmanager
def watched(device: str) -> Iterator[dict[str, float]]:
    """Fills seconds, cpu_seconds, grown_gib (highest private memory above that before), peak_gib; on CUDA device_gib."""
    from benchmarks.full_size import memory
    from benchmarks.full_size import watched as watch_memory

    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = memory()["private"] / GIB if os.path.exists("/proc/self/status") else 0.0
    figures: dict[str, float] = {}
    with watch_memory() as found:
        yield figures
        if cuda:
            torch.cuda.synchronize()
    figures.update(found, grown_gib=found["private_gib"] - before)
    if cuda:
        figures["device_gib"] = torch.cuda.max_memory_allocated() / GIB


if __name__ == "__main__":
    main()

"""T5 at every precision: load seconds and peak, resident bytes, seconds per prompt, cosine to fp32; beside plain transformers.

`python -m benchmarks text` measures each case in a fresh process on random weights of the XXL shape (fewer layers with
--layers, which the report says) and writes results/text.{json,md,png}. Memory is read from /proc (Linux), and from the
card with --device cuda.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.text_report import TextResult, write_text_results

XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24,
    "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
TOKENS = (20, 300)
GIB = 2**30
TIMEOUT = 3600  # seconds per case
RESULTS = Path(__file__).parent / "results"
OURS, PLAIN, WRITTEN = "pixart", "transformers", "pixart, written once"
CASES = (
    (OURS, "fp32"), (PLAIN, "fp32"), (OURS, "bf16"), (PLAIN, "bf16"), (OURS, "fp8_e4m3fn"),
    *((who, precision) for precision in ("int8", "nf4", "fp4") for who in (OURS, WRITTEN, PLAIN)),
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measures all cases and writes the results; or, as the child it starts, one case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks text", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=XXL["num_layers"], help="of the encoder; fewer where memory or time is short")
    parser.add_argument("--width", type=int, default=XXL["d_model"], help="d_model; d_ff and heads follow (for trying it out)")
    parser.add_argument("--precision", nargs="+", help="only these")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of text.json, text.md and text.png")
    parser.add_argument("--work", type=Path, help="folder for the random weights (default: a temporary one)")
    parser.add_argument("--note", default="", help="a sentence on the state of the machine, for the report")
    parser.add_argument("--child", nargs=3, metavar=("SOURCE", "WHO", "PRECISION"), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        source, who, precision = given.child
        print(json.dumps(measure(Path(source), who, precision, given.device)))
        return
    cases = [case for case in CASES if given.precision is None or case[1] in given.precision or case[1] == "fp32"]
    shape = sizes(given.layers, given.width)
    with tempfile.TemporaryDirectory(prefix="pixart-text-", dir=given.work) as made:
        source = write_weights(Path(made) / "bf16", shape)
        results: list[TextResult] = []
        for result in run(source, cases, given.device):
            results.append(result)
            write_text_results(given.out, results, shape, given.device, given.note)  # a run that is stopped leaves what it found


def sizes(layers: int, width: int) -> dict[str, Any]:
    """XXL's, or in its proportions."""
    return {**XXL, "num_layers": layers, "d_model": width, "d_ff": width * 5 // 2, "num_heads": width // XXL["d_kv"]}


def write_weights(folder: Path, shape: dict[str, Any]) -> Path:
    """A bf16 folder of random weights, one shard a layer; scaled as T5's initialisation, so that attention and MLP both act."""
    from safetensors.torch import save_file

    from pixart.text.weights import expected_shapes

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, Tensor]] = {}
    weight_map = {}
    shapes = expected_shapes(shape)
    order = sorted(shapes, key=_shard_of)
    for position, name in enumerate(order):
        shard = _shard_of(name)
        shards.setdefault(shard, {})[name] = _random(name, shapes[name], shape, generator).to(torch.bfloat16)
        weight_map[name] = f"model-{shard}.safetensors"
        if position + 1 == len(order) or _shard_of(order[position + 1]) != shard:
            save_file(shards.pop(shard), str(folder / f"model-{shard}.safetensors"), {"format": "pt"})
    config = {**shape, "model_type": "t5", "architectures": ["T5EncoderModel"], "is_encoder_decoder": False, "use_cache": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def _shard_of(name: str) -> str:
    return name.split(".")[2].zfill(3) if name.startswith("encoder.block.") else "rest"


def _random(name: str, shape: tuple[int, ...], sizes: dict[str, Any], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    scale = 1.0 if name == "shared.weight" else shape[1] ** -0.5
    if name.endswith("SelfAttention.q.weight"):
        scale *= sizes["d_kv"] ** -0.5  # T5 doesn't divide by it in attention
    return torch.randn(shape, generator=generator) * scale


def run(source: Path, cases: list[tuple[str, str]], device: str) -> Iterator[TextResult]:
    """Every case in a process of its own; states of fp32 are kept beside the weights for the cosine."""
    for who, precision in cases:
        command = [sys.executable, "-m", "benchmarks", "text", "--device", device, "--child", str(source), who, precision]
        root = Path(__file__).resolve().parents[1]
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT)
            lines = done.stdout.strip().splitlines()
            failed = {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
            found = json.loads(lines[-1]) if done.returncode == 0 and lines else failed
        except subprocess.TimeoutExpired:
            found = {"error": f"not done after {TIMEOUT} s"}
        print(f"{who} {precision}: {found}", file=sys.stderr, flush=True)
        yield TextResult(who, precision, found)


def measure(source: Path, who: str, precision: str, device: str) -> dict[str, Any]:
    """Loads an encoder in this process and encodes; raises what the loader raises."""
    place = source
    if who == WRITTEN:
        from pixart.text.folder import quantize_folder

        place = source.parent / precision
        if not place.is_dir():
            started = time.perf_counter()
            quantize_folder(source, place, precision, device)
            (source.parent / f"{precision}.seconds").write_text(str(time.perf_counter() - started))
            return _again(source, who, precision, device)  # reading is measured in a process that hasn't quantized
    with watched(device) as loading:
        model = load(place, who, precision, device)
    found = {"load": loading, "resident_gib": resident(model) / GIB, "encode": {}, "cosine": {}}
    for tokens in TOKENS:
        ids = torch.randint(2, 32000, (1, tokens), generator=torch.Generator().manual_seed(tokens)).to(device)
        ids = ids % model.config.vocab_size
        with torch.no_grad():
            model(input_ids=ids)  # the first run sets things up
            with watched(device) as encoding:
                states = model(input_ids=ids).last_hidden_state.float().cpu()
        found["encode"][tokens] = encoding
        found["cosine"][tokens] = _cosine(source, tokens, states, keep=(who, precision) == (OURS, "fp32"))
    if who == WRITTEN:
        found["write_seconds"] = float((source.parent / f"{precision}.seconds").read_text())
    return found


def _again(source: Path, who: str, precision: str, device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks", "text", "--device", device, "--child", str(source), who, precision]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, text=True, timeout=TIMEOUT, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def load(place: Path, who: str, precision: str, device: str) -> Any:
    """The model alone, without tokenizer."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision)
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


def _cosine(source: Path, tokens: int, states: Tensor, keep: bool) -> float | None:
    """Lowest per-token cosine to the states of fp32, which are kept the first time."""
    from safetensors.torch import load_file, save_file

    file = source.parent / f"fp32-{tokens}.safetensors"
    if keep:
        save_file({"states": states.contiguous()}, str(file))
    if not file.is_file():
        return None
    return float(torch.cosine_similarity(states, load_file(file)["states"], dim=-1).min())


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

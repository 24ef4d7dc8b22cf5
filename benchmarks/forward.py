"""One step with guidance beside the peers: `python -m benchmarks forward --px 256,512 --peers comfyui,diffusers`.

`--kv 14:2,28:4 --px 2048,4096 --peers ""` times KV compression of 14 of the 28 blocks by 2, and of all by 4, beside none.
`--cards 300,800` adds what 20 steps of all blocks would take on machines of so many TFLOP/s, computed from the count of operations.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots
from benchmarks.peers import CFG, CORE, OURS, PADDED, PAG, PEERS, TOKENS, XL_BLOCKS, Compressed, Size, Workload, choose_host, make_peer
from benchmarks.rate import elsewhere, matmul_rate, operations, step_flops
from benchmarks.report import machine, versions
from benchmarks.timing import keep_freed_memory, ratio, summarise, take_turns

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a CPU can do in minutes; the blocks are alike, so that time grows with their number.
CPU_BLOCKS = {256: XL_BLOCKS, 512: XL_BLOCKS, 1024: XL_BLOCKS, 2048: 2}  # others 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    chosen = parse(arguments)
    choose_host(chosen.attention, chosen.device)
    keep_freed_memory()
    name = f"forward-{chosen.device}-{chosen.dtype}" + "".join(
        mark for mark, holds in (("-kv", chosen.kv), ("-pag", chosen.pag), ("-as-user", chosen.as_user)) if holds
    )
    report: dict[str, Any] = {
        "machine": machine(), "note": chosen.note, "device": device_name(chosen.device), "dtype": chosen.dtype, "cfg": CFG,
        "attention": chosen.attention, "as_user": chosen.as_user, "tokens": TOKENS, "diffusers_tokens": PADDED,
        "matmul_rate": matmul_rate(DTYPES[chosen.dtype], chosen.device),
        "rounds": chosen.rounds, "peers": chosen.peers, "kv": [str(one) for one in chosen.kv], "pag": chosen.pag,
        "cards": chosen.cards, "steps": chosen.steps, "sizes": [],
    }  # fmt: skip
    for pixels in chosen.px:
        size = Size(pixels, blocks_for(pixels, chosen))
        report["sizes"].append(measure(size, contender_names(chosen), chosen))
        write(report, chosen.out, name)
        print(markdown(report), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, lists split."""
    parser = make_parser("forward", __doc__)
    add_pag(parser)
    parser.add_argument(
        "--as-user", action="store_true",
        help="what a user gets: the host's loaders and its attention choose for themselves (diffusers: the file's dtype)",
    )  # fmt: skip
    parser.add_argument(
        "--cards", type=parse_rates, default=[], metavar="TFLOPS,...",
        help="what a whole run would take on machines of such rates of matrix products, computed from the count of operations",
    )  # fmt: skip
    parser.add_argument("--steps", type=at_least(1), default=20, help="of such a run")
    chosen = parser.parse_args(arguments)
    chosen.attention = "host" if chosen.as_user else chosen.attention
    return chosen


def make_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Of the options that benchmarks of sizes share."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {command}", description=description)
    parser.add_argument("--px", type=parse_sides, default=[256, 512, 1024], metavar="SIDE,...", help="in pixels")
    parser.add_argument(
        "--peers", type=parse_peers, default=["comfyui", "diffusers"], metavar="NAME,...",
        help="also: compiled, our core under torch.compile; \"\" for none",
    )  # fmt: skip
    parser.add_argument(
        "--kv", type=parse_kv, default=[], metavar="BLOCKS:RATIO,...",
        help="also ours with KV compression; blocks are counted of 28, the last ones, and fewer of them where fewer are run",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--blocks", type=at_least(1), help="of the 28 (default: all; on a CPU fewer above 1024 px)")
    parser.add_argument(
        "--attention", choices=("pytorch", "host"), default="pytorch",
        help="of the host: torch's, which GPUs use anyway, or the host's choice, on a CPU one in slices",
    )  # fmt: skip
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--warm-up", type=at_least(0), default=1, help="rounds before those that count; 0 where a step takes minutes")
    parser.add_argument("--note", default="", help="a sentence on the state of the machine, for the report")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def add_pag(parser: argparse.ArgumentParser) -> None:
    """The option of benchmarks of single steps."""
    parser.add_argument("--pag", action="store_true", help="also ours with perturbed-attention guidance of one block")


def blocks_for(pixels: int, chosen: argparse.Namespace) -> int:
    """How many blocks are run at a size."""
    return chosen.blocks or (CPU_BLOCKS.get(pixels, 1) if chosen.device == "cpu" else XL_BLOCKS)


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of no less, as an option's type."""

    def number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from {least}")
        return int(text)

    return number


def parse_sides(text: str) -> list[int]:
    """"256,512" as a list."""
    sides = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if any(side < 16 or side % 16 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}; expected sides in pixels, multiples of 16, like 256,512")
    return sides


def parse_peers(text: str) -> list[str]:
    """"comfyui,diffusers" as a list."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; expected some of {', '.join(PEERS)}")
    return names


def parse_kv(text: str) -> list[Compressed]:
    """"14:2,28:4" as a list."""
    try:
        return [Compressed.parse(part) for part in text.split(",") if part]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_rates(text: str) -> list[float]:
    """"300,800" as a list."""
    rates = [float(part) if part.strip().replace(".", "", 1).isdecimal() else 0.0 for part in text.split(",")]
    if any(not 0 < rate <= 1e6 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}; expected TFLOP/s, like 300,800")
    return rates


def measure(size: Size, names: Sequence[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every peer at one size, our ratio to each, and that of KV compression to none."""
    work = Workload(size, DTYPES[chosen.dtype], chosen.device, as_user=chosen.as_user)
    contenders, errors = {}, {}
    for name in names:
        try:
            run = make_peer(name, work)
            run()  # which shows whether it can draw this size
            contenders[name] = run
        except Exception as error:  # a peer that can't draw this size is a result; we must be able to
            if name in (OURS, CORE):
                raise
            errors[name] = f"{type(error).__name__}: {error}"
    peaks = {name: peak_of_step(run) for name, run in contenders.items()} if chosen.device == "cuda" else {}
    take_turns(contenders, chosen.warm_up)  # only with all of them loaded is memory laid out as it stays
    seconds = take_turns(contenders, chosen.rounds)
    return {
        "errors": errors,
        "pixels": size.pixels, "image_tokens": size.tokens, "blocks": size.blocks, "flops": step_flops(work),
        "seconds": {name: summarise(times) for name, times in seconds.items()},
        "ratio": {name: ratio(seconds[OURS], times) for name, times in seconds.items() if name in chosen.peers},
        "kv_ratio": {str(kv): ratio(seconds[name], seconds[OURS]) for kv in chosen.kv if (name := f"{OURS} {kv}") in seconds},
        "pag_ratio": ratio(seconds[PAG], seconds[OURS]) if PAG in seconds else None,
        "operations": operations(work, list(seconds)), "peak_mib": peaks,
    }  # fmt: skip


def peak_of_step(step: Callable[[], float]) -> float:
    """MiB of a card's memory that a step takes above what lies there before it, the weights of all."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def contender_names(chosen: argparse.Namespace) -> list[str]:
    """Ours, then either ours with what was asked for or the core alone, and the peers."""
    return names_of([str(kv) for kv in chosen.kv], chosen.peers, chosen.pag)


def names_of(compressed: Sequence[str], peers: Sequence[str], pag: bool = False) -> list[str]:
    """In the order of the table."""
    changed = [f"{OURS} {kv}" for kv in compressed] + [PAG] * pag
    return [OURS, *(changed or [CORE]), *peers]


def device_name(device: str) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def write(report: dict[str, Any], folder: Path, name: str) -> None:
    """The JSON, the table, and the plot where there are two sizes or more."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(report) + "\n", encoding="utf-8")
    if len(report["sizes"]) > 1:
        plots.time_against_tokens(report, folder / f"{name}.png")
    if report["kv"]:
        plots.time_against_ratio(report, folder / f"{name}-ratio.png")


def markdown(report: dict[str, Any]) -> str:
    """A table of medians, spreads and ratios, and the exponents."""
    peers, compressed = report["peers"], report["kv"]
    pag = report.get("pag", False)
    names = names_of(compressed, peers, pag)
    measured = [name for name in names if any(name in size.get("peak_mib", {}) for size in report["sizes"])]
    heads = [*(f"{name} s" for name in names), *(f"ours / {peer}" for peer in peers), *(f"{kv} / uncompressed" for kv in compressed)]
    heads += ["pag / without"] * pag + [f"{name} peak MiB" for name in measured]
    lines = ["| px | tokens | blocks | " + " | ".join(heads) + " |", "|" + "---|" * (3 + len(heads))]
    for size in report["sizes"]:
        cells = [cell(size["seconds"].get(name)) for name in names]
        cells += [f"{size['ratio'][peer]:.2f}" if peer in size["ratio"] else "" for peer in peers]
        cells += [f"{size['kv_ratio'][kv]:.2f}" if kv in size["kv_ratio"] else "" for kv in compressed]
        cells += [f"{size['pag_ratio']:.2f}" if size["pag_ratio"] else ""] if pag else []
        cells += [f"{size['peak_mib'][name]:.0f}" if name in size["peak_mib"] else "" for name in measured]
        lines.append(f"| {size['pixels']} | {size['image_tokens']} | {size['blocks']} | " + " | ".join(cells) + " |")
    for size in report["sizes"]:
        lines += [f"\n{name} can't draw {size['pixels']} px: {error}." for name, error in size["errors"].items()]
    rates = [f"{name} {rate_of(report, name):.0%}" for name in names if name in report["sizes"][-1]["seconds"] and " " not in name]
    rate = f"{report['matmul_rate'] / 1e12:.2f} TFLOP/s"
    lines += ["", f"Share of the machine's rate of matrix products ({rate}), at the last size: {', '.join(rates)}."]
    fitted = ", ".join(f"{name} {power:.2f}" for name in names if (power := plots.power(report, name)))
    if fitted:
        where = "" if len(plots.shared_sizes(report)) == len(report["sizes"]) else ", of the sizes that all can draw"
        lines += ["", f"Time per block grows with the number of tokens to the power{where}: {fitted}."]
    if compressed:
        lines += ["", "BLOCKS:RATIO is training-free KV compression, an approximation, of the last so many of 28 blocks (where fewer are "
                  "run, of that part of them); its ratios are to ours without, turn by turn."]  # fmt: skip
    if measured:
        lines += ["", "Peak MiB: what a step takes of the card's memory above the weights."]
    lines += elsewhere(report)
    facts = report["machine"]
    chosen = ", the host's loaders choose what to compute in" if report.get("as_user") else ""
    precision = f"a file in {report['dtype']}{chosen}"
    lines += ["", f"One step with guidance {report['cfg']}, {precision}, {report['device']}; prompts of {report['tokens'][0]} and "
              f"{report['tokens'][1]} tokens (diffusers: {report['diffusers_tokens']} each); {turns(report['rounds'])}. "
              f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, {versions(facts)} (attention: {report['attention']}). {report['note']}".rstrip()]  # fmt: skip
    return "\n".join(lines)


def rate_of(report: dict[str, Any], name: str) -> float:
    """Operations per second at the last size, beside those of bare matrix products."""
    last = report["sizes"][-1]
    return last["flops"] / last["seconds"][name]["median"] / report["matmul_rate"]


def turns(rounds: int) -> str:
    """What a cell's numbers are."""
    return f"median of {rounds} turns ± half the distance of the quartiles" if rounds > 1 else "a single turn"


def cell(figures: dict[str, Any] | None) -> str:
    """Median and, of more than one turn, its spread; or "fails"."""
    if not figures:
        return "fails"
    return f"{figures['median']:.3f}" + (f" ± {figures['spread']:.3f}" if len(figures["all"]) > 1 else "")


if __name__ == "__main__":
    main()

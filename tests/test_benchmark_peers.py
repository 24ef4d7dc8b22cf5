"""The benchmarks' peers do the same work, and their figures are what they say; nothing is timed here."""
from __future__ import annotations

import os
from itertools import count

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import forward, memory, peers, plots, timing
from benchmarks.peers import PADDED, PAG, TOKENS, Compressed, Size, Workload, core_model, diffusers_model, host_model, make_peer
from benchmarks.rate import operations, step_flops
from pixart.attention import one_token_of
from pixart.kv_compress import KVCompression
from pixart.model import PixArtTransformer
from pixart.training.cpu_attention import dense_attention
from tests.support import host

FIGURES = {"median": 2.0, "spread": 0.1, "all": [1.9, 2.1]}
MACHINE = {"cpu": "A CPU", "threads": 2, "torch": "2.11", "comfyui": "0.3.75", "diffusers": "0.40"}


def report(**sizes) -> dict:
    """A report of two sizes; time per block grows with tokens squared."""
    rows = [
        {"pixels": px, "image_tokens": tokens, "blocks": 1, "flops": 4e12, "errors": {}, "ratio": {"comfyui": 0.5}, "kv_ratio": {},
         "seconds": {"ours": {**FIGURES, "median": s}, "core": FIGURES, "comfyui": {**FIGURES, "median": 2 * s}}}
        for px, tokens, s in ((256, 256, 1.0), (512, 1024, 16.0))
    ]  # fmt: skip
    return {"machine": MACHINE, "note": "", "device": "cpu", "dtype": "bf16", "cfg": 4.5, "tokens": TOKENS, "diffusers_tokens": PADDED,
            "rounds": 1, "attention": "pytorch", "matmul_rate": 1e12, "peers": ["comfyui"], "kv": [], "sizes": rows, **sizes}  # fmt: skip


def test_our_model_and_diffusers_compute_the_same_on_the_benchmarks_weights() -> None:
    work = Workload(Size(128, 1), torch.float32, "cpu")
    latent, timestep = work.latent.expand(2, -1, -1, -1), torch.full((2,), 500.0)
    states, mask = work.padded_captions(PADDED)
    with torch.inference_mode():
        theirs = diffusers_model(work)(
            latent, encoder_hidden_states=states, timestep=timestep, encoder_attention_mask=mask.float(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        short, short_mask = work.padded_captions(max(TOKENS))
        ours = core_model(work)(latent, timestep, short, short_mask)
    # At 128 px diffusers' positions are those of a 512 px model, as ours.
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("name", ["ours", "core", "comfyui", "diffusers"])
def test_every_peer_runs_a_step(name: str) -> None:
    assert make_peer(name, Workload(Size(512 if name == "comfyui" else 64, 1), torch.float32, "cpu"))() > 0


def test_as_a_user_the_loaders_choose(monkeypatch) -> None:
    """A file in fp16 on a CPU with instructions for bf16; the host's own PixArt computes in fp32."""
    monkeypatch.setattr(host.pack_module("nodes.host.dtypes"), "bf16_instructions", lambda: "avx512_bf16")
    for as_user, ours, theirs in ((True, torch.bfloat16, torch.float32), (False, torch.float16, torch.float16)):
        work = Workload(Size(512, 1), torch.float16, "cpu", as_user=as_user)
        assert host_model(work, "ours").model.get_dtype() == ours
        assert host_model(work, "comfyui").model.get_dtype() == theirs
    assert forward.parse(["--as-user"]).attention == "host" and not forward.parse([]).as_user


def keys_of_each_block(work: Workload, name: str) -> list[int]:
    """Keys of self-attention in one step of a peer; self- and cross-attention take turns."""
    model, seen = host_model(work, name), []

    def override(function, q, k, v, *args, **kwargs):
        seen.append(k.shape[1])
        return function(q, k, v, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    work.models["ours"] = model
    make_peer("ours", work)()
    return seen[::2]


def test_kv_contenders_compress_the_last_blocks_and_only_them() -> None:
    work = Workload(Size(64, 2), torch.float32, "cpu")
    assert keys_of_each_block(work, "ours") == [16, 16]
    assert keys_of_each_block(Workload(Size(64, 2), torch.float32, "cpu"), "ours 14:2") == [16, 4]
    plain, patched = host_model(work, "ours"), host_model(work, "ours 28:4")
    assert plain.model is patched.model  # one copy of the weights


def test_pag_is_one_more_prediction_with_the_middle_block_weakened() -> None:
    work, seen = Workload(Size(64, 2), torch.float32, "cpu"), []
    network = host_model(work, "ours").model.diffusion_model
    network.register_forward_pre_hook(lambda _, args, given: seen.append(given.get("identity_blocks")), with_kwargs=True)
    for name in ("ours", PAG):
        make_peer(name, work)()
    assert seen == [None, None, (1,)]
    chosen = forward.parse(["--pag", "--kv", "28:2", "--peers", ""])
    assert forward.contender_names(chosen) == ["ours", "ours 28:2", PAG] and not forward.parse([]).pag


def test_blocks_of_28_are_scaled_to_those_that_run() -> None:
    assert [Compressed.parse("14:2").first_block(depth) for depth in (28, 8, 2)] == [14, 4, 1]
    assert Compressed.parse("28:4").first_block(1) == 0
    with pytest.raises(ValueError, match="14 of 28 blocks is no whole number of 1; choose --blocks"):
        Compressed.parse("14:2").first_block(1)


@pytest.mark.parametrize("text", ["14", "0:2", "29:2", "14:1", "14:x", "14:2:3"])
def test_bad_kv_is_refused_with_what_is_right(text: str, capsys) -> None:
    with pytest.raises(SystemExit):
        forward.parse(["--kv", text])
    assert "expected 1 to 28 blocks and a ratio of 2 to 8, like 14:2" in capsys.readouterr().err


def test_kv_takes_turns_with_the_uncompressed_and_is_told_apart(tmp_path, monkeypatch) -> None:
    """Two sizes with a clock that is told; 14:2 fits two blocks, not one."""
    def make(name: str, work: Workload):
        if name.startswith("ours "):
            Compressed.parse(name[5:]).first_block(work.size.blocks)
        return lambda: {"ours": 2.0, "core": 2.0, "ours 14:2": 1.5, "ours 28:4": 0.5}[name]

    monkeypatch.setattr(forward, "make_peer", make)
    chosen = forward.parse(["--kv", "14:2,28:4", "--peers", "", "--rounds", "3"])
    sizes = [forward.measure(Size(pixels, blocks), forward.contender_names(chosen), chosen) for pixels, blocks in ((2048, 2), (4096, 1))]
    assert [size["kv_ratio"] for size in sizes] == [{"14:2": 0.75, "28:4": 0.25}, {"28:4": 0.25}]
    made = report(sizes=sizes, peers=[], kv=["14:2", "28:4"])
    text = forward.markdown(made)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and rows[2].endswith("| 0.75 | 0.25 |") and "28:4 / uncompressed" in rows[0]
    assert "ours 14:2 can't draw 4096 px: ValueError: 14 of 28" in text and "an approximation" in text
    forward.write(made, tmp_path, "forward-kv")
    assert (tmp_path / "forward-kv-ratio.png").stat().st_size > 5000


@pytest.mark.parametrize("compressed", [None, "14:2", "28:4"])
def test_operations_are_those_that_torch_counts(compressed: str | None) -> None:
    """The blocks' share of torch's own count of one forward of a prompt and an empty negative one; 18 rows, which 4 doesn't divide."""
    work = Workload(Size(288, 2), torch.float32, "cpu")
    wanted = Compressed.parse(compressed) if compressed else None
    how = KVCompression(wanted.ratio, "stride", wanted.first_block(2), end_percent=1.0, size_bias=False) if wanted else ()
    model = PixArtTransformer(work.config, device="meta", attention=dense_attention)
    context, mask = work.padded_captions(max(peers.TOKENS))
    given = [torch.empty_like(each, device="meta") for each in (torch.empty(2, 4, 36, 36), torch.empty(2), context, mask)]
    with FlopCounterMode(display=False) as counter:
        model(*given, one_token=one_token_of(peers.TOKENS, max(peers.TOKENS)), kv_compression=how)
    counted = sum(sum(one.values()) for name, one in counter.get_flop_counts().items() if name.split(".")[-2:-1] == ["blocks"])
    assert counted == step_flops(work, wanted)
    assert operations(work, ["ours", "core", PAG, *([f"ours {compressed}"] if compressed else [])]) == {
        name: {"run": step_flops(work, one), "whole": pytest.approx(14 * step_flops(work, one))}
        for name, one in (("ours", None), *([(f"ours {compressed}", wanted)] if compressed else []))
    }  # fmt: skip


def test_whole_runs_on_other_machines_are_computed_from_the_operations() -> None:
    """0.3 TFLOP in 0.5 s on a machine of 1 TFLOP/s: a share of 60 %; all blocks, 20 steps: 168 TFLOP."""
    made = report(cards=[300.0, 800.0], steps=20)
    made["sizes"] = [{**made["sizes"][0], "pixels": 4096, "operations": {"ours": {"run": 0.3e12, "whole": 8.4e12}, "ours 28:4": {}}}]
    made["sizes"][0]["seconds"] = {"ours": {**FIGURES, "median": 0.5}, "core": FIGURES}
    text = forward.markdown(made)
    assert "| 4096 | ours | 168 | 60% | 0.08 | 0.6, 0.9 | 0.2, 0.3 |" in text  # 280 s here; 168 / 300, 168 / 300 / 0.6 and so on
    assert "Computed from the count of operations, not measured: 20 steps with guidance of all 28 blocks" in text
    assert "| ours 28:4 |" not in text and "Computed" not in forward.markdown(report())


def test_unknown_peer_is_refused() -> None:
    for name in ("sage", "diffusers 14:2"):
        with pytest.raises(ValueError, match=f"{name}.*diffusers"):
            make_peer(name, Workload(Size(64, 1), torch.float32, "cpu"))


def test_contenders_take_turns_in_changing_order() -> None:
    order, clock = [], count(1)

    def contender(name: str):
        def run() -> float:
            order.append(name)
            return float(next(clock))

        return run

    seconds = timing.take_turns({"a": contender("a"), "b": contender("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"] and seconds == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_ratio_is_taken_turn_by_turn() -> None:
    assert timing.ratio([1, 10, 3], [2, 20, 6]) == 0.5  # one slow turn slows both
    assert timing.summarise([1.0, 2.0, 3.0])["median"] == 2.0


def test_power_of_time_over_tokens() -> None:
    assert timing.exponent([256, 1024, 4096], [1.0, 8.0, 64.0]) == pytest.approx(1.5)
    assert plots.power(report(), "ours") == pytest.approx(2.0)
    assert plots.power(report(sizes=report()["sizes"][:1]), "ours") is None


def test_powers_are_of_the_sizes_that_all_can_draw() -> None:
    made = report()
    times = {name: {**FIGURES, "median": 128.0} for name in ("ours", "core", "comfyui")}
    third = {**made["sizes"][1], "pixels": 1024, "image_tokens": 4096, "seconds": times}
    made["sizes"].append(third)
    whole = plots.power(made, "ours")
    del made["sizes"][0]["seconds"]["comfyui"]
    made["sizes"][0]["errors"] = {"comfyui": "no"}
    assert plots.power(made, "ours") == pytest.approx(1.5) and whole > 1.7
    assert "to the power, of the sizes that all can draw: ours 1.50" in forward.markdown(made)


def test_tables_have_every_column_and_say_who_failed(tmp_path) -> None:
    made = report()
    del made["sizes"][0]["seconds"]["comfyui"], made["sizes"][0]["ratio"]["comfyui"]
    made["sizes"][0]["errors"] = {"comfyui": "ZeroDivisionError: division by zero"}
    text = forward.markdown(made)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and "fails" in rows[2] and "0.50" in rows[3]
    assert "comfyui can't draw 256 px: ZeroDivisionError" in text
    assert "(1.00 TFLOP/s), at the last size: ours 25%, core 200%, comfyui 12%" in text
    forward.write(made, tmp_path, "forward")
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_peak_is_what_is_held_at_once() -> None:
    def call() -> None:
        first = torch.ones(2**18)  # 1 MiB
        second = first + 1
        del first
        torch.cat([second, second])

    assert memory.peak_allocated(call) / 2**20 == pytest.approx(3, abs=0.1)


def test_memory_table(tmp_path) -> None:
    sizes = [{"pixels": 512, "image_tokens": 1024, "blocks": 1, "mib": {"ours": 70.4, "core": 20.0, "comfyui": "no"}}] * 2
    made = report(sizes=sizes, contenders=["ours", "core", "comfyui"])
    memory.write(made, tmp_path, "memory")
    text = (tmp_path / "memory.md").read_text(encoding="utf-8")
    assert "| 512 | 1024 | 1 | 70 | 20 | fails |\n" * 2 in text and "comfyui fails at 512 px: no" in text
    assert (tmp_path / "memory.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "difusers"], "expected some of comfyui, diffusers, compiled"),
        (["--px", "0"], "multiples of 16"),
        (["--px", "abc"], "multiples of 16"),
        (["--rounds", "0"], "a whole number from 1"),
        (["--blocks", "0"], "a whole number from 1"),
        (["--kv", "28:16"], "a ratio of 2 to 8"),
        (["--cards", "300,fast"], "expected TFLOP/s, like 300,800"),
        (["--cards", "0"], "expected TFLOP/s, like 300,800"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_anything_runs(options, message, capsys) -> None:
    with pytest.raises(SystemExit):
        forward.parse(options)
    assert message in capsys.readouterr().err


def test_the_host_runs_where_the_benchmark_does(monkeypatch) -> None:
    here, elsewhere = ("cuda", "cpu") if os.environ.get(host.CUDA) else ("cpu", "cuda")
    for name in (host.CUDA, host.PYTORCH_ATTENTION):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # which puts back what is changed here
    host.start_host()
    peers.choose_host("host", here)
    with pytest.raises(RuntimeError, match=f"expected {elsewhere}: start a new process"):
        peers.choose_host("host", elsewhere)


def test_a_card_s_memory_and_guidance_have_columns() -> None:
    made = report(pag=True, kv=["28:2"], peers=[])
    for size in made["sizes"]:
        size |= {"pag_ratio": 1.4, "kv_ratio": {"28:2": 0.5}, "ratio": {}, "peak_mib": {"ours": 187.4, PAG: 190.0}}
        size["seconds"] = dict.fromkeys(("ours", "ours 28:2", PAG), FIGURES)
    made["sizes"][1]["pag_ratio"] = None
    rows = [line for line in forward.markdown(made).splitlines() if line.startswith("|")]
    assert rows[0].endswith("| 28:2 / uncompressed | pag / without | ours peak MiB | ours pag peak MiB |")
    assert rows[2].endswith("| 0.50 | 1.40 | 187 | 190 |") and rows[3].endswith("| 0.50 |  | 187 | 190 |")


def test_a_single_turn_has_no_spread() -> None:
    assert forward.cell(FIGURES) == "2.000 ± 0.100" and forward.cell({**FIGURES, "all": [2.0]}) == "2.000"

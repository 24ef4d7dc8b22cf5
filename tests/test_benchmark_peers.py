"""The benchmarks' peers do the same work, and their figures are what they say; nothing is timed here."""
from __future__ import annotations

from itertools import count

import pytest
import torch

from benchmarks import forward, memory, pipeline, plots, timing
from benchmarks.peers import PADDED, TOKENS, Size, Workload, core_model, diffusers_model, make_peer

FIGURES = {"median": 2.0, "spread": 0.1, "all": [2.0]}
MACHINE = {"cpu": "A CPU", "threads": 2, "torch": "2.11", "comfyui": "0.3.75"}


def report(**sizes) -> dict:
    """A report of two sizes; time per block grows with tokens squared."""
    rows = [
        {"pixels": px, "image_tokens": tokens, "blocks": 1, "errors": {}, "seconds": {"ours": {**FIGURES, "median": s}, "core": FIGURES,
         "comfyui": {**FIGURES, "median": 2 * s}}, "ratio": {"comfyui": 0.5}}
        for px, tokens, s in ((256, 256, 1.0), (512, 1024, 16.0))
    ]  # fmt: skip
    return {"machine": MACHINE, "note": "", "device": "cpu", "dtype": "bf16", "cfg": 4.5, "tokens": TOKENS, "diffusers_tokens": PADDED,
            "rounds": 1, "peers": ["comfyui"], "sizes": rows, **sizes}  # fmt: skip


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


def test_unknown_peer_is_refused() -> None:
    with pytest.raises(ValueError, match="sage.*diffusers"):
        make_peer("sage", Workload(Size(64, 1), torch.float32, "cpu"))


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


def test_tables_have_every_column_and_say_who_failed(tmp_path) -> None:
    made = report()
    del made["sizes"][0]["seconds"]["comfyui"], made["sizes"][0]["ratio"]["comfyui"]
    made["sizes"][0]["errors"] = {"comfyui": "ZeroDivisionError: division by zero"}
    text = forward.markdown(made)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and "fails" in rows[2] and "0.50" in rows[3]
    assert "comfyui can't draw 256 px: ZeroDivisionError" in text
    forward.write(made, tmp_path, "forward")
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_memory_and_pipeline_tables(tmp_path) -> None:
    sizes = [{"pixels": 512, "image_tokens": 1024, "blocks": 1, "mib": {"ours": 70.4, "core": 20.0, "comfyui": "no"}}]
    made = report(sizes=sizes)
    memory.write(made, tmp_path, "memory")
    assert "| 512 | 1024 | 1 | 70 | 20 | fails |" in (tmp_path / "memory.md").read_text(encoding="utf-8")
    assert (tmp_path / "memory.png").stat().st_size > 5000
    row = {"pixels": 256, "blocks": 2, "seconds": {"core": FIGURES, "diffusers": FIGURES}, "ratio": 1.0}
    assert "| 256 | 2 | 2.000 ± 0.100 | 2.000 ± 0.100 | 1.00 |" in pipeline.markdown(report(sizes=[row], steps=4))

"""benchmarks.kv_attention, kv_tradeoff and step_profile: their figures are what they say; nothing is timed here."""
from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import kv_attention, kv_tradeoff, step_profile
from benchmarks.peers import Size, Workload, core_model
from pixart.kv_compress import KVCompression

MACHINE = {"cpu": "A CPU", "torch": "2.11", "comfyui": "0.3.75", "diffusers": "0.40"}


def test_errors_of_attention_equal_those_of_attention_alone() -> None:
    """The first block's, recomputed without hooks; and compressing a range changes nothing if that range has no effect."""
    work = Workload(Size(64, 2), torch.float32, "cpu")
    model, compression = core_model(work), KVCompression(2)
    inputs = (work.latent, torch.full((1,), 500.0), work.captions[0])
    with torch.no_grad():
        exact, errors = kv_attention.attention_errors(model, inputs, compression)
        seen = []
        handle = model.blocks[0].attn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        assert torch.equal(model(*inputs), exact)  # the comparison leaves no trace
        handle.remove()
        attention = model.blocks[0].attn
        full, merged = attention(seen[0], (4, 4)), attention(seen[0], (4, 4), None, compression)
    assert errors[0] == pytest.approx(float((merged - full).norm() / full.norm()), rel=1e-5) and len(errors) == 2


def test_rows_name_ranges_and_errors_grow_with_the_ratio(tmp_path) -> None:
    kv_attention.main(["--px", "64", "--blocks", "2", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "kv_attention.json").read_text(encoding="utf-8"))
    rows = {(row["method"], row["ratio"], row["first_block"], row["last_block"]): row for row in report["results"]}
    assert {key[2:] for key in rows} == {(0, 0), (1, 1), (0, 1)}
    for kind in ("attention", "prediction"):
        assert 0 < rows["mean", 2, 0, 1][kind] < rows["mean", 4, 0, 1][kind]
    table = [line for line in (tmp_path / "kv_attention.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 6
    assert (tmp_path / "kv_attention.png").stat().st_size > 5000


def test_ranges_of_the_full_depth() -> None:
    assert kv_attention.block_ranges(28) == [(0, 6), (7, 13), (14, 20), (21, 27), (14, 27), (0, 27)]
    assert kv_attention.block_ranges(1) == [(0, 0)]


def quality_row(name: str, *compression: KVCompression) -> dict:
    return {"name": name, "group": name, "alignment": 0.5, "latent_error": 0.1, "compression": [asdict(one) for one in compression]}


def test_speed_and_quality_meet_where_blocks_and_ratio_agree(tmp_path) -> None:
    """The demo has 8 blocks, speed is told of 28."""
    rows = [
        quality_row("uncompressed"), quality_row("last half", KVCompression(2, first_block=4, end_percent=1.0)),
        quality_row("first half", KVCompression(2, last_block=3, end_percent=1.0)),
        quality_row("all by 4", KVCompression(4, end_percent=1.0)),
        quality_row("part of sampling", KVCompression(2, first_block=4, end_percent=0.5)),
        quality_row("both", KVCompression(2, last_block=3, end_percent=1.0), KVCompression(2, first_block=4, end_percent=0.5)),
        quality_row("three blocks", KVCompression(2, last_block=2, end_percent=1.0)), quality_row("a model of its own"),
        quality_row("the default", KVCompression()),
    ]  # fmt: skip
    quality = {"settings": {"size": 256}, "results": {row["name"]: row for row in rows}}
    speed = {"machine": MACHINE, "device": "cpu", "dtype": "bf16", "sizes": [
        {"pixels": 2048, "kv_ratio": {"14:2": 0.7}}, {"pixels": 4096, "kv_ratio": {"28:4": 0.2, "28:2": 0.4}},
    ]}  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(speed))
    (tmp_path / "q.json").write_text(json.dumps(quality))
    kv_tradeoff.main(["--speed", str(tmp_path / "s.json"), "--quality", str(tmp_path / "q.json"), "--out", str(tmp_path)])
    points = json.loads((tmp_path / "kv_tradeoff.json").read_text(encoding="utf-8"))["points"]
    assert [(point["pixels"], point["name"], point["time"]) for point in points] == [
        (2048, "uncompressed", 1.0), (2048, "last half", 0.7), (2048, "first half", 0.7), (2048, "part of sampling", 0.85),
        (2048, "both", 0.55),
        (4096, "uncompressed", 1.0), (4096, "all by 4", 0.2), (4096, "the default", 0.7),
    ]  # fmt: skip
    assert [point["name"] for point in points if point["default"]] == ["the default"]
    table = (tmp_path / "kv_tradeoff.md").read_text(encoding="utf-8")
    assert "| all by 4 |  | 0.20 | 50.0% | 0.100 |" in table and (tmp_path / "kv_tradeoff.png").stat().st_size > 5000


def test_missing_reports_are_named_with_their_command(tmp_path) -> None:
    with pytest.raises(SystemExit, match="no.json is missing; `python -m benchmarks forward --kv"):
        kv_tradeoff.main(["--speed", str(tmp_path / "no.json"), "--out", str(tmp_path)])


def test_profile_names_the_largest_operations(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(step_profile, "choose_host", lambda *_: None)  # the core and diffusers need none
    few = ["--px", "64", "--blocks", "1", "--dtype", "fp32", "--rounds", "1", "--peers", "diffusers"]
    step_profile.main([*few, "--out", str(tmp_path)])
    size = json.loads((tmp_path / "step_profile-cpu-fp32.json").read_text(encoding="utf-8"))["sizes"][0]
    shares = [one["share"] for one in size["operations"]]
    assert shares == sorted(shares, reverse=True) and 0.5 < sum(shares) <= 1
    assert any("4608" in one["shapes"] for one in size["operations"])  # the MLP, the widest layers
    assert set(size["kinds"]) == {"core", "diffusers"}
    for each in size["kinds"].values():
        assert each["matrix products"] > each["GELU"] > 0 and each["attention"] > 0 and each["norms"] > 0

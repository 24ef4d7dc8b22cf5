"""benchmarks.pipeline: whole runs of pixart.Pipeline, diffusers and the host; nothing is timed here."""
from __future__ import annotations

import json

import pytest
import torch

from benchmarks import pipeline
from benchmarks import report as report_module
from benchmarks.peers import Size, Workload
from pixart.kv_compress import KVCompression
from tests.support import host
from tests.test_benchmark_peers import FIGURES, report


def test_pipeline_draws_pictures_with_compression_and_without_guidance(tmp_path, capsys) -> None:
    """Ours, ours compressed, and diffusers' at the smallest size; decoded by a VAE of SDXL's sizes."""
    few = ["--px", "64", "--blocks", "1", "--steps", "1", "--rounds", "1", "--guidance", "1", "--decode", "--out", str(tmp_path)]
    pipeline.main([*few, "--kv", "28:2", "--peers", "diffusers"])
    size = json.loads((tmp_path / "pipeline-cpu-bf16-1-steps-cfg-1-decoded-kv.json").read_text(encoding="utf-8"))["sizes"][0]
    assert set(size["seconds"]) == {"core", "core 28:2", "diffusers"} and set(size["ratio"]) == {"core 28:2 / core", "core / diffusers"}
    wrongs = (
        (["--peers", "compiled"], "expected some of comfyui, diffusers"), (["--kv-until", "0"], "more than 0, up to 1"),
        (["--no-plain"], "--no-plain leaves nothing to measure"),
    )  # fmt: skip
    for wrong, message in wrongs:
        with pytest.raises(SystemExit):
            pipeline.main([*few, *wrong])
        assert message in capsys.readouterr().err


def test_table_of_two_contenders() -> None:
    row = {
        "pixels": 256, "blocks": 2, "seconds": {"core": FIGURES, "diffusers": FIGURES}, "ratio": {"core / diffusers": 1.0}, "peak_mib": {},
        "errors": {},
    }  # fmt: skip
    facts = {"steps": 4, "decode": True, "compile": False, "kv_until": 1.0}
    table = pipeline.markdown(report(sizes=[row], **facts))
    assert "| 256 | 2 | 2.000 ± 0.100 | 2.000 ± 0.100 | 1.00 |" in table and "to pictures" in table
    row |= {"peak_mib": {"core": 99.6, "diffusers": 120.0}}
    assert "| 2.000 ± 0.100 | 2.000 ± 0.100 | 1.00 | 100 | 120 |" in pipeline.markdown(report(sizes=[row], **facts))
    row |= {"seconds": {"core": FIGURES, "ours": FIGURES}, "ratio": {}, "peak_mib": {}, "errors": {"comfyui": "ZeroDivisionError: zero"}}
    table = pipeline.markdown(report(sizes=[row], **facts))
    assert "| 256 | 2 | 2.000 ± 0.100 | 2.000 ± 0.100 | fails |" in table
    assert "ComfyUI's own can't draw 256 px: ZeroDivisionError: zero." in table


def test_the_hosts_samplers_draw_alike_beside_pipelines() -> None:
    """KSampler with this pack's MODEL and with the host's own."""
    chosen = pipeline.parse(["--px", "512", "--blocks", "1", "--steps", "2", "--dtype", "fp32", "--peers", "comfyui"])
    made = pipeline.contenders_of(Workload(Size(512, 1), torch.float32, "cpu"), None, chosen)
    assert list(made) == ["core", "ours", "comfyui"] and pipeline.pairs(made) == [("ours", "comfyui")]
    found = [made[name]()() for name in ("ours", "comfyui")]
    assert ((found[0] - found[1]).norm() / found[1].norm()) < 1e-3


def test_pictures_of_the_host_are_its_latents_decoded() -> None:
    """By the VAE that the pipelines have, whose factor the host has divided by already."""
    chosen = pipeline.parse(["--px", "64", "--blocks", "1", "--steps", "1", "--dtype", "fp32"])
    work = Workload(Size(64, 1), torch.float32, "cpu")
    vae = pipeline.make_vae(work)
    assert vae.factor == pytest.approx(1 / 0.13025)
    latent, picture = (pipeline._in_host(work, given, chosen, "ours")() for given in (None, vae))
    assert latent.abs().mean() > 3  # not of unit variance: SDXL's latents are
    with torch.inference_mode():
        assert torch.allclose(picture, vae.module.decode(latent).sample / 2 + 0.5, atol=1e-3)


def test_every_contender_has_one_name_in_the_table() -> None:
    times = dict.fromkeys(("core", "core 28:2", "diffusers", "ours", "comfyui"), FIGURES)
    row = {
        "pixels": 512, "blocks": 1, "seconds": times, "errors": {}, "peak_mib": {"core": 1.0, "ours": 2.0},
        "ratio": {"core 28:2 / core": 0.5, "core / diffusers": 0.5, "ours / comfyui": 0.5},
    }  # fmt: skip
    table = pipeline.markdown(report(sizes=[row], steps=4, decode=False, compile=False, kv_until=0.5))
    assert table.splitlines()[0] == (
        "| px | blocks | pixart.Pipeline s | pixart.Pipeline 28:2 s | diffusers s | this pack in ComfyUI s | ComfyUI's own s | "
        "pixart.Pipeline 28:2 / pixart.Pipeline | pixart.Pipeline / diffusers | this pack in ComfyUI / ComfyUI's own | "
        "pixart.Pipeline peak MiB | this pack in ComfyUI peak MiB |"
    )
    assert "an approximation, in the first 50% of sampling." in table


def test_compression_until_a_part_of_sampling(tmp_path, monkeypatch) -> None:
    seen, draw = [], pipeline.Pipeline.__call__

    def watched(self, **given):
        seen.append(given["kv_compression"])
        return draw(self, **given)

    monkeypatch.setattr(pipeline.Pipeline, "__call__", watched)
    few = ["--px", "64", "--blocks", "1", "--steps", "1", "--rounds", "1", "--warm-up", "0", "--peers", "", "--out", str(tmp_path)]
    pipeline.main([*few, "--kv", "28:2", "--kv-until", "0.5"])
    assert (tmp_path / "pipeline-cpu-bf16-1-steps-kv-until-0.5.json").is_file()
    assert seen == [(), KVCompression()]  # the defaults of the node


def test_what_a_host_cannot_draw_leaves_the_others() -> None:
    chosen = pipeline.parse(["--px", "64", "--blocks", "1", "--steps", "1", "--dtype", "fp32", "--peers", "comfyui", "--rounds", "1"])
    small = pipeline.measure(Size(64, 1), chosen)
    assert set(small["seconds"]) == {"core", "ours"} and "ZeroDivisionError" in small["errors"]["comfyui"] and small["ratio"] == {}


def test_without_plain_only_the_compressed_run_and_no_host_is_needed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "choose_host", lambda *_: pytest.fail("no contender is the host's"))
    few = ["--px", "64", "--blocks", "1", "--steps", "1", "--rounds", "1", "--warm-up", "0", "--peers", "", "--out", str(tmp_path)]
    pipeline.main([*few, "--kv", "28:4", "--no-plain"])
    (size,) = json.loads((tmp_path / "pipeline-cpu-bf16-1-steps-kv.json").read_text(encoding="utf-8"))["sizes"]
    assert set(size["seconds"]) == {"core 28:4"} and size["ratio"] == {}


def test_the_machine_is_described_where_peers_are_absent(monkeypatch) -> None:
    monkeypatch.setattr(host, "host_version", lambda: (_ for _ in ()).throw(FileNotFoundError("No ComfyUI")))
    facts = report_module.machine()
    assert facts["comfyui"] == "absent" and facts["diffusers"] and report_module.versions(facts).startswith("ComfyUI absent")


def test_results_of_other_runs_have_other_names() -> None:
    def name(*options: str) -> list[str]:
        return pipeline.marks(pipeline.parse(options))

    assert name() == [] and name("--guidance", "1", "--decode", "--compile") == ["cfg-1", "decoded", "compiled"]
    assert name("--steps", "20", "--kv", "28:4", "--peers", "") == ["20-steps", "kv"]

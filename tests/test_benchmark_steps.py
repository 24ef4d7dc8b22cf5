"""`python -m benchmarks steps`: ways to sample, exact problems, and its report."""
from __future__ import annotations

import json
import math

import pytest
import torch

from tests.support import host

host.start_host()

from benchmarks import step_problems, step_ways, steps
from benchmarks.step_problems import Mixture, Way
from demo import WEIGHTS


@pytest.fixture(scope="module")
def model():
    return step_problems.load_demo(WEIGHTS["diffusion_models"], "default")


@pytest.fixture(scope="module")
def mixture(model) -> Mixture:
    return Mixture(model, 4, 8, 2.0, 0.1, count=3)


def solved(mixture: Mixture, case: steps.Case) -> tuple[torch.Tensor, float]:
    return mixture.solve(case.way(mixture.model))


def test_the_mixtures_denoiser_is_the_expectation(mixture) -> None:
    """Against the mean of samples of the mixture, weighed by the density of their noise."""
    generator = torch.Generator().manual_seed(0)
    sigma, samples = 2.0, 200_000
    few = torch.arange(3)  # of 64 dimensions: the others are left out on both sides
    small = Mixture.__new__(Mixture)
    small.means, small.variance, small.asked = mixture.means[:, few], mixture.variance[few], mixture.asked
    chosen = torch.randint(len(small.means), (samples,), generator=generator)
    clean = small.means[chosen] + torch.randn(samples, 3, generator=generator, dtype=torch.float64) * small.variance.sqrt()
    x = torch.tensor([[0.4, -0.2, 0.7]], dtype=torch.float64)
    weights = (-(x - clean).square().sum(1) / (2 * sigma**2)).exp()
    expected = (weights[:, None] * clean).sum(0) / weights.sum()
    torch.testing.assert_close(small.denoised(x, sigma, asked=False)[0], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", step_ways.SOLVERS)
def test_every_solver_converges_to_the_same_latents(mixture, name) -> None:
    """Noise would keep it away from the others'."""
    converged, passes = solved(mixture, steps.Case(*step_ways.BASELINE, 200))
    assert passes == 200
    few, many = (mixture.figures(solved(mixture, steps.Case(name, "sgm_uniform", count))[0], converged)["db"] for count in (6, 60))
    assert many > few and many > 20


@pytest.mark.parametrize("name", step_ways.SCHEDULES)
def test_every_schedule_spans_pixarts_noise(model, name) -> None:
    sigmas = step_ways.sigmas_of(model, name, 8)
    first = 49.0 if name == "ddim_uniform" else 157.4  # that one leaves the noisiest part out
    assert float(sigmas[0]) == pytest.approx(first, rel=0.1) and sigmas[-1] == 0
    assert (sigmas[:-1] > sigmas[1:]).all()


@pytest.mark.parametrize("name", step_ways.TRICKS)
def test_every_trick_spares_passes_and_still_draws(mixture, name) -> None:
    converged, _ = solved(mixture, steps.Case(*step_ways.BASELINE, 200))
    found, passes = solved(mixture, steps.Case(*step_ways.BASELINE, 20, name))
    assert passes <= 20 and torch.isfinite(found).all()
    assert mixture.figures(found, converged)["db"] > 3
    if "Cache" not in name and "KV" not in name:  # thresholds may spare nothing here, and compression spares attention
        assert passes < 20


def test_tgate_keeps_cross_attention(model) -> None:
    """After the gate no network's cross-attention is heard, and none is left under a hook."""
    noise, text = torch.randn(1, 4, 8, 8), [[torch.randn(1, 3, model.model.diffusion_model.config.caption_channels), {}]]
    other = [[2 * text[0][0], {}]]
    sigmas = step_ways.sigmas_of(model, "sgm_uniform", 4)
    way = Way(step_ways.solver("euler"), sigmas, step_ways.TRICKS["T-GATE from half"])
    plain = step_problems.run_host(model, Way(way.sampler, sigmas), noise, text, other)
    gated = step_problems.run_host(model, way, noise, text, other)
    assert not torch.allclose(gated, plain)
    assert not any(block.cross_attn._forward_hooks for block in model.model.diffusion_model.blocks)
    torch.testing.assert_close(step_problems.run_host(model, Way(way.sampler, sigmas), noise, text, other), plain)


def test_compression_reaches_the_network_in_its_part_of_sampling(model) -> None:
    noise, text = torch.randn(1, 4, 8, 8), [[torch.randn(1, 3, model.model.diffusion_model.config.caption_channels), {}]]
    sigmas, euler = step_ways.sigmas_of(model, "sgm_uniform", 4), step_ways.solver("euler")
    names = (None, "KV compression in the first half", "KV compression")
    found = [step_problems.run_host(model, Way(euler, sigmas, step_ways.TRICKS.get(name)), noise, text, text) for name in names]
    assert all(not torch.allclose(one, other) for one, other in ((found[0], found[1]), (found[1], found[2])))


def test_reuse_by_error_asks_again_when_the_prediction_moves() -> None:
    """Still predictions are reused to the end, moving ones never."""
    for speed, expected in ((0.0, 3), (1.0, 8)):
        asked = 0

        def predict(x, sigma, both, speed=speed):
            nonlocal asked
            asked += 1
            return torch.ones(1) * math.exp(speed * asked), torch.zeros(1)

        rule = step_ways.reuse_by_error(0.05)
        for step in range(8):
            rule(step, 8, torch.zeros(1), 2.0 ** (8 - step), predict)
        assert asked == expected


def test_a_report_is_kept_and_said_in_plain_steps(mixture, tmp_path, monkeypatch) -> None:
    wanted = [steps.Case(*step_ways.BASELINE, count) for count in (4, 8, 16)] + [steps.Case("euler", "sgm_uniform", 8)]
    report = steps.open_report(tmp_path / "steps.json", {"count": 0, "converged": steps.CONVERGED})
    steps.measure(mixture, wanted, report, tmp_path)
    kept = json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))
    rows = kept["results"][mixture.name]
    assert steps.plain_steps(rows, rows["dpmpp_2m / sgm_uniform / 8"]["db"]) == pytest.approx(8)
    assert rows["euler / sgm_uniform / 8"]["passes"] == 8
    monkeypatch.setattr(mixture, "solve", lambda way: pytest.fail("measured twice"))
    steps.measure(mixture, wanted, steps.open_report(tmp_path / "steps.json", kept["settings"]), tmp_path)
    assert (tmp_path / "steps.png").is_file() and "| euler | sgm_uniform | 8 |" in (tmp_path / "steps.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="choose another folder"):
        steps.open_report(tmp_path / "steps.json", {"count": 5})


def test_lpips_only_where_its_weights_are(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert step_problems.lpips(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)) == {}


def test_every_way_that_is_planned_has_noise_levels(model) -> None:
    for case in steps.cases():
        sigmas = step_ways.sigmas_of(model, case.schedule, case.steps)
        assert case.steps + 1 <= len(sigmas) <= case.steps + 2 and sigmas[-1] == 0, case.key  # ddim_uniform may have one more

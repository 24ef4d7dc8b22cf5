"""Ways to sample that `benchmarks steps` compares: solvers, schedules, and tricks that spare predictions.

Solvers are the host's. Those that add noise are taken without it: their pictures differ with the number of steps, whatever they cost.
A trick returns the host's MODEL with one hook: what it answers instead of asking the network.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pixart.schedules import optimized_timesteps
from tests.support import host

BASELINE = ("dpmpp_2m", "sgm_uniform")
NOISELESS = {  # solver -> function of the host's k_diffusion, and the options that leave noise out
    "dpmpp_3m": ("sample_dpmpp_3m_sde", {"eta": 0.0, "s_noise": 0.0}),
    "er_sde": ("sample_er_sde", {"s_noise": 0.0, "noise_scaler": lambda sigma: sigma}),
    "sa_solver": ("sample_sa_solver", {"tau_func": lambda sigma: 0.0}),
}
SOLVERS = (
    "dpmpp_2m", "dpmpp_3m", "uni_pc", "uni_pc_bh2", "deis", "ipndm", "ipndm_v", "er_sde", "sa_solver", "res_multistep",
    "gradient_estimation", "lms", "euler", "heun",
)  # fmt: skip
SCHEDULES = ("sgm_uniform", "simple", "normal", "beta", "ddim_uniform", "karras", "exponential", "kl_optimal", "optimized")


def solver(name: str) -> Any:
    """The host's SAMPLER."""
    samplers = importlib.import_module("comfy.samplers")
    if name not in NOISELESS:
        return samplers.sampler_object(name)
    function, options = NOISELESS[name]
    return samplers.KSAMPLER(getattr(importlib.import_module("comfy.k_diffusion.sampling"), function), options)


def sigmas_of(model: Any, schedule: str, steps: int) -> Tensor:
    """(steps + 1,) noise levels of a schedule between PixArt's own ends, falling to 0."""
    sampling = model.get_model_object("model_sampling")
    if schedule == "optimized":
        return sigmas_at(model, torch.tensor(optimized_timesteps(steps)))
    return importlib.import_module("comfy.samplers").calculate_sigmas(sampling, schedule, steps)


def sigmas_at(model: Any, timesteps: Tensor) -> Tensor:
    """Noise levels at timesteps (0 to 999, between whole ones too), and 0."""
    sampling = model.get_model_object("model_sampling")
    return torch.cat([sampling.sigma(timesteps.float()), torch.zeros(1)])


Predict = Callable[[Tensor, float, bool], tuple[Tensor, Tensor]]
Rule = Callable[[int, int, Tensor, float, Predict], tuple[Tensor, Tensor]]


def by_rule(rule: Rule, model: Any, sigmas: Tensor) -> Any:
    """A MODEL whose noise predictions (prompt, negative) are those of `rule(step, steps, x, sigma, predict)`.

    predict(x, sigma, both) asks the network, for the prompt alone unless `both`; then both of its results are the prompt's.
    """
    samplers = importlib.import_module("comfy.samplers")
    step = 0

    def answer(given: dict[str, Any]) -> list[Tensor]:
        nonlocal step
        x, level = given["input"], given["sigma"]
        sigma = float(level.flatten()[0])

        def predict(x: Tensor, sigma: float, both: bool) -> tuple[Tensor, Tensor]:
            asked = given["conds"] if both else [given["conds"][0], None]
            found = samplers.calc_cond_batch(given["model"], asked, x, level, given["model_options"])
            noise = [(x - each) / sigma for each in found]
            return (noise[0], noise[1]) if both else (noise[0], noise[0])

        positive, negative = rule(step, len(sigmas) - 1, x, sigma, predict)
        step += 1
        return [x - sigma * positive, x - sigma * negative]

    patched = model.clone()
    patched.set_model_sampler_calc_cond_batch_function(answer)
    return patched


def reuse_prediction(after: float) -> Rule:
    """Every second prediction is the one before it, once a share of the steps is done."""
    kept: list[tuple[Tensor, Tensor]] = []

    def rule(step: int, steps: int, x: Tensor, sigma: float, predict: Predict) -> tuple[Tensor, Tensor]:
        first = round(after * steps)
        if not kept or step <= first or (step - first) % 2 == 0 or step == steps - 1:
            kept[:] = [predict(x, sigma, True)]
        return kept[0]

    return rule


def reuse_by_error(threshold: float) -> Rule:
    """A prediction is kept until the change it is expected to have had since exceeds a share of its size.

    Expected: as fast, by logarithm of sigma, as between the last two that were asked for; as EasyCache and TeaCache estimate.
    """
    kept: dict[str, Any] = {}

    def rule(step: int, steps: int, x: Tensor, sigma: float, predict: Predict) -> tuple[Tensor, Tensor]:
        moved = 0.0 if "sigma" not in kept else abs(float(torch.log(torch.tensor(kept["sigma"] / sigma))))
        if kept.get("rate") is not None and step < steps - 1 and kept["rate"] * moved < threshold:
            return kept["found"]
        found = predict(x, sigma, True)
        if "found" in kept:
            kept["rate"] = float((found[0] - kept["found"][0]).norm() / found[0].norm()) / max(moved, 1e-6)
        kept.update(found=found, sigma=sigma)
        return found

    return rule


def reuse_guidance(every: int) -> Rule:
    """The difference between prompt and negative prompt is asked for in every `every`th step and in the first."""
    kept: list[Tensor] = []

    def rule(step: int, steps: int, x: Tensor, sigma: float, predict: Predict) -> tuple[Tensor, Tensor]:
        if step % every == 0:
            positive, negative = predict(x, sigma, True)
            kept[:] = [positive - negative]
            return positive, negative
        positive, _ = predict(x, sigma, False)
        return positive, positive - kept[0]

    return rule


def guide_until(end: float) -> Rule:
    """Guidance in the first share of the steps alone, as the host's CFGOverride with cfg 1 behind it does."""

    def rule(step: int, steps: int, x: Tensor, sigma: float, predict: Predict) -> tuple[Tensor, Tensor]:
        return predict(x, sigma, step < round(end * steps))

    return rule


def host_cache(node: str, threshold: float, model: Any, sigmas: Tensor) -> Any:
    """The host's EasyCache or LazyCache, from 15 to 95 % of sampling as they come."""
    nodes = importlib.import_module("comfy_extras.nodes_easycache")
    found = getattr(nodes, node).execute(model, threshold, 0.15, 0.95, False)
    return found.result[0] if hasattr(found, "result") else found[0]


def tgate(gate: float, model: Any, sigmas: Tensor) -> Any:
    """T-GATE (Zhang and others, "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models", 2024).

    After the gate cross-attention's output is that of the gate's step, the mean of prompt and negative prompt, and guidance ends.
    """
    kept: dict[int, Tensor] = {}
    state = {"step": 0, "keep": False, "use": False}
    steps = len(sigmas) - 1

    def rule(step: int, steps: int, x: Tensor, sigma: float, predict: Predict) -> tuple[Tensor, Tensor]:
        last = round(gate * steps)
        state.update(keep=step == last - 1, use=step >= last)
        return predict(x, sigma, step < last)

    def hook(number: int, _: Any, inputs: Any, output: Tensor) -> Tensor | None:
        if state["keep"]:
            kept[number] = torch.stack(output.chunk(2)).mean(0) if len(output) % 2 == 0 else output
        return kept[number] if state["use"] else None

    patched = by_rule(rule, model, sigmas)
    patched.add_wrapper_with_key("outer_sample", "tgate", partial(_with_hooks, model, hook)) if steps else None
    return patched


def _with_hooks(model: Any, hook: Callable[..., Any], executor: Any, *args: Any, **named: Any) -> Any:
    """Cross-attention of the network under a hook, while the host samples."""
    handles = [
        block.cross_attn.register_forward_hook(partial(hook, number)) for number, block in enumerate(model.model.diffusion_model.blocks)
    ]
    try:
        return executor(*args, **named)
    finally:
        for handle in handles:
            handle.remove()


def compressed(end: float, model: Any, sigmas: Tensor) -> Any:
    """PixArt KV Compress with R = 2, until a share of sampling is done. It spares time in attention, which passes don't show."""
    node = host.pack_module("nodes.kv_compress").PixArtKVCompress
    settings = {"ratio": 2, "method": "mean", "first_block": 0, "last_block": -1, "start_percent": 0.0, "min_tokens": 0}
    return node.execute(model, end_percent=end, **settings).result[0]


Trick = Callable[[Any, Tensor], Any]


def ruled(make: Callable[..., Rule], *settings: Any) -> Trick:
    """A trick of a rule, which is made anew for every run."""
    return lambda model, sigmas: by_rule(make(*settings), model, sigmas)


TRICKS: dict[str, Trick] = {
    "predictions reused, after half": ruled(reuse_prediction, 0.5),
    "predictions reused, after a fifth": ruled(reuse_prediction, 0.2),
    **{f"predictions reused up to {each:.0%} change": ruled(reuse_by_error, each) for each in (0.02, 0.05, 0.1)},
    "guidance difference reused every second step": ruled(reuse_guidance, 2),
    "guidance in the first half": ruled(guide_until, 0.5),
    "guidance in the first 80 %": ruled(guide_until, 0.8),
    **{f"EasyCache {each}": partial(host_cache, "EasyCacheNode", each) for each in (0.05, 0.1, 0.2)},
    **{f"LazyCache {each}": partial(host_cache, "LazyCacheNode", each) for each in (0.05, 0.2)},
    "T-GATE from half": partial(tgate, 0.5),
    "T-GATE from 80 %": partial(tgate, 0.8),
    "KV compression in the first half": partial(compressed, 0.5),
    "KV compression": partial(compressed, 1.0),
}

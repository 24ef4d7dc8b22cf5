"""Adapters as the host's own trainer makes them, by its own classes: every method, with its differences of biases and norms."""
from __future__ import annotations

from pathlib import Path

import comfy.weight_adapter
import pytest
import torch
from safetensors.torch import save_file

from tests.support import host
from tests.support.host_models import load_model
from tests.support.kv_reference import write_compressed

Loader = host.pack_module("nodes.lora").PixArtLoraLoader
METHODS = getattr(comfy.weight_adapter, "adapter_maps", {})


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory):
    """A MODEL with a norm of its own: KV compression has one."""
    return load_model(write_compressed("safetensors", tmp_path_factory.mktemp("compressed"), {1: 2}, "conv", hidden=72, depth=2)[0])


def trained(model, method: str) -> tuple[dict, dict]:
    """What TrainLoraNode saves, with all of it drawn at random, and the weights that its training saw at the end."""
    order, tensors, weights = torch.Generator().manual_seed(3), {}, {}
    for name, module in model.model.named_modules():
        if not hasattr(module, "weight_function") or getattr(module, "weight", None) is None:
            continue
        weight = module.weight.detach()
        adapter = METHODS[method].create_train(weight, rank=4, alpha=1.0) if weight.ndim > 1 else None
        for role, parameter in adapter.named_parameters() if adapter else ():
            if role != "alpha":
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=order)
            tensors[f"{name}.{role}"] = parameter.detach().clone()
        if adapter is None:
            tensors[f"{name}.diff"] = torch.randn(weight.shape, generator=order)
        weights[f"{name}.weight"] = adapter(weight).detach() if adapter else weight + tensors[f"{name}.diff"]
        if module.bias is not None:
            tensors[f"{name}.diff_b"] = torch.randn(module.bias.shape, generator=order)
            weights[f"{name}.bias"] = module.bias.detach() + tensors[f"{name}.diff_b"]
    return tensors, weights


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_those_of_the_training(compressed, models: Path, method: str) -> None:
    tensors, expected = trained(compressed, method)
    assert any(key.endswith("attn.norm.diff") for key in tensors) and any(key.endswith("x_embedder.proj.diff_b") for key in tensors)
    save_file(tensors, str(models / "loras" / "trained.safetensors"))
    output = Loader.execute(compressed, "trained.safetensors", 1.0)
    assert f"{len(tensors)} of {len(tensors)} keys applied" in output.ui.as_dict()["text"][0]
    output.result[0].patch_model(device_to=torch.device("cpu"))
    found = {key: compressed.model.state_dict()[key].clone() for key in expected}
    output.result[0].unpatch_model()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")

"""One quantized layer: the numbers of bitsandbytes, close to fp32, and no overflow."""
import json

import pytest
import torch

bnb = pytest.importorskip("bitsandbytes")

from pixart.errors import TextEncoderError, UnsupportedError
from pixart.text import quantize
from pixart.text.quantize import QuantizedLinear, quantize_weight


def test_wide_layer_of_the_real_shape_stays_close():
    """Rows as wide as XXL's, against plain fp32."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) / 64
    x = torch.randn(5, 4096, generator=torch.Generator().manual_seed(1))
    for precision, floor in {"int8": 0.9995, "nf4": 0.99, "fp4": 0.98, "fp8_e4m3fn": 0.998}.items():
        layer = QuantizedLinear(4096, 64)
        layer.quantize(weight, precision, "cpu")
        cosine = torch.cosine_similarity(layer(x), x @ weight.T, dim=-1)
        assert floor < cosine.min() < 1, precision
        assert layer(x).dtype == torch.float32 and layer(x.half()).dtype == torch.float16


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bits_are_those_of_bitsandbytes(quant_type, monkeypatch):
    """In chunks as in one go."""
    weight = torch.randn(96, 320, generator=torch.Generator().manual_seed(0))
    expected, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type=quant_type)
    monkeypatch.setattr(quantize, "CHUNK", 64 * 7)
    layer = QuantizedLinear(320, 96)
    layer.quantize(weight, quant_type, "cpu")
    parts = layer.parts()
    assert torch.equal(parts["packed"], expected.flatten()) and torch.equal(parts["absmax"], state.absmax)
    dequantized = layer(torch.eye(320)).T
    torch.testing.assert_close(dequantized, bnb.functional.dequantize_4bit(expected, state).bfloat16().float(), rtol=0, atol=0)


def test_8_bits_are_those_of_bitsandbytes(monkeypatch):
    weight = torch.randn(96, 320, generator=torch.Generator().manual_seed(0))
    values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    monkeypatch.setattr(quantize, "CHUNK", 1000)
    parts = quantize_weight(weight, "int8", torch.device("cpu"))
    assert torch.equal(parts["packed"], values) and torch.equal(parts["scales"], scales.float())
    layer = QuantizedLinear(320, 96)
    layer.fill(parts, "cpu")
    torch.testing.assert_close(layer(torch.eye(320)).T, bnb.functional.int8_vectorwise_dequant(values, scales), rtol=1e-6, atol=1e-8)


def test_large_activations_don_t_overflow():
    """T5's wo meets values that fp16, in which bitsandbytes' int8 layer computes, can't hold."""
    layer = QuantizedLinear(64, 64)
    layer.quantize(torch.eye(64) * 8, "int8", "cpu")
    out = layer(torch.full((1, 64), 60000.0))
    torch.testing.assert_close(out, torch.full((1, 64), 480000.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("raised, expected, said", [
    (NotImplementedError("no kernel for this device"), UnsupportedError, "can't unpack nf4 on cpu.*no kernel.*bf16 and fp8_e4m3fn work"),
    (NotImplementedError(), UnsupportedError, "can't unpack nf4 on cpu .NotImplementedError"),
    (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError, "no room"),  # the host frees memory and tries again
])  # fmt: skip
def test_a_device_bitsandbytes_can_t_unpack_on(monkeypatch, raised, expected, said):
    """A written folder needs no quantizing: its first product is the first to ask for a kernel."""

    def refuses(*arguments):
        raise raised

    layer = QuantizedLinear(64, 64)
    layer.quantize(torch.eye(64), "nf4", "cpu")
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", refuses)
    with pytest.raises(expected, match=said):
        layer(torch.ones(1, 64))


def filled(precision, seed):
    layer = QuantizedLinear(128, 64)
    layer.quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)) * (seed + 1), precision, "cpu")
    return layer


@pytest.mark.parametrize("before", ["nf4", "int8", "fp8_e4m3fn", None])
@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "fp8_e4m3fn"])
def test_state_dict_into_a_filled_layer(precision, before):
    """Also of another precision: the offset of 4-bit scales is no tensor, and lies beside the parts."""
    given = filled(precision, 3)
    layer = filled(before, 0) if before else QuantizedLinear(128, 64)
    model = torch.nn.Sequential(layer)
    assert model.load_state_dict({f"0.{name}": value for name, value in given.state_dict().items()}) == ([], [])
    assert layer.state == given.state and set(layer.parts()) == set(given.parts())
    x = torch.randn(3, 128)
    assert torch.equal(layer(x), given(x))


def test_state_dict_that_doesn_t_fit():
    layer, first = filled("nf4", 0), filled("nf4", 0).state_dict()
    with pytest.raises(TextEncoderError, match="absmax is missing"):
        layer.load_state_dict({name: value for name, value in first.items() if name != "absmax"})
    with pytest.raises(RuntimeError, match="[Uu]nexpected.*weight"):
        layer.load_state_dict({**first, "weight": torch.zeros(64, 128)})
    assert set(layer.load_state_dict({}, strict=False).missing_keys) == set(first)
    x = torch.randn(3, 128)
    assert torch.equal(layer(x), filled("nf4", 0)(x))


def state_without(*names, **changes):
    def edit(parts):
        state = json.loads(bytes(parts["quant_state"].tolist())) | changes
        text = json.dumps({name: value for name, value in state.items() if name not in names})
        parts["quant_state"] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return edit


def plain_scales(parts):
    """Nested scales stay, but nothing says how to read them."""
    state_without("nested_blocksize", "nested_offset")(parts)
    parts["absmax"] = torch.ones(128)


@pytest.mark.parametrize(
    "edit, message",
    [
        (plain_scales, "nested_absmax doesn't belong to it, nested_quant_map doesn't"),
        (lambda parts: parts.update(scales=torch.ones(64)), "scales doesn't belong to it"),
        (lambda parts: parts.pop("quant_state"), "absmax doesn't .* packed has 4096 values of torch.uint8; expected 8192 of a float"),
        (state_without(blocksize=64.0), "4-bit state is damaged"),
        (state_without(nested_blocksize=256.0), "4-bit state is damaged"),
        (state_without(nested_offset=float("nan")), "4-bit state is damaged"),
        (state_without(nested_offset=float("inf")), "4-bit state is damaged"),
        (state_without("nested_blocksize"), "4-bit state is damaged"),
        (state_without(shape=[64, True]), "4-bit state is damaged"),
        (lambda parts: parts.update(quant_state=torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)), "4-bit state is damaged"),
    ],
)
def test_crafted_parts_are_refused_when_filled(edit, message):
    parts = filled("nf4", 0).parts()
    edit(parts)
    layer = QuantizedLinear(128, 64)
    with pytest.raises(TextEncoderError, match=f"file: layer.*{message}"):
        layer.fill(parts, "cpu", "file: layer")
    assert not layer.parts() and not layer.state


def test_state_keeps_what_is_read_alone():
    parts = filled("nf4", 0).parts()
    state_without(more="x" * 50)(parts)
    layer = QuantizedLinear(128, 64)
    layer.fill(parts, "cpu")
    assert layer.state == filled("nf4", 0).state and "more" not in layer.state

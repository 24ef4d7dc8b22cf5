"""Quantized encoders: the numbers of bitsandbytes and transformers, and nothing that moving, saving or counting could change."""
import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import Linear

transformers = pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")
bnb = pytest.importorskip("bitsandbytes")

from pixart import cli, load_text_encoder
from pixart.errors import InputError, TextEncoderError, UnsupportedError
from pixart.text import quantize
from pixart.text.folder import bitsandbytes_config, quantize_folder
from pixart.text.quantize import QuantizedLinear, resident_bytes
from pixart.text.weights import read_t5
from tests.support.tiny_text import save_t5_file, save_t5_folder, tiny_t5

PROMPTS = ["a red circle above a blue square", "", "small star"]
FLOORS = {"int8": 0.999, "nf4": 0.97, "fp4": 0.95, "fp8_e4m3fn": 0.99}
WO = "encoder.block.1.layer.1.DenseReluDense.wo"


@pytest.fixture(scope="module")
def model():
    return tiny_t5(width=128, d_kv=32)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    return save_t5_folder(model, tmp_path_factory.mktemp("t5") / "full", "300KB")


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    """Precision -> folder written by quantize_folder."""
    base = tmp_path_factory.mktemp("quantized")
    return {name: quantize_folder(source, base / name, name) for name in ("int8", "nf4", "fp4")}


def states(encoder):
    found = encoder.encode(PROMPTS)
    return found.states[found.mask].float()


@pytest.mark.parametrize("precision", list(FLOORS))
def test_encoder_stays_close_to_fp32(source, precision):
    encoder, full = load_text_encoder(source, precision=precision), load_text_encoder(source)
    cosine = torch.cosine_similarity(states(encoder), states(full), dim=-1)
    assert FLOORS[precision] < cosine.min() < 0.999999
    assert not [module for module in encoder.model.modules() if isinstance(module, nn.Linear)]  # wo too
    assert resident_bytes(encoder.model) < 0.6 * resident_bytes(full.model)


@pytest.mark.parametrize("precision", list(FLOORS))
def test_nothing_changes_the_output(source, precision):
    """The AVX512-BF16 repacking of bitsandbytes' own layers spoils weights when a state dict is taken after a run."""
    encoder = load_text_encoder(source, precision=precision)
    first = states(encoder)
    size = sum(value.nbytes for value in encoder.model.state_dict().values())
    encoder.model.to("cpu")
    encoder.model.bfloat16()
    assert torch.equal(states(encoder), first)
    copied = copy.deepcopy(encoder.model)
    encoder.model.half()
    encoder.model.to(torch.bfloat16)
    assert sum(value.nbytes for value in encoder.model.state_dict().values()) == size
    for name, value in copied.state_dict().items():
        if "Dense" in name or "Attention.q" in name:
            assert torch.equal(encoder.model.state_dict()[name], value), name
    encoder.model = copied
    assert torch.equal(states(encoder), first)


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp4"])
def test_written_folder_gives_the_same_without_quantizing(source, folders, precision, monkeypatch):
    expected = states(load_text_encoder(source, precision=precision))
    monkeypatch.setattr(quantize, "quantize_weight", None)
    encoder = load_text_encoder(folders[precision])
    assert encoder.precision == precision and torch.equal(states(encoder), expected)
    assert torch.equal(states(load_text_encoder(folders[precision], precision=precision)), expected)
    others = {"int8", "nf4"} - {precision}
    with pytest.raises(UnsupportedError, match=f"already quantized to {precision}; {min(others)} was asked"):
        load_text_encoder(folders[precision], precision=min(others))


def unpacked(layer):
    """A 4-bit layer of bitsandbytes as a plain one."""
    plain = Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight = nn.Parameter(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), requires_grad=False)
    return plain


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_transformers_reads_the_folder(folders, precision, monkeypatch):
    """Its own loader and layers, told to quantize wo too, which it doesn't by default."""
    pytest.importorskip("accelerate")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    monkeypatch.setattr(t5.T5PreTrainedModel, "_keep_in_fp32_modules", None)
    theirs = transformers.T5EncoderModel.from_pretrained(folders[precision])
    ours = load_text_encoder(folders[precision])
    assert isinstance(theirs.get_submodule(WO), (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    for layer in theirs.modules():
        if isinstance(getattr(layer, "wo", None), bnb.nn.Linear4bit):  # transformers casts what goes in to the weight's dtype: uint8
            layer.wo = unpacked(layer.wo)
    ids = torch.tensor([[5, 9, 20, 33, 1]])
    with torch.no_grad():
        found, expected = (m(input_ids=ids).last_hidden_state.float() for m in (ours.model, theirs.eval()))
    assert torch.cosine_similarity(found, expected, dim=-1).min() > (0.999 if precision == "int8" else 0.9999)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_folder_quantized_by_transformers_loads(source, tmp_path, precision):
    """Its wo is not quantized, and stays so."""
    pytest.importorskip("accelerate")
    config = bitsandbytes_config(precision)
    theirs = transformers.T5EncoderModel.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "spiece.model").write_bytes((source / "spiece.model").read_bytes())
    ours = load_text_encoder(tmp_path / "theirs")
    assert ours.precision == precision
    expected, found = load_text_encoder(source), states(ours)
    assert torch.cosine_similarity(found, states(expected), dim=-1).min() > FLOORS[precision]
    wo = ours.model.get_submodule(WO)
    assert wo.parts()["packed"].dtype == torch.bfloat16 and set(wo.parts()) == {"packed"}


def test_single_file_and_the_command_line(model, tmp_path, capsys):
    file = save_t5_file(model, tmp_path / "t5.safetensors", dtype=torch.bfloat16)
    out = tmp_path / "new" / "nf4"
    command = ["quantize", str(file), str(out), "--precision", "nf4", "--device", "cpu"]
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n" and "tensors" in said.err
    assert torch.equal(states(load_text_encoder(out)), states(load_text_encoder(file, precision="nf4")))
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert sorted(p.name for p in out.parent.iterdir()) == ["nf4"]  # no leftovers
    assert cli.main(command) == 2 and "exists already" in capsys.readouterr().err
    with pytest.raises(InputError, match="already quantized to nf4"):
        quantize_folder(out, tmp_path / "again", "int8")


def test_shards_are_written_and_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr("pixart.text.folder.SHARD", 50_000)
    out = quantize_folder(source, tmp_path / "int8", "int8")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2 and not list(out.glob("*.part"))
    assert torch.equal(states(load_text_encoder(out)), states(load_text_encoder(source, precision="int8")))
    shard = sorted(out.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(TextEncoderError, match=f"{shard.name}.*truncated"):
        load_text_encoder(out)
    shard.unlink()
    with pytest.raises(TextEncoderError, match=shard.name):
        load_text_encoder(out)


def test_failure_leaves_nothing_behind(source, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*arguments):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("pixart.text.folder.save_file", full)
    with pytest.raises(OSError, match="No space"):
        quantize_folder(source, tmp_path / "int8", "int8")
    assert list(tmp_path.iterdir()) == []


def edited(folder, tmp_path, edit):
    """A copy of a one-file folder with changed tensors."""
    out = tmp_path / "edited"
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


def blob(**changes):
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 256], "nested_blocksize": 256,
             "nested_dtype": "float32", "nested_offset": 0.5, **changes}  # fmt: skip
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("weight", torch.zeros(7, 1, dtype=torch.uint8), "packed has 7 values"),
        ("weight.absmax", torch.zeros(3, dtype=torch.uint8), "absmax has 3 values"),
        ("weight.nested_quant_map", torch.zeros(256, dtype=torch.float16), "torch.float16; expected 256"),
        ("weight.quant_state.bitsandbytes__nf4", blob(shape=[256, 256]), r"shape \(256, 256\), expected \(128, 256\)"),
        ("weight.quant_state.bitsandbytes__nf4", blob(blocksize=63), "4-bit state is damaged or of another version"),
        ("weight.quant_state.bitsandbytes__nf4", blob(quant_type="nf5"), "4-bit state is damaged or of another version"),
        ("weight.quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8), "4-bit state is damaged"),
        ("weight.nested_absmax", torch.full((2,), float("nan")), "NaN or infinite values in .*nested_absmax"),
    ],
)  # fmt: skip
def test_parts_that_don_t_fit_never_reach_native_code(folders, tmp_path, part, value, message):
    made = edited(folders["nf4"], tmp_path, lambda tensors: tensors.update({f"{WO}.{part}": value}))
    with pytest.raises(TextEncoderError, match=message) as error:
        load_text_encoder(made)
    assert str(made) in str(error.value)


def test_missing_parts_and_layers(folders, tmp_path):
    made = edited(folders["nf4"], tmp_path, lambda tensors: tensors.pop(f"{WO}.weight"))
    with pytest.raises(TextEncoderError, match="wo has .* but no weight"):
        load_text_encoder(made)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pixart_quantization": 2}, "quantized in format 2; this version reads up to 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq; expected bitsandbytes"),
    ],
)
def test_other_quantizations_and_versions_are_named(folders, tmp_path, change, message):
    made = edited(folders["int8"], tmp_path, lambda tensors: None)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedError, match=message):
        load_text_encoder(made)


def test_without_bitsandbytes(source, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for precision in ("int8", "nf4"):
        with pytest.raises(TextEncoderError, match=f"{precision} needs bitsandbytes.*pip install bitsandbytes.*fp8_e4m3fn work"):
            load_text_encoder(source, precision=precision)
    with pytest.raises(TextEncoderError, match="pip install bitsandbytes"):
        load_text_encoder(folders["nf4"])
    for working in (load_text_encoder(source, precision="fp8_e4m3fn"), load_text_encoder(folders["int8"])):
        assert torch.isfinite(states(working)).all()


def test_a_device_bitsandbytes_can_t_use(source, monkeypatch):
    def refuses(*arguments, **options):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(bnb.functional, "quantize_4bit", refuses)
    with pytest.raises(UnsupportedError, match="can't make nf4 on cpu.*no kernel.*bf16 and fp8_e4m3fn work"):
        load_text_encoder(source, precision="nf4")


def test_unknown_precision(source):
    with pytest.raises(UnsupportedError, match="precision is 'int3'"):
        load_text_encoder(source, precision="int3")


def test_reading_holds_one_tensor_at_a_time(source, monkeypatch):
    """What is quantized is let go of before the next is read."""
    import gc
    import weakref

    alive, most = weakref.WeakSet(), []
    original = quantize.quantize_weight

    def watched(weight, *arguments):
        gc.collect()
        alive.add(weight)
        most.append(len(alive))
        return original(weight, *arguments)

    monkeypatch.setattr(quantize, "quantize_weight", watched)
    load_text_encoder(source, precision="int8")
    assert len(most) == 14 and max(most) <= 2  # the loop variable still names the one before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["int8", "nf4", "fp4"])
def test_cuda_there_and_back(source, precision):
    encoder = load_text_encoder(source, precision=precision, device="cuda")
    first = states(encoder)
    encoder.to("cpu")
    assert torch.cosine_similarity(states(encoder), first.cpu(), dim=-1).min() > 0.999
    encoder.to(device="cuda")
    assert torch.equal(states(encoder), first)
    streamed = load_text_encoder(source, precision=precision)
    streamed.model.shared.to(device="cuda")  # and what is no packed layer
    for module in streamed.model.modules():
        if not isinstance(module, QuantizedLinear):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to(device="cuda"), requires_grad=False))
    assert torch.cosine_similarity(states(streamed), first, dim=-1).min() > 0.999


def test_main_dtype_is_that_of_most_weights(model, tmp_path):
    """Some files keep the embedding or the norms in fp32."""
    tensors = load_file(save_t5_file(model, tmp_path / "t5.safetensors", dtype=torch.bfloat16))
    tensors["shared.weight"] = tensors["shared.weight"].float()
    save_file(tensors, tmp_path / "t5.safetensors")
    assert read_t5(tmp_path / "t5.safetensors").dtype == torch.bfloat16
    assert load_text_encoder(tmp_path / "t5.safetensors").encode(["red"]).states.dtype == torch.bfloat16

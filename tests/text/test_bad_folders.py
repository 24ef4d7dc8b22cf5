"""Folders and pickles that are not what they say: refused by name, never read from outside the folder."""
import json

import pytest
import torch

from pixart import load_text_encoder
from pixart.errors import TextEncoderError
from pixart.text.folder import quantize_folder
from tests.support.tiny_text import save_t5_folder, tiny_t5


@pytest.fixture
def folder(tmp_path):
    """A T5 folder without its weight file, whose state dict is in `folder.state`."""
    model = tiny_t5()
    made = save_t5_folder(model, tmp_path / "t5")
    for file in made.glob("*.safetensors*"):
        file.unlink()
    return made, {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "change",
    [
        {"layer_norm_epsilon": "1e-6"}, {"layer_norm_epsilon": float("nan")}, {"layer_norm_epsilon": 0}, {"layer_norm_epsilon": None},
        {"layer_norm_epsilon": 10**400}, {"layer_norm_epsilon": True},
        {"relative_attention_max_distance": "128"}, {"relative_attention_max_distance": 0}, {"relative_attention_max_distance": 8},
        {"relative_attention_max_distance": 128.0}, {"relative_attention_max_distance": 10**400},
        {"feed_forward_proj": "gated-gelu-x"}, {"feed_forward_proj": "gated-abc"}, {"feed_forward_proj": "gated-gelu" * 99},
    ],
)  # fmt: skip
def test_values_no_t5_has(folder, change):
    """Those that the weights don't show; 8 is where the distances of 32 buckets begin to be logarithmic."""
    made, state = folder
    torch.save(state, made / "pytorch_model.bin")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(TextEncoderError, match=f"config.json has {next(iter(change))} .*; expected .*Download it again"):
        load_text_encoder(made)


def test_unusual_values_are_taken(folder):
    made, state = folder
    torch.save(state, made / "pytorch_model.bin")
    config = json.loads((made / "config.json").read_text())
    change = {"layer_norm_epsilon": 1e-5, "relative_attention_max_distance": 9, "feed_forward_proj": "gated-silu"}
    (made / "config.json").write_text(json.dumps(config | change))
    encoder = load_text_encoder(made)
    assert change.items() <= encoder.model.config.to_dict().items()
    assert torch.isfinite(encoder.encode(["a red circle above a blue square"]).states).all()


def test_shards_outside_the_folder_are_refused(folder):
    made, state = folder
    torch.save(state, made.parent / "out.bin")
    index = {"weight_map": dict.fromkeys(state, "../out.bin")}
    (made / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(TextEncoderError, match=r"outside its folder: \.\./out\.bin"):
        load_text_encoder(made)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}'])
def test_index_of_another_form(folder, content):
    made, _ = folder
    (made / "pytorch_model.bin.index.json").write_text(content)
    with pytest.raises(TextEncoderError, match="pytorch_model.bin.index.json"):
        load_text_encoder(made)


def test_pickle_of_the_old_kind_loads(folder):
    made, state = folder
    torch.save(state, made / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert load_text_encoder(made).width == 32


@pytest.mark.parametrize("content, found", [([1, 2], "holds a list"), ({"shared.weight": "text"}, "shared.weight is not a tensor")])
def test_pickle_of_something_else(folder, content, found):
    made, _ = folder
    torch.save(content, made / "pytorch_model.bin")
    with pytest.raises(TextEncoderError, match=f"pytorch_model.bin.*{found}"):
        load_text_encoder(made)


@pytest.mark.parametrize("content", [b"", b"junk" * 50, b"\x80\x02"])
def test_damaged_pickle(folder, content):
    made, _ = folder
    (made / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(TextEncoderError, match="pytorch_model.bin.*download"):
        load_text_encoder(made)


@pytest.mark.parametrize("precision, value, others", [("fp8_e4m3fn", -449.0, "int8, nf4, fp4 or bf16"), ("int8", 7e4, "nf4, fp4 or bf16")])
def test_weights_beyond_the_precision(folder, precision, value, others):
    """A cast to fp8 makes NaN of them, as bitsandbytes' fp16 does; what is named works."""
    made, state = folder
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    state[name][3, 5] = value
    torch.save(state, made / "pytorch_model.bin")
    message = f"{name} has a weight of {abs(value):g}; {precision} holds up to .*Choose the precision {others} for"
    with pytest.raises(TextEncoderError, match=message):
        load_text_encoder(made, precision=precision)
    pytest.importorskip("bitsandbytes")
    if precision == "int8":
        with pytest.raises(TextEncoderError, match=message):
            quantize_folder(made, made.parent / "int8", "int8")
        assert not (made.parent / "int8").exists()
    assert torch.isfinite(load_text_encoder(made, precision="nf4").encode(["red"]).states).all()


def test_the_largest_value_of_fp8_is_kept(folder):
    made, state = folder
    name = "encoder.block.1.layer.1.DenseReluDense.wo"
    state[f"{name}.weight"][3, 5] = 448
    torch.save(state, made / "pytorch_model.bin")
    encoder = load_text_encoder(made, precision="fp8_e4m3fn")
    assert encoder.model.get_submodule(name).parts()["packed"][3, 5].float() == 448

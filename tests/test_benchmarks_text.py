"""benchmarks.text on a tiny encoder: every row filled, the files written."""
import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

from benchmarks import __main__ as command
from benchmarks import text, xxl
from benchmarks.text_report import TextResult


def test_unknown_name(capsys):
    assert command.main(["nothing"]) == 2 and "usage" in capsys.readouterr().err


def test_random_weights_are_a_whole_t5(tmp_path):
    from pixart.text.weights import read_t5

    shape = xxl.sizes(layers=2, width=128)
    source = xxl.write_weights(tmp_path / "bf16", shape)
    weights = read_t5(source)
    assert {name: weights.config[name] for name in shape} == shape
    assert xxl.sizes(24, 4096) == xxl.XXL
    written = {file: file.stat().st_mtime_ns for file in source.iterdir()}
    assert xxl.write_weights(source, shape) == source and written == {file: file.stat().st_mtime_ns for file in source.iterdir()}
    short = read_t5(xxl.first_layers(source, 1))
    assert short.config == {**weights.config, "num_layers": 1} and short.path.name == "bf16-1"


def test_reference_is_transformers_in_fp32(tmp_path):
    import torch
    from transformers import T5EncoderModel

    source = xxl.write_weights(tmp_path / "bf16", xxl.sizes(layers=3, width=128))
    whole = T5EncoderModel.from_pretrained(source, dtype=torch.float32).eval()
    rows = [torch.randint(2, 32000, (1, tokens)) for tokens in (5, 40)]
    for ids, found in zip(rows, xxl.reference_states(source, rows)):
        with torch.no_grad():
            assert torch.allclose(found, whole(input_ids=ids).last_hidden_state, atol=1e-5)


def test_measures_in_this_process(tmp_path):
    shape = xxl.sizes(layers=1, width=128)
    source = xxl.write_weights(tmp_path / "bf16", shape)
    full = text.measure(source, text.OURS, "fp32", "cpu")
    assert full["cosine"] == {20: None, 300: None}
    assert text.child(source, text.REFERENCE, "fp32", "cpu") == {} == text.child(source, text.WRITE, "nf4", "cpu")
    for who, precision, floor in (
        (text.OURS, "fp32", 0.99999), (text.OURS, "fp16", 0.9999), (text.OURS, "int8", 0.999), (text.PLAIN, "int8", 0.99), (text.PLAIN, "nf4", 0.97), (text.WRITTEN, "nf4", 0.97),
    ):  # fmt: skip
        found = text.measure(source, who, precision, "cpu")
        assert all(floor < value <= 1.00001 for value in found["cosine"].values()), (who, precision)
        assert 0 < found["resident_gib"] < 1.01 * full["resident_gib"] and found["load"]["seconds"] > 0
    assert full["resident_gib"] * text.GIB == 4 * sum(_counts(shape)) and found["write_seconds"] > 0


@pytest.mark.parametrize(
    ("precision", "gib", "layers"),
    [("fp32", 21, 24), ("fp32", 10, 11), ("bf16", 10, 23), ("fp16", 10, 19), ("nf4", 11, 24), ("nf4", 6, 13), ("fp32", 0, 1)],
)
def test_as_many_layers_as_memory_holds(precision, gib, layers):
    assert text.layers_that_fit(xxl.XXL, precision, gib * text.GIB) == layers


def test_fp16_keeps_wo_in_fp32(tmp_path):
    import torch

    source = xxl.write_weights(tmp_path / "bf16", xxl.sizes(layers=1, width=128))
    model = text.load(source, text.OURS, text.FP16, "cpu")
    assert (text.OURS, text.FP16) in text.CASES and model.shared.weight.dtype == torch.float16
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32


def test_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """What failed is measured again, what was found is kept; --again measures all."""
    figures = {"seconds": 1.0, "grown_gib": 1.0}
    done, broken = [], {"int8"}

    def run_child(source, who, precision, device):
        done.append((who, precision))
        failed = {"error": "no"} if precision in broken else None
        return failed or {"load": figures, "resident_gib": 1.0, "encode": {20: figures, 300: figures}, "cosine": {20: 1.0, 300: 1.0}}

    monkeypatch.setattr(text, "run_child", run_child)
    monkeypatch.setattr(text, "write_weights", lambda folder, shape: folder)
    monkeypatch.setattr(text, "free_memory", lambda device: 2**40)  # all layers fit, however busy the machine is
    command = ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--precision", "bf16", "int8"]
    text.main(command)
    assert done[0] == (text.REFERENCE, "fp32") and {(text.PLAIN, "bf16"), (text.OURS, "int8"), (text.WRITE, "int8")} <= set(done)
    done.clear()
    broken.clear()
    text.main(command)
    assert (text.PLAIN, "bf16") not in done and {(text.OURS, "int8"), (text.WRITTEN, "int8")} <= set(done)
    done.clear()
    text.main(command)
    assert not done
    text.main([*command, "--again"])
    assert (text.PLAIN, "bf16") in done
    done.clear()
    text.main([*command, "--again", "--loader", "pixart"])
    assert done == [(text.REFERENCE, "fp32"), (text.OURS, "bf16"), (text.OURS, "int8")]
    assert "fails" not in (tmp_path / "text.md").read_text()


def _counts(shape):
    from math import prod

    from pixart.text.weights import expected_shapes

    return [prod(size) for size in expected_shapes(shape).values()]


def test_report(tmp_path):
    figures = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_gib": 3.0, "private_gib": 2.0, "grown_gib": 1.1}
    found = {"load": figures, "resident_gib": 1.0, "encode": {20: figures, 300: figures}, "cosine": {20: 0.99991, 300: None}}
    results = [
        TextResult(text.OURS, "nf4", found), TextResult(text.PLAIN, "fp4", {"error": "a | b"}), TextResult(text.OURS, "fp32", {**found, "layers": 8}),
    ]  # fmt: skip
    text.write_text_results(tmp_path, results, xxl.XXL, "cpu", "a note")
    table = (tmp_path / "text.md").read_text()
    assert "| nf4 | pixart | 1.0 | 1.10 | 1.00 | 1.10 | 1.00 | 1.00 | 0.99991 / - |" in table
    assert "| fp32, 8 of 24 layers | pixart | 1.0 |" in table
    assert "fails: a / b" in table and "a note" in table
    assert json.loads((tmp_path / "text.json").read_text())["shape"]["num_layers"] == 24
    assert (tmp_path / "text.png").stat().st_size > 1000

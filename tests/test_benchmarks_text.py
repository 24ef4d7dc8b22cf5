"""benchmarks.text on a tiny encoder: every row filled, the files written."""
import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

from benchmarks import __main__ as command
from benchmarks import text
from benchmarks.text_report import TextResult


def test_unknown_name(capsys):
    assert command.main(["nothing"]) == 2 and "usage" in capsys.readouterr().err


def test_random_weights_are_a_whole_t5(tmp_path):
    from pixart.text.weights import read_t5

    shape = text.sizes(layers=2, width=128)
    weights = read_t5(text.write_weights(tmp_path / "t5", shape))
    assert {name: weights.config[name] for name in shape} == shape
    assert text.sizes(24, 4096) == text.XXL


def test_measures_in_this_process(tmp_path):
    """The reference first, whose states the others are compared with."""
    shape = text.sizes(layers=1, width=128)
    source = text.write_weights(tmp_path / "bf16", shape)
    full = text.measure(source, text.OURS, "fp32", "cpu")
    assert full["cosine"] == {20: pytest.approx(1, abs=1e-5), 300: pytest.approx(1, abs=1e-5)}
    for who, precision, floor in ((text.PLAIN, "fp32", 0.99999), (text.OURS, "int8", 0.999), (text.PLAIN, "nf4", 0.97)):
        found = text.measure(source, who, precision, "cpu")
        assert all(floor < value <= 1.00001 for value in found["cosine"].values()), (who, precision)
        assert 0 < found["resident_gib"] < 1.01 * full["resident_gib"] and found["load"]["seconds"] > 0
    assert full["resident_gib"] * text.GIB == 4 * sum(size for size in _counts(shape))


def _counts(shape):
    from math import prod

    from pixart.text.weights import expected_shapes

    return [prod(size) for size in expected_shapes(shape).values()]


def test_report(tmp_path):
    figures = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_gib": 3.0, "private_gib": 2.0, "grown_gib": 1.1}
    found = {"load": figures, "resident_gib": 1.0, "encode": {20: figures, 300: figures}, "cosine": {20: 0.99991, 300: None}}
    results = [TextResult(text.OURS, "nf4", found), TextResult(text.PLAIN, "fp4", {"error": "a | b"})]
    text.write_text_results(tmp_path, results, text.XXL, "cpu", "a note")
    table = (tmp_path / "text.md").read_text()
    assert "| nf4 | pixart | 1.0 | 1.10 | 1.00 | 1.10 | 1.00 | 1.00 | 0.99991 / - |" in table
    assert "fails: a / b" in table and "a note" in table
    assert json.loads((tmp_path / "text.json").read_text())["shape"]["num_layers"] == 24
    assert (tmp_path / "text.png").stat().st_size > 1000

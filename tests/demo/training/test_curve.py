"""Logs are read once a step and joined in order."""
import json

from demo.training.curve import join, plot, read_log


def write(path, steps, loss):
    rows = [{"step": s, "base_size": 128, "noise_loss": loss, "variance_loss": loss} for s in steps]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_repeated_step_counts_as_it_was_the_last_time(tmp_path):
    log = write(tmp_path / "a", [25, 50, 25], 1.0)
    with log.open("a") as file:
        file.write(json.dumps({"step": 50, "base_size": 128, "noise_loss": 2.0, "variance_loss": 1.0}) + "\n")
    assert [(row["step"], row["noise_loss"]) for row in read_log(log)] == [(25, 1.0), (50, 2.0)]


def test_a_run_that_goes_on_is_added_behind(tmp_path):
    rows = join([read_log(write(tmp_path / "a", [25, 50], 1.0)), read_log(write(tmp_path / "b", [25, 50], 0.5))])
    assert [row["step"] for row in rows] == [25, 50, 75, 100]
    plot(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000

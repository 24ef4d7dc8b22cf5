"""`generate --on comfy`: several hosts, of which some fail, forget and die."""
from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
from PIL import Image

from pixart import cli
from pixart.scale import on_comfy
from tests.support.demo import ROOT
from tests.support.queue_host import QueueHost, colour, queue_hosts

COUNT = 5


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("PATIENCE", 5.0), ("LOOK", 0.2), ("PAUSE", 0.02)):
        monkeypatch.setattr(on_comfy, name, seconds)


def generate(folder: Path, hosts: list[QueueHost | str], *options: object) -> int:
    (folder / "prompts.txt").write_text("".join(f"a red circle {n}\n" for n in range(COUNT)), encoding="utf-8")
    addresses = [host if isinstance(host, str) else host.address for host in hosts]
    usual = ["generate", "--prompts", folder / "prompts.txt", "--output", folder / "out", "--seed", 10, "--on", "comfy", "--hosts"]
    return cli.main([str(value) for value in (*usual, *addresses, *options)])


def index(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out/index.jsonl").read_text(encoding="utf-8").splitlines()]


def drawn(folder: Path) -> list[tuple[int, int, int]]:
    colours = []
    for path in sorted((folder / "out").glob("*.png")):
        with Image.open(path) as image:
            colours.append(image.getpixel((0, 0)))
    return colours


EXPECTED = [colour(10 + number) for number in range(COUNT)]


def test_two_hosts_share_the_pictures_and_each_is_drawn_once(tmp_path, capsys) -> None:
    with queue_hosts("", "") as hosts:
        assert generate(tmp_path, hosts) == 0
        assert sorted(hosts[0].seeds() + hosts[1].seeds()) == list(range(10, 10 + COUNT))
        assert hosts[0].seeds() and hosts[1].seeds()
        assert generate(tmp_path, hosts) == 0 and len(hosts[0].graphs) + len(hosts[1].graphs) == COUNT
    assert drawn(tmp_path) == EXPECTED and {row["status"] for row in index(tmp_path)} == {"drawn"}
    assert "5 of 5 pictures are in" in capsys.readouterr().out
    with Image.open(tmp_path / "out/00001.png") as image:
        assert json.loads(image.info["prompt"])["7"]["inputs"]["seed"] == 10


@pytest.mark.parametrize("trouble", ["dies", "forgets"])
def test_a_host_that_dies_midway_loses_nothing(tmp_path, trouble, capsys) -> None:
    with queue_hosts(trouble, "") as hosts:
        assert generate(tmp_path, hosts) == 0
        assert len(hosts[0].graphs) == 2 and len(hosts[1].graphs) == COUNT - 1
    assert drawn(tmp_path) == EXPECTED


@pytest.mark.parametrize("trouble", ["breaks off", "gateway", "odd"])
def test_a_host_that_breaks_off_or_answers_nonsense_is_given_up(tmp_path, trouble, capsys, caplog) -> None:
    with queue_hosts(trouble, "") as hosts:
        assert generate(tmp_path, hosts) == 0 and len(hosts[0].graphs) <= 1
    assert drawn(tmp_path) == EXPECTED and "is given up" in caplog.text


@pytest.mark.parametrize("troubles", [("fails", ""), ("refuses", "fails", "")])
def test_what_some_hosts_fail_at_another_draws(tmp_path, troubles) -> None:
    with queue_hosts(*troubles) as hosts:
        assert generate(tmp_path, hosts) == 0
        assert sorted(hosts[-1].seeds()) == list(range(10, 10 + COUNT))
    assert drawn(tmp_path) == EXPECTED


def test_without_a_host_left_what_was_drawn_stays_and_the_next_run_goes_on(tmp_path, capsys) -> None:
    with queue_hosts("dies") as hosts:
        assert generate(tmp_path, hosts) == 2
    assert "No ComfyUI is left: http://127.0.0.1" in capsys.readouterr().err
    assert [row["status"] for row in index(tmp_path)] == ["drawn", *["missing"] * (COUNT - 1)]
    with queue_hosts("") as hosts:
        assert generate(tmp_path, hosts) == 0 and len(hosts[0].graphs) == COUNT - 1
    assert drawn(tmp_path) == EXPECTED


def test_a_failure_is_tried_once_more_and_then_listed(tmp_path, capsys) -> None:
    with queue_hosts("fails once") as hosts:
        assert generate(tmp_path, hosts) == 0 and len(hosts[0].graphs) == 2 * COUNT
    assert drawn(tmp_path) == EXPECTED
    with queue_hosts("fails") as hosts:
        (tmp_path / "out/00002.png").unlink()
        assert generate(tmp_path, hosts) == 2 and len(hosts[0].graphs) == 2
    assert "failed: 00002.png, row 2: KSampler (node 7): no memory for 11" in capsys.readouterr().out
    assert [row["status"] for row in index(tmp_path)] == ["drawn", "failed", "drawn", "drawn", "drawn"]


@pytest.mark.parametrize(
    "trouble, message",
    [("refuses", "ComfyUI refused the graph: no such model"), ("empty", "the graph saves no picture"), ("damaged", "the host's file is not a picture")],
)
def test_what_a_host_says_no_to_is_in_the_index(tmp_path, trouble, message) -> None:
    with queue_hosts(trouble) as hosts:
        assert generate(tmp_path, hosts) == 2
    assert all(message in row["error"] for row in index(tmp_path)) and not drawn(tmp_path)


def test_a_file_that_pillow_will_not_open_is_a_failure_like_others(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8 * 8 // 3)  # twice as many are an error of a kind of its own
    with queue_hosts("") as hosts:
        assert generate(tmp_path, hosts) == 2
    assert all("the host's file is not a picture (Image size" in row["error"] for row in index(tmp_path))


def test_hosts_that_are_not_there_or_lack_the_pack_are_left_out(tmp_path, capsys) -> None:
    with queue_hosts("bare", "") as hosts:
        assert generate(tmp_path, ["127.0.0.1:9", *hosts]) == 0
        assert not hosts[0].graphs
    assert drawn(tmp_path) == EXPECTED
    (tmp_path / "out/00001.png").unlink()
    assert generate(tmp_path, ["127.0.0.1:9"]) == 2
    assert "No ComfyUI can draw: http://127.0.0.1:9: no ComfyUI answers" in capsys.readouterr().err


def test_a_graph_of_ones_own_is_filled_in(tmp_path) -> None:
    with queue_hosts("") as hosts:
        assert generate(tmp_path, hosts, "--graph", ROOT / "workflows/api/demo.json", "--steps", 3) == 0
        graph = hosts[0].graphs["p0"]
    assert graph["4"]["inputs"]["text"] == "a red circle 0" and graph["7"]["inputs"]["steps"] == 3
    assert graph["9"]["inputs"]["filename_prefix"] == "pixart-demo"
    with Image.open(tmp_path / "out/00001.png") as image:
        assert json.loads(image.info["prompt"]) == graph  # and not the plain one, which would draw something else


def test_another_graph_or_other_models_of_the_hosts_are_not_taken_for_the_first_ones(tmp_path, capsys) -> None:
    own = json.loads((ROOT / "workflows/api/demo.json").read_text(encoding="utf-8"))
    for name, prefix in (("a", "one"), ("b", "two")):
        own["9"]["inputs"]["filename_prefix"] = prefix
        (tmp_path / f"{name}.json").write_text(json.dumps(own), encoding="utf-8")
    models = ["--variant", "sigma-512", "--text-encoder", "t5.safetensors", "--vae", "v.safetensors", "--transformer"]
    with queue_hosts("") as hosts:
        graphs = (["--graph", tmp_path / "a.json"], ["--graph", tmp_path / "b.json"])
        for first, second in (graphs, ([*models, "s.pth"], [*models, "u.pth"])):
            assert generate(tmp_path, hosts, *first, "--overwrite") == 0
            before = len(hosts[0].graphs)
            assert generate(tmp_path, hosts, *first) == 0 and len(hosts[0].graphs) == before
            assert generate(tmp_path, hosts, *second) == 2 and generate(tmp_path, hosts) == 2
            assert "drawn from other prompts, settings or models" in capsys.readouterr().err
            assert generate(tmp_path, hosts, *second, "--overwrite") == 0 and len(hosts[0].graphs) == before + COUNT


def test_threads_change_the_waiting_pictures_one_at_a_time(tmp_path, monkeypatch) -> None:
    original = on_comfy.Fleet.__init__

    def watched(fleet: on_comfy.Fleet, *arguments: object) -> None:
        class Waiting(deque):
            def append(self, chunk: object) -> None:
                assert fleet.lock.locked()
                super().append(chunk)

        original(fleet, *arguments)
        fleet.waiting = Waiting(fleet.waiting)

    monkeypatch.setattr(on_comfy.Fleet, "__init__", watched)
    with queue_hosts("fails once", "dies") as hosts:
        assert generate(tmp_path, hosts) == 0
    assert drawn(tmp_path) == EXPECTED


@pytest.mark.parametrize(
    "hosts, options, message",
    [
        (["https://a:1"], [], "--hosts has 'https://a:1'; expected a name and port"),
        (["a:b"], [], "--hosts has 'a:b'"),
        (["127.0.0.1:9"], ["--workers", "2"], "--workers: not for --on comfy, whose hosts draw by their nodes' settings."),
        (["127.0.0.1:9"], ["--clean-caption", "--dtype", "bf16"], "--dtype, --clean-caption: not for --on comfy"),
        (["127.0.0.1:9"], ["--graph", "README.md"], "the workflow README.md can't be read"),
        (["127.0.0.1:9"], ["--graph", "workflows/demo.json"], "is not a workflow in API format"),
        (["127.0.0.1:9"], ["--graph", "workflows/api/dmd.json"], "Give its nodes the titles Prompt"),
        (["127.0.0.1:9"], ["--sampler", "one-step"], "no graph for --sampler one-step"),
        (["127.0.0.1:9"], ["--transformer", "a.safetensors", "--text-encoder", "b", "--vae", "c"], "say with --variant what it is"),
    ],
)
def test_what_can_not_be_is_said(tmp_path, capsys, monkeypatch, hosts, options, message) -> None:
    monkeypatch.chdir(ROOT)
    assert generate(tmp_path, hosts, *options) == 2
    assert message in capsys.readouterr().err


def test_models_that_lie_on_the_hosts_alone_are_named_by_their_variant(tmp_path) -> None:
    with queue_hosts("") as hosts:
        names = ["--transformer", "s.safetensors", "--text-encoder", "t5.safetensors", "--vae", "v.safetensors", "--variant", "sigma-512"]
        assert generate(tmp_path, hosts, *names) == 0
        graph = hosts[0].graphs["p0"]
    assert graph["1"]["inputs"]["model_name"] == "s.safetensors" and graph["6"]["inputs"]["base"] == "512"


def test_it_needs_hosts(tmp_path, capsys) -> None:
    (tmp_path / "p.txt").write_text("a\n", encoding="utf-8")
    assert cli.main(["generate", "--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out"), "--on", "comfy"]) == 2
    assert "--on comfy needs --hosts" in capsys.readouterr().err

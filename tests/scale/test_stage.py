"""Chunks, their records and locks, and one worker's way through them; no model is loaded."""
from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("tqdm")
from pixart.device import check_device
from pixart.scale import on_ray
from pixart.scale.book import FOLDER, Book, locked
from pixart.scale.drive import DEATHS, Opened, drive
from pixart.scale.many import forget_failures
from pixart.scale.stage import Chunk, cut
from pixart.scale.where import Where, run, worker_count
from tests.support.counted_stage import CountedStage

ROOT = Path(__file__).resolve().parents[2]


def go(stage: CountedStage, first: int = 0, of: int = 1) -> None:
    drive([stage], "cpu", first, of, shown=False)


def rows(stage: CountedStage) -> list[dict]:
    book = Book(stage)
    return [row for chunk in stage.chunks for row in book.record(chunk) or ()]


def test_chunks_are_named_by_their_items_and_settings_alone() -> None:
    first = cut(range(5), 2, {"model": "a"})
    assert [chunk.items for chunk in first] == [(0, 1), (2, 3), (4,)]
    assert first == cut(iter(range(5)), 2, {"model": "a"})
    assert not {chunk.key for chunk in first} & {chunk.key for chunk in cut(range(5), 2, {"model": "b"})}


def test_every_item_is_worked_at_once_and_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 7, 3)
    go(stage)
    go(stage)
    assert stage.worked() == list(range(7))
    assert [row["file"] for row in rows(stage)] == [f"{number}.txt" for number in range(7)]
    assert not list((tmp_path / FOLDER).rglob("*.lock")) and not list((tmp_path / FOLDER).rglob("*.begun"))


def test_a_result_that_was_deleted_is_made_again_and_no_other(tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 6, 2)
    go(stage)
    (tmp_path / "3.txt").unlink()
    go(stage)
    assert stage.worked() == [0, 1, 2, 2, 3, 3, 4, 5] and stage.files() == set(range(6))


def test_a_damaged_record_counts_as_none(tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 2, 2)
    go(stage)
    next((tmp_path / FOLDER).rglob("*.json")).write_text('[{"file":', encoding="utf-8")
    go(stage)
    assert stage.worked() == [0, 0, 1, 1]


def test_a_failed_batch_is_tried_item_by_item_and_what_fails_again_says_why(tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 6, 3, {1: "always", 4: "batch"})
    go(stage)
    assert [(row["file"], row["error"]) for row in rows(stage) if "error" in row] == [("1.txt", "1 fails")]
    assert stage.files() == {0, 2, 3, 4, 5}


def test_failures_wait_for_the_next_run(tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 4, 2, {1: "always"})
    go(stage)
    go(stage)
    assert stage.worked() == [0, 0, 2, 3]  # once with its batch, once by itself; the second run knows of it
    mended = CountedStage(tmp_path, 4, 2)
    forget_failures(mended)
    go(mended)
    assert mended.files() == {0, 1, 2, 3} and mended.worked().count(3) == 1


def test_a_second_run_does_not_take_away_what_the_first_records_just_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, original = CountedStage(tmp_path, 2, 2), Book.record

    def late(book: Book, chunk: Chunk) -> None:
        """None is there when it is read, but a moment later."""
        monkeypatch.setattr(Book, "record", original)
        go(stage)

    Book(stage).begin(stage.chunks[0])
    monkeypatch.setattr(Book, "record", late)
    forget_failures(stage)
    assert len(rows(stage)) == 2
    go(stage)
    assert stage.worked() == [0, 1]


def test_a_full_disk_ends_the_run_and_what_was_done_stays(tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 8, 2, {5: "disk"})
    with pytest.raises(OSError, match="No space left"):
        go(stage)
    assert stage.files() == {0, 1, 2, 3, 4} and len(rows(stage)) == 4
    go(stage)
    assert stage.files() == set(range(8))
    assert [stage.worked().count(number) for number in range(8)] == [1, 1, 1, 1, 2, 1, 1, 1]  # one batch was lost


def test_two_runs_over_one_folder_share_the_work(tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 40, 1)
    runs = [threading.Thread(target=go, args=(CountedStage(tmp_path, 40, 1), number, 2)) for number in (0, 1)]
    for each in runs:
        each.start()
    for each in runs:
        each.join(60)
    assert stage.worked() == list(range(40))


def test_what_another_is_at_is_waited_for_and_taken_over_if_it_gives_up(tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 2, 1)
    book, opened = Book(stage), Opened(stage, "cpu")
    with book.claim(stage.chunks[0], wait=False) as ours:
        assert ours
        assert not opened.finish(stage.chunks[0])
        assert opened.finish(stage.chunks[1])
        run = threading.Thread(target=go, args=(stage,))
        run.start()
        run.join(1)
        assert run.is_alive() and stage.worked() == [1]
    run.join(30)
    assert stage.worked() == [0, 1]


def test_a_killed_worker_frees_its_chunk_and_loses_no_more_than_that(tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 8, 2, {3: "kill"})
    code = "import sys; from pathlib import Path; from tests.scale.test_stage import CountedStage, go; "
    code += "go(CountedStage(Path(sys.argv[1]), 8, 2, {3: 'kill'}))"
    victim = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=120)
    assert victim.returncode == -9 and stage.files() == {0, 1, 2}
    go(stage)
    assert stage.worked() == [0, 1, 2, 2, 3, 4, 5, 6, 7]


def test_a_chunk_that_kills_every_worker_is_left_after_a_few(tmp_path: Path) -> None:
    stage = CountedStage(tmp_path, 4, 2)
    for _ in range(DEATHS):
        Book(stage).begin(stage.chunks[0])
    go(stage)
    assert stage.files() == {2, 3}
    assert [row["error"] for row in rows(stage) if "error" in row] == [f"{DEATHS} workers died on its batch; was memory short?"] * 2
    forget_failures(stage)
    go(stage)
    assert stage.files() == set(range(4))


def test_run_computes_with_the_chosen_threads_and_gives_them_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before, seen = torch.get_num_threads(), []
    stage = CountedStage(tmp_path / "new", 1, 1)
    monkeypatch.setattr(stage, "open", lambda device: seen.append((torch.get_num_threads(), device)) or stage)
    run([stage], Where(threads=before + 1))
    assert seen == [(before + 1, "cpu")] and torch.get_num_threads() == before


def test_there_is_one_worker_a_card_and_one_for_a_card_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert worker_count(Where(device="cuda")) == 8 and worker_count(Where(device="cuda:1")) == 1
    assert worker_count(Where(device="cuda:1", workers=2)) == 2


def test_work_in_a_process_of_its_own_tells_its_error_or_that_it_was_ended() -> None:
    assert on_ray.apart(check_device, "cpu") == ""
    assert "expected auto, cpu, cuda" in on_ray.apart(check_device, "toaster")
    assert on_ray.apart(os._exit, 1) is None


def test_locks_of_one_file_exclude_each_other(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "x") as first, locked(tmp_path / "a" / "x", wait=False) as second:
        assert first and not second
    with locked(tmp_path / "a" / "x", wait=False) as third:
        assert third

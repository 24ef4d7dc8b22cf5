"""Files of prompts: what is read, what is filled in, and a sentence for everything that is wrong."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from pixart.errors import InputError
from pixart.scale.prompt_rows import Defaults, Picture, read_pictures

DEFAULTS = Defaults(negative="blurry", seed=7, width=64, height=32, steps=5, guidance=3.0)


def read(folder: Path, name: str, text: str, defaults: Defaults = DEFAULTS) -> list[Picture]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_pictures(path, defaults)


def test_text_has_a_prompt_a_line_and_the_options_say_the_rest(tmp_path: Path) -> None:
    found = read(tmp_path, "a.txt", "\ufeffa red cat\n\n  a dog\fhere \r\n")
    assert found[0] == Picture("00001.png", 1, "a red cat", "blurry", 7, 64, 32, 5, 3.0)
    assert (found[1].file, found[1].prompt, found[1].seed) == ("00002.png", "a dog\fhere", 8)


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    table = 'prompt,seed,width,height,steps,guidance,negative,images\n"red, and blue",5,128,96,9,1.5,none,2\nplain,,,,,,,\n'
    lines = [
        {"prompt": "red, and blue", "seed": 5, "width": 128, "height": 96.0, "steps": 9, "guidance": 1.5, "negative": "none", "images": 2},
        "plain",
    ]
    found = read(tmp_path, "a.csv", table)
    assert found == read(tmp_path, "b.jsonl", "\n".join(map(json.dumps, lines)))
    assert [(each.file, each.seed, each.row) for each in found] == [("00001-1.png", 5, 1), ("00001-2.png", 6, 1), ("00002.png", 9, 2)]
    assert found[0].guided and found[2].negative == "blurry"


def test_names_are_as_long_as_the_largest_number(tmp_path: Path) -> None:
    assert read(tmp_path, "a.txt", "x\n" * 100_000)[0].file == "000001.png"


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.csv", "", "begins with nothing; expected the names of its columns: prompt"),
        ("a.csv", "text,seed\nred,1\n", "begins with 'text', 'seed'; expected the names of its columns: prompt"),
        ("a.csv", "prompt,prompt\na,b\n", "expected the names of its columns"),
        ("a.csv", "prompt,seed\nred, blue,1\n", "line 2: 3 values for 2 columns; put texts with commas in double quotes"),
        ("a.csv", 'prompt\n"red\n', "not csv"),
        ("a.csv", "prompt,seed\nred,one\n", "line 2: seed is 'one'; expected a whole number"),
        ("a.jsonl", "{'prompt': 1}", "line 1: not JSON"),
        ("a.jsonl", "[1]", "line 1: a list; expected an object or a string"),
        ("a.jsonl", '{"prompt": 3}', "line 1: prompt is 3; expected a text"),
        ("a.jsonl", '{"prompt": "a", "cfg": 2}', "line 1: unknown field 'cfg'; expected prompt, negative"),
        ("a.jsonl", '{"seed": 2}', "prompt is None"),
        ("a.jsonl", '{"": 5, "prompt": "a"}', "line 1: unknown field ''; expected prompt, negative"),
        ("a.jsonl", '"a"\n{"prompt": "a", "seed": -1}\n{"prompt": "a", "width": 0}', "line 2: seed is -1.* line 3: width is 0"),
        ("a.jsonl", '{"prompt": "a", "seed": true}', "seed is True"),
        ("a.jsonl", '{"prompt": "a", "width": 99999}', "width is 99999; expected a whole number, 1 to 16384"),
        ("a.jsonl", '{"prompt": "a", "steps": 2.5}', "steps is 2.5"),
        ("a.jsonl", '{"prompt": "a", "guidance": NaN}', "guidance is nan"),
        ("a.jsonl", '{"prompt": "a", "guidance": "much"}', "guidance is 'much'"),
        ("a.jsonl", '{"prompt": "a", "images": 0}', "images is 0"),
        ("a.jsonl", '{"prompt": " "}', "the prompt is empty"),
        ("a.jsonl", '{"prompt": "a \\ud83d"}', r"line 1: prompt is 'a .ud83d', which holds half of a character"),
        ("a.pdf", "x", r"expected a file that ends in .txt, .csv, .jsonl"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, name, text)


def test_many_wrong_lines_are_counted_and_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 5: .* And 15 more"):
        read(tmp_path, "a.jsonl", "[]\n" * 20)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="can't be read as UTF-8 text"):
        read_pictures(tmp_path / "b.txt", DEFAULTS)
    with pytest.raises(InputError, match="absent.txt can't be read"):
        read_pictures(tmp_path / "absent.txt", DEFAULTS)

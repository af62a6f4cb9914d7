"""Files that are read: every wrong row, file or path is one line with its place; nothing is bottomless."""

import errno
import json
import os
import time

import pytest

from cai_nb.core.errors import CaiError
from cai_nb.core.files import on_disk, parse_json, read_bytes, read_json, read_text, write_safely
from cai_nb.core.rows import RowFile
from cai_nb.core.shapes import LabelRow, fitted, read_checked, read_checked_lines, shape_of
from cai_nb.core.yaml_text import LARGEST_YAML, yaml_value
from cai_nb.runs.folder import reference_folder

PROMPT = {"id": "q", "messages": [{"role": "user", "content": "x"}], "kind": "harmful", "split": "train"}
STEP = {"principle_id": "p", "critique": "c", "revision": "r"}
CHAIN = {"id": "c", "prompt_id": "q", "response": "r", "steps": [STEP]}
PAIR = {"id": "p", "prompt_id": "q", "responses": ["a", "b"]}
LABEL = {"pair_id": "p", "p_a": 0.5, "votes": [{"principle_id": "p", "order": "ab", "p_a": 0.5}]}


def refused(work, *args, **kwargs) -> str:
    with pytest.raises(CaiError) as caught:
        work(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_reference_run_has_its_shapes():
    kinds = set()
    for path in reference_folder().rglob("*.json*"):
        (read_checked if path.suffix == ".json" else read_checked_lines)(path)
        kinds.add(shape_of(path))
    assert None not in kinds and len(kinds) >= 9


@pytest.mark.parametrize(
    "name, row, said",
    [
        ("prompts.jsonl", PROMPT | {"messages": "hello"}, 'messages is "hello", expected a list'),
        ("prompts.jsonl", PROMPT | {"messages": []}, "messages is [], expected 1 or more entries"),
        ("prompts.jsonl", PROMPT | {"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ("prompts.jsonl", PROMPT | {"split": "dev"}, "split is \"dev\", expected 'train' or 'eval'"),
        ("chains.jsonl", CHAIN | {"steps": None}, "steps is null, expected a list"),
        ("chains.jsonl", CHAIN | {"steps": [None]}, "steps[0] is null, expected keys and values"),
        ("chains.jsonl", CHAIN | {"response": 5}, "response is 5, expected a text"),
        ("pairs.jsonl", PAIR | {"responses": "ab"}, 'responses is "ab", expected a list'),
        ("pairs.jsonl", PAIR | {"responses": ["a"]}, "expected 2 or more entries"),
        ("pairs.jsonl", PAIR | {"responses": ["a", "b", "c"]}, "expected 2 entries"),
        ("labels.jsonl", LABEL | {"p_a": "0.5"}, 'p_a is "0.5", expected a number'),
        ("labels.jsonl", LABEL | {"p_a": 1.5}, "p_a is 1.5, expected 1 or less"),
        ("labels.jsonl", LABEL | {"p_a": float("nan")}, "p_a is NaN, expected"),
        ("labels.jsonl", LABEL | {"votes": [LABEL["votes"][0] | {"p_a": float("nan")}]}, "votes[0].p_a is NaN"),
        ("labels.jsonl", LABEL | {"votes": [LABEL["votes"][0] | {"order": "ba "}]}, "expected 'ab' or 'ba'"),
        ("labels.jsonl", LABEL | {"flags": "x"}, 'flags is "x", expected a list'),
    ],
)
def test_a_wrong_row_is_named_with_file_line_and_key(tmp_path, name, row, said):
    key = "pair_id" if name == "labels.jsonl" else "id"
    first = {"prompts": PROMPT, "chains": CHAIN, "pairs": PAIR, "labels": LABEL}[name.split(".")[0]] | {key: "first"}
    path = tmp_path / name
    path.write_text(json.dumps(first) + "\n" + json.dumps(row) + "\n")
    for read in (lambda: RowFile(path, key=key), lambda: read_checked_lines(path)):
        line = refused(read)
        assert line.startswith(f"{path}:2: ") and said in line and "; " in line, line
    assert len(path.read_text().splitlines()) == 2, "nothing was cut"


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("manifest.json", [], "the whole is [], expected keys and values"),
        ("manifest.json", {}, "cai_nb is missing"),
        ("manifest.json", {"cai_nb": "x", "constitution": {"name": "n", "digest": "d"}}, "stages is missing"),
        ("manifest.json", {"cai_nb": "x", "constitution": {"name": "n", "digest": "d"}, "stages": {"sl": "done"}},
         'stages.sl is "done", expected keys and values'),
        ("manifest.json", {"cai_nb": "x", "constitution": {"name": "n", "digest": "d"}, "stages": {"sl": {}}},
         "stages.sl.status is missing"),
        ("eval/metrics.json", {"models": []}, "models is [], expected keys and values"),
        ("eval/metrics.json", {"models": {"base": {"harmful": {"harmful": 0.5}}}},
         "models.base.harmful.harmful is 0.5, expected keys and values"),
        ("eval/metrics.json", {"snapshots": [{"step": "1", "score": {}, "kinds": {}}]}, "snapshots[0].step is"),
        ("rl/metrics.json", 7, "the whole is 7"),
        ("sl/metrics.json", {"steps": "many"}, 'steps is "many", expected a whole number'),
        ("sl/adapter_config.json", {"peft_type": "IA3"}, "expected 'LORA'"),
        ("training.json", {"parts": {"sl": None}}, "parts.sl is null"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, name, value, said):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
    line = refused(read_checked, path)
    assert line.startswith(f"{path}: ") and said in line, line


BOTTOMLESS = ["[" * 100_000, "[" * 80 + "]" * 80, '{"a":' * 500 + "1" + "}" * 500, "9" * 10_000, "{,}"]


@pytest.mark.parametrize("text", BOTTOMLESS)
def test_json_without_a_bottom_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert refused(read_json, tmp_path / "a.json").startswith(f"{tmp_path}/a.json")
    refused(parse_json, text.encode(), "a.jsonl:1")


def test_only_regular_files_of_a_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert "a pipe or a device, expected a regular file" in refused(read_text, path)
    with open(tmp_path / "huge.json", "wb") as f:
        f.truncate(3 * 2**30)  # takes no room on the disk
    assert "3,221,225,472 bytes, expected at most 2,147,483,648" in refused(read_json, tmp_path / "huge.json")
    assert "null byte" in refused(read_bytes, "a\0b")
    assert "a pipe or a device" in refused(RowFile, tmp_path / "pipe")


@pytest.mark.parametrize("code", ["ENOSPC", "EIO", "EFBIG", "EROFS", "EACCES", "EDQUOT"])
def test_an_error_of_the_disk_is_one_line_with_what_was_kept(tmp_path, monkeypatch, code):
    store = RowFile(tmp_path / "rows.jsonl")
    store.append([{"id": "a"}])
    (tmp_path / "a.json").write_text("old")

    def broken(*args):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "fsync", broken)
    line = refused(write_safely, tmp_path / "a.json", "new")
    assert line.startswith(f"{tmp_path}/a.json: {os.strerror(getattr(errno, code)).lower()}; the file is as it was; ")
    assert (tmp_path / "a.json").read_text() == "old"
    assert "rows.jsonl" in refused(store.append, [{"id": "b"}]) and len(store) == 1


def test_other_errors_pass():
    with pytest.raises(OSError), on_disk("a"):
        raise OSError(errno.ECONNRESET, "reset")


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "my.yaml:4: b.c stands twice, first in line 3"),
        ("a: 1\n1: 2\n'1': 3\n", "my.yaml:3: 1 stands twice"),
        ("[" * 10_000, "nested more than 64 levels deep"),
        ("a: &a [1]\nb: *a\n", "my.yaml:2: not valid YAML (a list or keys used again by an alias)"),
        ("a: &a {b: *a}\n", "my.yaml:1: "),
        ("a: !!binary aGk=", "my.yaml:1: a has the tag"),
        ("a: !thing x", "my.yaml:1: a has the tag !thing"),
        ("x: 1\ny: \x07\n", "my.yaml:2: the character '\\x07' cannot stand in YAML"),
        ("x: \ud800\n", "cannot stand in YAML"),
        ("a: " + "9" * 5000, "my.yaml:1: a is "),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("a" * (LARGEST_YAML + 1), "expected at most 1,048,576"),
        ("%YAML 9.9\n--- a", "my.yaml:1: not valid YAML"),
    ],
)
def test_yaml_that_is_none_or_has_no_bottom_is_one_line(text, said):
    assert said in refused(yaml_value, text, "my.yaml")


def test_yaml_values_are_as_written():
    text = "{a: 2024-05-01, b: 1e-3, c: 1:30, d: 0x1f, e: .5, f: -7, g: null, h: ~, i: yes, j: 'no', 5: x, k: 1_000}"
    assert yaml_value(text, "") == {
        "a": "2024-05-01", "b": 0.001, "c": "1:30", "d": "0x1f", "e": 0.5, "f": -7, "g": None, "h": None, "i": True,
        "j": "no", "5": "x", "k": 1000}


@pytest.mark.long
def test_a_hundred_thousand_rows_are_looked_at_quickly():
    label = LABEL | {"votes": LABEL["votes"] * 8}
    began = time.process_time()
    for _ in range(100_000):
        fitted(label, LabelRow, "")
    assert (time.process_time() - began) / 100_000 < 20e-6

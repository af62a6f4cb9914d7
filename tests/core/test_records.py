"Records of every kind of file: no row is lost, cut or invented; what cannot be read is one line that says where."

import gzip
import json
import lzma
from pathlib import Path

import pytest

from cai_nb.core.errors import CaiError
from cai_nb.core.prompts import load_prompts, read_prompts
from cai_nb.core.records import read_records

CASES = Path(__file__).parents[3] / "shared" / "cases"
real = pytest.mark.skipif(not CASES.is_dir(), reason="the cases lie beside the checkout")

BREAKS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # what splitlines takes for the end of a line, and json leaves as it is


def records(path) -> list[dict]:
    return [record for _, record in read_records(path)]


@pytest.mark.parametrize("mark", BREAKS, ids=lambda mark: f"U+{ord(mark):04X}")
def test_one_line_is_what_a_newline_ends(tmp_path, mark):
    texts = [f"how do I open door {i}?{mark}Please." for i in range(3)]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n", encoding="utf-8", newline="")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"prompt": t}, ensure_ascii=mark < " ") + "\n" for t in texts),
                                      encoding="utf-8", newline="")
    (tmp_path / "c.csv").write_text("prompt\n" + "".join(f'"{t}"\n' for t in texts), encoding="utf-8", newline="")
    for name in ("a.txt", "b.jsonl", "c.csv"):
        assert records(tmp_path / name) == [{"prompt": t} for t in texts], name
    ids = [[row["id"] for row in load_prompts(tmp_path / name)] for name in ("a.txt", "b.jsonl", "c.csv")]
    assert ids[0] == ids[1] == ids[2]


@real
def test_the_lines_of_the_case_are_the_same_in_both_files():
    a, b = (read_prompts(CASES / f"07_harm.{kind}") for kind in ("jsonl", "txt"))
    assert [row["messages"] for row in a[0]] == [row["messages"] for row in b[0]] and a[1].kept == b[1].kept == 24


@pytest.mark.parametrize("pack, ending", [(lambda b: b, ""), (gzip.compress, ".gz"), (lzma.compress, ".xz")])
def test_every_kind_of_file_says_the_same(tmp_path, pack, ending):
    rows = [{"prompt": f"Question {i}, then?", "topic": "doors"} for i in range(3)]
    table = "prompt{0}topic\n" + "".join(f'"{row["prompt"]}"{{0}}doors\n' for row in rows)
    files = {
        "a.jsonl": "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in rows), "b.json": json.dumps(rows, indent=2),
        "c.json": json.dumps({"version": 1, "data": rows}), "d.json": "".join(json.dumps(row) + "\n" for row in rows),
        "e.csv": "\ufeff" + table.format(","), "f.csv": table.format(";"), "g.tsv": table.format("\t"),
        "H.JSONL": "".join(json.dumps(row) + "\n\n" for row in rows), "i.ndjson": "\n".join(map(json.dumps, rows)),
    }
    for name, text in files.items():
        (tmp_path / f"{name}{ending}").write_bytes(pack(text.encode()))
        assert records(tmp_path / f"{name}{ending}") == rows, name


def test_parquet_and_folders(tmp_path):
    from datasets import Dataset
    from pyarrow import Table
    from pyarrow.parquet import write_table

    rows = [{"messages": [{"role": "user", "content": f"Question {i}?"}], "n": i} for i in range(2500)]
    write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    assert records(tmp_path / "a.parquet") == rows and len(load_prompts(tmp_path / "a.parquet", split=None)) == 2500
    Dataset.from_list(rows[:5]).save_to_disk(tmp_path / "saved")
    assert records(tmp_path / "saved") == rows[:5]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(CaiError, match=r"b\.parquet: cannot be read after row 0") as error:
        records(tmp_path / "b.parquet")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, data, found", [
    ("a.csv", b"id,prompt\n1,How do I open it, please?\n", r"a\.csv:2: 3 fields, and the first line names 2"),
    ("b.csv", b'id,prompt\n1,"How?\n2,Why?\n', r"b\.csv:3: no row of a table"),
    ("c.csv", b"prompt,prompt\na,b\n", r"c\.csv:1: the column 'prompt' stands twice"),
    ("d.csv", b"id,prompt\n1,a\rb\n", r"d\.csv:2: no row of a table"),
    ("e.jsonl", b"[" * 100_000 + b"\n", r"e\.jsonl:1: not a JSON object"),
    ("f.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"f\.jsonl:2: byte 12 of the line is not UTF-8"),
    ("g.txt", "a\n".encode("utf-16"), r"g\.txt:1: the file is UTF-16"),
    ("h.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 999, mtime=0)[:-20],
     r"h\.jsonl\.gz: cannot be read after line"),
    ("i.json", b'[{"prompt": "a"}, 3]', r"i\.json: entry 2 is '3'"),
    ("j.docx", b"", r"j\.docx: cannot read this kind of file; expected one of \.jsonl"),
    ("k.jsonl", b'{"n": ' + b"9" * 5000 + b"}\n", r"k\.jsonl:1: not a JSON object"),
])
def test_what_cannot_be_read_is_one_line(tmp_path, name, data, found):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CaiError, match=found) as error:
        records(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("cai_nb.core.records._LONGEST", 2**16)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as f:
        f.write(b'{"prompt": "' + b"a" * 2**20)
    with pytest.raises(CaiError, match=r"a\.jsonl\.gz:1: a line of more than"):
        records(tmp_path / "a.jsonl.gz")


def test_a_long_field_of_a_table_is_read(tmp_path):
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f'prompt\n"{"many words " * 20_000}"\n')
    assert len(records(tmp_path / "a.csv")[0]["prompt"]) == 220_000 and csv.field_size_limit() == before


def test_the_tilde_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("Why?\n")
    assert records("~/a.txt") == [{"prompt": "Why?"}]


def test_half_a_character_is_named_and_a_whole_one_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}\n{"prompt": "a \\uD800 b"}\n')
    rows = read_records(tmp_path / "a.jsonl")
    assert next(rows)[1] == {"prompt": "\U0001f600"}
    with pytest.raises(CaiError, match="a.jsonl:2: half a character"):
        next(rows)


def test_what_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cai_nb.core.records._MOST", 2**16)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as f:
        f.write(b'{"prompt": "x"}\n' * 10_000)
    with pytest.raises(CaiError, match="a.jsonl.gz:4097: more than 0 GiB so far"):
        list(read_records(tmp_path / "a.jsonl.gz"))

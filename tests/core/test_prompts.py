"Rows survive a kill at any byte; every row of a source has a fate."

import gzip
import json
from pathlib import Path

import pytest

from cai_nb.core.errors import CaiError
from cai_nb.core.prompts import (
    load_comparisons, load_prompts, opening_of, read_comparisons, read_prompts, split_of, without_prompts,
)
from cai_nb.core.rows import RowFile, batches, in_batches, progress, row_id

HH = Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf" / "harmless-base-test.part.jsonl.gz"
real = pytest.mark.skipif(not HH.is_file(), reason="the hh-rlhf test part lies beside the checkout")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def inputs(count: int = 11) -> list[dict]:
    return [{"id": row_id("input", i), "n": i} for i in range(count)]


def square(batch: list[dict]) -> list[dict]:
    return [{"id": row["id"], "square": row["n"] ** 2, "text": f"{row['n']} · “naïve”"} for row in batch]


def test_a_file_cut_at_any_byte_resumes_to_the_identical_file(tmp_path):
    whole = tmp_path / "whole.jsonl"
    in_batches(inputs(7), 3, RowFile(whole), square)
    data = whole.read_bytes()
    for end in range(len(data) + 1):
        torn = tmp_path / "torn.jsonl"
        torn.write_bytes(data[:end])
        rows = in_batches(inputs(7), 3, RowFile(torn), square)
        assert torn.read_bytes() == data, f"cut at byte {end}"
        assert [row["square"] for row in rows] == [n * n for n in range(7)]


def test_a_complete_batch_is_not_done_again(tmp_path):
    path, seen = tmp_path / "rows.jsonl", []
    in_batches(inputs(), 4, RowFile(path), square)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]))

    def work(batch):
        seen.append([row["n"] for row in batch])
        return square(batch)

    in_batches(inputs(), 4, RowFile(path), work)
    assert seen == [[4, 5, 6, 7], [8, 9, 10]], "the second batch as a whole, though two of its rows were there"


@pytest.mark.parametrize("line", [b'{"id": "b"', b"", b"\x00\x00\x00", b"[1]", b"\xff\xfe"])
def test_damage_in_the_middle_names_the_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + line + b'\n{"id": "c"}\n')
    before = path.read_bytes()
    with pytest.raises(CaiError, match=r"rows\.jsonl:2: "):
        RowFile(path)
    assert path.read_bytes() == before, "nothing was changed"


@pytest.mark.parametrize("tail", [b'{"id": "b"', b'{"id": "b", "t": "\xc3', b"{"])
def test_a_torn_tail_is_cut_by_the_next_writer(tmp_path, tail):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + tail)
    store = RowFile(path)
    assert store.ids == {"a"} and path.read_bytes() == b'{"id": "a"}\n' + tail, "reading never writes"
    store.append([{"id": "c"}])
    assert path.read_bytes() == b'{"id": "a"}\n{"id": "c"}\n'


@pytest.mark.parametrize("tail", [b"\x00\x00\x00\n", b"{\n"])
def test_a_last_line_that_ended_is_damage_and_never_cut(tmp_path, tail):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + tail)
    with pytest.raises(CaiError, match=r"rows\.jsonl:2: "):
        RowFile(path)
    assert path.read_bytes() == b'{"id": "a"}\n' + tail


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a"}')
    RowFile(path).append([{"id": "b"}])
    assert path.read_bytes() == b'{"id": "a"}\n{"id": "b"}\n'


def test_duplicates_and_bad_rows_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    store = RowFile(path)
    store.append([{"id": "a"}])
    for rows in ([{"id": "a"}], [{"id": "b"}, {"id": "b"}], [{"n": 1}], [{"id": 5}], [{"id": "c", "p": float("inf")}]):
        with pytest.raises(CaiError):
            store.append(rows)
    assert len(store) == 1 and path.read_bytes() == b'{"id": "a"}\n', "a refused batch leaves no row behind"
    path.write_bytes(b'{"id": "a"}\n{"id": "a"}\n')
    with pytest.raises(CaiError, match=r"rows\.jsonl:2: "):
        RowFile(path)


def test_memory_and_file_say_the_same(tmp_path):
    row = {"id": "x", "pair": (1, 2), "text": "“a\u2028b” \ud800", "p": 0.1 + 0.2}
    path = tmp_path / "deep" / "rows.jsonl"
    store, memory = RowFile(path), RowFile()
    for s in (store, memory):
        s.append([row])
    assert RowFile(path).rows == store.rows == memory.rows
    assert store.rows[0]["pair"] == [1, 2] and store.rows[0]["p"] == 0.1 + 0.2


def test_labels_have_another_key(tmp_path):
    store = RowFile(tmp_path / "labels.jsonl", key="pair_id")
    rows = in_batches(inputs(3), 2, store, lambda batch: [{"pair_id": row["id"], "p_a": 0.5} for row in batch])
    assert [row["pair_id"] for row in rows] == [row["id"] for row in inputs(3)]


def test_work_must_give_a_result_for_each_row():
    with pytest.raises(CaiError, match="1 missing"):
        in_batches(inputs(3), 3, RowFile(), lambda batch: square(batch[1:]))
    with pytest.raises(CaiError, match="twice"):
        in_batches(inputs(2) + inputs(1), 3, RowFile(), square)
    assert in_batches([], 3, RowFile(), square) == []


def test_small_things():
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]] and list(batches([], 2)) == []
    assert row_id("a", ["b"]) == row_id("a", ["b"]) != row_id("a", "b") and len(row_id()) == 12
    assert list(progress(iter("ab"), total=2, what="letters")) == ["a", "b"]


def test_prompts_of_all_forms(tmp_path):
    question = "Why: is the sky blue?"
    one = [{"role": "user", "content": question}]
    forms = {
        "a.jsonl": json.dumps({"prompt": question}) + "\n",
        "b.jsonl": json.dumps({"messages": one}) + "\n\n",
        "c.jsonl": json.dumps({"chosen": f"\n\nHuman: {question}\n\nAssistant: Physics: light.", "rejected": "x"}),
        "d.csv": f'id,prompt\r\n1,"{question}"\r\n',
        "e.txt": f"{question}\n",
        "f.jsonl": "\ufeff" + json.dumps({"goal": question}) + "\n",
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert [row["messages"] for row in load_prompts(tmp_path / name)] == [one], name
    with gzip.open(tmp_path / "g.jsonl.gz", "wt") as f:
        f.write(forms["a.jsonl"])
    assert load_prompts(tmp_path / "g.jsonl.gz")[0]["source"] == "g.jsonl.gz:1"
    assert len({load_prompts(tmp_path / name)[0]["id"] for name in forms}) == 1, "one content, one id"


@pytest.mark.parametrize("text, found", [
    ('{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n', r"x\.jsonl:2: not a JSON object"),
    ('{"topic": "a"}\n', r"x\.jsonl:1: found the keys topic"),
    ('{"messages": "a"}\n', r"x\.jsonl:1: messages must be"),
    ('{"messages": [{"role": "user"}]}\n', r"x\.jsonl:1: messages must be"),
])
def test_a_bad_source_names_the_line(tmp_path, text, found):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(CaiError, match=found):
        load_prompts(tmp_path / "x.jsonl")


def test_a_missing_source_is_one_line(tmp_path):
    for source in (tmp_path / "no.jsonl", "./no.jsonl", "no.csv", tmp_path):
        with pytest.raises(CaiError) as error:
            load_prompts(source)
        assert "\n" not in str(error.value)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(CaiError, match="cannot be read after row 0"):
        load_prompts(tmp_path / "x.parquet")


def test_split_keeps_one_opening_on_one_side():
    turns = [
        {"role": "user", "content": "Hello  there"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "x"},
    ]
    assert split_of(turns) == split_of(turns[:1]) == split_of([{"role": "user", "content": "hello there"}])


def fates(report) -> int:
    return report.used + sum(report.skipped.values())


@real
@pytest.mark.parametrize(
    "options",
    [{}, {"every_turn": True}, {"limit": 64}, {"split": "eval"}, {"every_turn": True, "limit": 9, "split": "train"}],
)
def test_real_prompts_every_row_is_accounted_for(options):
    rows, report = read_prompts(HH, **options)
    lines = gzip.open(HH, "rt").read().splitlines()
    assert report.read == len(lines) == fates(report) and report.kept == len(rows)
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["messages"][-1]["role"] == "user" and row["messages"][-1]["content"] for row in rows)
    assert all(a["role"] != b["role"] for row in rows for a, b in zip(row["messages"], row["messages"][1:]))
    if options.get("limit"):
        assert len(rows) == options["limit"]
    assert rows == read_prompts(HH, **options)[0]


@real
def test_real_prompts_are_neither_cut_nor_altered():
    lines = [json.loads(line) for line in gzip.open(HH, "rt")]
    rows, colons = load_prompts(HH), 0
    for row in rows:
        text = lines[int(row["source"].split(":")[1]) - 1]["chosen"]
        for message in row["messages"]:
            assert all(part.strip() in text for part in message["content"].split("\n\n"))
            colons += ": " in message["content"]
    assert colons > 50
    assert sum(len(row["messages"]) > 1 for row in rows) > 0.6 * len(rows), "most are of several turns"


@real
def test_real_splits_share_no_opening():
    opening = lambda row: " ".join(row["messages"][0]["content"].casefold().split())
    train, held_out = (load_prompts(HH, split=split, every_turn=True) for split in ("train", "eval"))
    assert held_out and not {opening(r) for r in train} & {opening(r) for r in held_out}


@real
def test_real_comparisons():
    rows, report = read_comparisons(HH, split=None)
    assert report.read == 1181 == fates(report) and report.kept == len(rows) > 1100
    assert report.skipped.get("with an empty reply") == 2
    assert all(row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"] for row in rows)
    assert load_comparisons(HH, limit=5, seed=1) == load_comparisons(HH, limit=5, seed=1)


def test_comparisons_that_are_none(tmp_path):
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    rows = [
        good,
        good,
        {**good, "rejected": "\n\nHuman: z\n\nAssistant: c"},
        {**good, "rejected": good["chosen"]},
        {**good, "rejected": "\n\nHuman: a\n\nAssistant:"},
        {"chosen": "\n\nAssistant: b", "rejected": "\n\nAssistant: c"},
        {"messages": [{"role": "user", "content": "q"}], "chosen": "x", "rejected": "y"},
    ]
    found, report = read_comparisons(write(tmp_path / "x.jsonl", rows), split=None)
    assert [(r["chosen"], r["rejected"]) for r in found] == [("b", "c"), ("x", "y")]
    assert report.skipped == {
        "twice": 1,
        "with different prompts": 1,
        "with equal replies": 1,
        "with an empty reply": 1,
        "without a user's turn": 1,
    }


def test_a_data_set_in_parts_is_read_by_its_folder(tmp_path, monkeypatch):
    """`owner/name/folder:split`, as hh-rlhf on the hub; a folder of the same shape is loaded by the same library."""
    part = tmp_path / "owner" / "name" / "helpful-base"
    part.mkdir(parents=True)
    rows = [
        {
            "chosen": f"\n\nHuman: How do I knit {i}?\n\nAssistant: Slowly.",
            "rejected": f"\n\nHuman: How do I knit {i}?\n\nAssistant: No.",
        }
        for i in range(3)
    ]
    for split in ("train", "test"):
        (part / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows[: 3 if split == "train" else 1])))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert [r["messages"][-1]["content"] for r in load_prompts("owner/name/helpful-base")] == [
        f"How do I knit {i}?" for i in range(3)
    ]
    assert len(load_comparisons("owner/name/helpful-base:test", split=None)) == 1
    with pytest.raises(CaiError, match="owner/name/helpless-base: no such file, and the hub gives no such data set"):
        load_prompts("owner/name/helpless-base")


# No evaluation prompt reaches a training


def dialogue(*turns: str) -> str:
    """A transcript whose speakers alternate, the human first."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def compared(*turns: str, **more) -> dict:
    return {"chosen": dialogue(*turns, "Slowly."), "rejected": dialogue(*turns, "No."), **more}


def test_comparisons_are_split_by_the_rule_of_the_prompts(tmp_path):
    """One source for both, as in the recipe `t4`."""
    source = write(tmp_path / "x.jsonl", [compared(f"How do I knit {i}?") for i in range(200)])
    held_out = {row["messages"][-1]["content"] for row in load_prompts(source, split="eval")}
    rows, report = read_comparisons(source)
    assert len(held_out) > 10 and not held_out & {row["messages"][-1]["content"] for row in rows}
    assert report.skipped == {"not train": len(held_out)} and report.used == len(rows) == 200 - len(held_out)
    assert {row["messages"][-1]["content"] for row in load_comparisons(source, split="eval")} == held_out
    assert len(load_comparisons(source, split=None)) == 200
    more = {row["messages"][-1]["content"] for row in load_comparisons(source, eval_fraction=0.5)}
    assert more < {row["messages"][-1]["content"] for row in rows}
    limited, report = read_comparisons(source, limit=20, seed=1)
    assert len(limited) == 20 and not held_out & {row["messages"][-1]["content"] for row in limited}
    assert report.read == 200 == fates(report) and report.skipped["not train"] == len(held_out)


def test_every_turn_of_a_dialogue_falls_on_its_side(tmp_path):
    """Prompts of every turn, comparisons of any length, in any spelling of the opening: one side."""
    talks = [[f"How do I knit {i}?", "Which wool?", "Blue", "Slowly.", "And then?"] for i in range(60)]
    prompts = load_prompts(write(tmp_path / "p.jsonl", [{"prompt": dialogue(*t)} for t in talks]), every_turn=True)
    assert len(prompts) == 180
    sides = {opening_of(row["messages"]): row["split"] for row in prompts}
    assert all(sides[opening_of(row["messages"])] == row["split"] for row in prompts) and len(sides) == 60
    for length in (1, 3, 5):
        spelt = [[turn.upper().replace(" ", "  ") for turn in talk[:length]] for talk in talks]
        rows = load_comparisons(write(tmp_path / "c.jsonl", [compared(*talk) for talk in spelt]))
        assert {opening_of(row["messages"]) for row in rows} == {o for o, side in sides.items() if side == "train"}


def test_an_opening_without_words_decides_nothing():
    silent = [{"role": "user", "content": " "}, {"role": "assistant", "content": "Hello?"}]
    talks = [silent + [{"role": "user", "content": f"Question {i}?"}] for i in range(200)]
    assert {split_of(talk) for talk in talks} == {"train", "eval"}, "the first words do"
    assert opening_of(talks[3]) == "question 3?" and opening_of(silent) == ""


@pytest.mark.parametrize("load", [load_prompts, load_comparisons])
def test_a_split_in_the_file_counts(tmp_path, load):
    sides = ["train", "eval", "test", "validation"] * 10
    rows = [compared(f"How do I knit {i}?", split=side) for i, side in enumerate(sides)]
    source = write(tmp_path / "x.jsonl", rows)
    assert len(load(source, split="train")) == 10 and len(load(source, split="eval")) == 30
    assert {row["split"] for row in load(source, split=None)} == {"train", "eval"}
    assert load(write(tmp_path / "y.jsonl", [rows[0] | {"split": None}]), split=None)[0]["split"] in ("train", "eval")
    for wrong in ("trian", 3, ["train"]):
        with pytest.raises(CaiError, match=r"z\.jsonl:1: split is .*, expected train, eval, test, validation"):
            load(write(tmp_path / "z.jsonl", [rows[0] | {"split": wrong}]))
    with pytest.raises(CaiError, match="split='both': expected train, eval or None"):
        load(source, split="both")


def test_what_opens_as_an_evaluation_prompt_is_dropped_before_training():
    turn = lambda *texts: {"messages": [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}
    held_out = [turn("How do I knit?"), turn("Who are you?", "A model.", "Why?")]
    leaking = [turn("how do  I knit?\n"), turn("How do I knit?", "Slowly.", "Why?"), turn("Who are you?"),
               turn("Who are you?", "Nobody.", "Oh?")]
    fine = [turn("How do I knit a sock?"), turn("Why?"), turn("Hello", "Hi", "How do I knit?")]
    assert without_prompts(fine + leaking, held_out) == (fine, leaking)
    assert without_prompts(leaking, []) == (leaking, []) and without_prompts([], held_out) == ([], [])


def test_minis_comparisons_keep_clear_of_its_evaluation():
    from cai_nb.mini.world import helpful_comparisons, prompts

    rows = helpful_comparisons(200)
    for split in ("tune", "test"):
        held_out = [row for kind in ("harmful", "benign", "look_alikes", "follow_up", "contested")
                    for row in prompts(split, kind, 100, 0)]
        assert without_prompts(rows, held_out) == (rows, [])


@real
def test_real_comparisons_and_prompts_of_one_source_share_no_opening():
    held_out = load_prompts(HH, split="eval", every_turn=True)
    rows, report = read_comparisons(HH)
    assert without_prompts(rows, held_out) == (rows, []) and report.skipped["not train"] > 80
    assert len(without_prompts(load_comparisons(HH, split=None), held_out)[1]) == report.skipped["not train"]

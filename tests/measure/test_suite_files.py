"""The paper's files of questions: every row read and nothing of it lost, faults named, leaked items found."""
import gzip
import json
import subprocess
import sys

import pytest
from suite_files import PARTS, examples, paper, row, two, write  # the small ones are fixtures

from cai_nb.core.errors import CaiError
from cai_nb.measure.suite_files import OPENING, QUESTION_FILES, find_contaminated, read_questions


LEAKED = (1, 30, 74, 92, 185, 375)  # places of the paper's worked examples among the 438, from 0


def raw(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


# The paper's own files


@pytest.mark.parametrize("name", PARTS)
def test_every_row_is_an_item_and_nothing_of_it_is_lost(paper, name):
    rows, items = raw(paper[name]), read_questions(name, paper[name])
    assert len(items) == len(rows) and len({i.id for i in items}) == len(rows)
    for number, (source, item) in enumerate(zip(rows, items), 1):
        assert item.place == f"{paper[name].name}:{number}"
        assert source["prompt"].strip().removesuffix(OPENING).rstrip() == item.shown()
        assert len(item.options) == QUESTION_FILES[name].options and item.letters[item.answer] == source["corrects"][0]
        for order in range(len(item.options)):  # the right text stands where it is said to, and all others are there
            shown = item.shown(order)
            assert f"\n{item.letters[item.right(order)]} {item.options[item.answer]}" in shown
            assert sorted(shown) == sorted(item.shown())
        assert len({item.shown(order) for order in range(len(item.options))}) == len(item.options)


def test_replies_agree_with_the_finished_conversations(paper):
    for source, item in zip(raw(paper["hhh"]), read_questions("hhh", paper["hhh"])):
        right, wrong = (item.options[i].removeprefix("[[[").removesuffix("]]]") for i in (item.answer, 1 - item.answer))
        assert source["text_correct"].endswith(right) and source["text_incorrect"].endswith(wrong)


def test_leaked_items_are_found_by_content_in_either_order(paper, examples):
    items = read_questions("hhh", paper["hhh"])
    found = find_contaminated(items, examples)
    leaked = [i for i in items if i.id in found["ids"]]
    texts = [" ".join(entry["prompt"].split()) for entry in json.loads(examples.read_text())]
    for item in leaked:
        assert any(all(" ".join(o.split()) in text for o in item.options) for text in texts)
    orders = {any(" ".join(item.shown()[len(item.stem):].split()) in text for text in texts) for item in leaked}
    assert len(leaked) == 2 and orders == {True, False}  # one stands in the examples' order, one in the other
    assert found["same_conversation"] == 7


# Leaked items of the whole file


def test_whole_file_falls_back_to_places(tmp_path):
    rows = [row(i, right=int(i >= 228)) for i in range(438)]
    items = read_questions("hhh", write(tmp_path / "all.jsonl", rows))
    assert find_contaminated(items) == {
        "found_by": "place",
        "ids": {items[i].id for i in LEAKED},
        "same_conversation": None,
    }
    assert find_contaminated(items[:437])["ids"] is None
    other = read_questions("hhh", write(tmp_path / "other.jsonl", [row(i, right=i % 2) for i in range(438)]))
    assert find_contaminated(other)["found_by"] is None  # 438 rows, but not the published ones


def test_file_of_examples_goes_before_places_and_a_wrong_one_is_an_error(tmp_path, two):
    items = read_questions("hhh", two)
    text = (
        "\n\nHuman: About a human (H) and an assistant (A):\n\nH: request 4\n\n{}\n"
        " (A) [[[reply 1 to 4]]]\n (B) [[[reply  0 to 4]]]\n"
    )
    near = text.replace("request 4", "request 5").replace("to 4", "to nobody")
    good = tmp_path / "good.json"
    good.write_text(json.dumps([{"prompt": text}, {"prompt": near}]))
    assert find_contaminated(items, good) == {"found_by": "content", "ids": {items[4].id}, "same_conversation": 1}
    for content in ([], {}, "text", [{"prompt": text}, {"other": text}], [{"prompt": "no replies"}]):
        good.write_text(json.dumps(content))
        with pytest.raises(CaiError, match="good.json.*RLMadisonPrecogFewShotPrompts.json"):
            find_contaminated(items, good)
    with pytest.raises(CaiError, match="nowhere.json"):
        find_contaminated(items, tmp_path / "nowhere.json")


# Reading


@pytest.mark.parametrize(
    "change, said",
    [
        ({"prompt": None}, "prompt is missing"),
        ({"incorrects": None}, "incorrects is missing"),
        ({"corrects": []}, "corrects is missing"),
        ({"text_correct": ""}, "text_correct is missing"),
        ({"prompt": 7}, "no str"),
        ({"corrects": " (A)"}, "no list"),
        ({"corrects": ["(A)"]}, "leading space"),
        ({"corrects": [" (B)"]}, r"\[' \(B\)'\]"),
        ({"corrects": [" (A)", " (B)"]}, "once"),
        ({"incorrects": [" (B)", " (C)"]}, "2 answers"),
        ({"prompt": "Which? (A) a (B) b"}, "The answer is:"),
        ({"corrects": [[1]]}, "leading space"),
    ],
)
def test_faulty_row_is_an_error_that_names_file_line_and_what_is_missing(tmp_path, change, said):
    bad = {key: value for key, value in {**row(3), **change}.items() if value is not None}
    path = write(tmp_path / "bad.jsonl", [row(1), row(2), bad])
    with pytest.raises(CaiError, match=f"bad.jsonl:3: .*{said}") as error:
        read_questions("hhh", path)
    assert "\n" not in str(error.value)


def test_letters_that_contradict_the_finished_conversations_are_an_error(tmp_path):
    bad = {**row(2), "corrects": [" (B)"], "incorrects": [" (A)"]}
    with pytest.raises(CaiError, match=r"bad.jsonl:2: corrects says \(B\)"):
        read_questions("hhh", write(tmp_path / "bad.jsonl", [row(1), bad]))


def test_files_that_are_no_suites_are_errors(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}' * 100)[:-20])
    (tmp_path / "z.jsonl").write_text("no json\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "table.csv").write_text("a,b\n")
    for name, said in [("x.jsonl.gz", "x.jsonl.gz: cannot be read"), ("y.jsonl.gz", "y.jsonl.gz: cannot be read"),
                       ("z.jsonl", "z.jsonl:1: not a JSON object"), ("list.jsonl", "list.jsonl:1: not a JSON object"),
                       ("empty.jsonl", "has no row"), ("latin.jsonl", "latin.jsonl:1: byte .*UTF-8"),
                       ("table.csv", "expected a .jsonl file"), ("missing.jsonl", "no such file")]:
        with pytest.raises(CaiError, match=said):
            read_questions("hhh", tmp_path / name)


@pytest.mark.parametrize(
    "quoted", ["[[[reply 0 to 1\n (B) is quoted]]]", "[[[reply 0]]]\n (B) [[[is quoted]]]", "no frame"]
)
def test_order_that_cannot_be_told_leaves_the_text_as_it_was(tmp_path, quoted):
    odd = row(1)
    odd["prompt"] = odd["prompt"].replace("[[[reply 0 to 1]]]", quoted)
    path = write(tmp_path / "odd.jsonl", [row(0), odd])
    items = read_questions("hhh", path)
    assert items[1].options == () and items[1].shown() == odd["prompt"].strip().removesuffix(OPENING).rstrip()


def test_a_question_that_stands_twice_is_two_items_and_ids_hang_on_content(tmp_path):
    items = read_questions("hhh", write(tmp_path / "twice.jsonl", [row(0), row(0)]))
    assert len(items) == len({i.id for i in items}) == 2
    other = read_questions("hhh", write(tmp_path / "other.jsonl", [row(1), row(0), row(0)]))
    assert [i.id for i in other[1:]] == [i.id for i in items] and other[0].id not in {i.id for i in items}


def test_plain_and_packed_files_give_the_same_items(tmp_path):
    rows = [row(i) for i in range(3)]
    plain, packed = (read_questions("hhh", write(tmp_path / name, rows)) for name in ("a.jsonl", "a.jsonl.gz"))
    assert [i.id for i in plain] == [i.id for i in packed] and [i.shown() for i in plain] == [i.shown() for i in packed]


def test_questions_come_without_heavy_libraries():
    heavy = ("torch", "transformers", "numpy", "matplotlib")
    code = f"import sys, cai_nb.measure.suite_files; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

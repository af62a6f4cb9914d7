"""The prompts that ship are split by content, without near duplicates, varied, and of no use to whoever means harm."""

import gzip
import re
from collections import Counter
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import pytest

from cai_nb.core.files import package_folder
from cai_nb.core.prompts import opening_of, read_prompts
from cai_nb.core.records import read_records

FILES = {"red_team": "harmful", "benign": "helpful", "look_alikes": "helpful"}  # file → kind of its prompts
SHARED = Path(__file__).parents[3] / "shared" / "data"
COMMON = frozenset(
    "a about all an and any are as at be best by can could did do does don't for from get give go good had has "
    "have he help her him his how i i'm if in into is it it's its just know like make me my need no not of on one "
    "or our out she should so some somebody someone tell than that the their them then there they this to up us "
    "want was way we what what's when where which who why will with without would write you your".split()
)


def folder() -> Path:
    return package_folder("recipes") / "laptop"


@lru_cache
def rows(name: str) -> list[dict]:
    "Rows as a run reads them, with the topic that the file says."
    found, report = read_prompts(folder() / f"{name}.jsonl")
    topics = [record["topic"] for _, record in read_records(folder() / f"{name}.jsonl")]
    assert not report.skipped and len(topics) == len(found)
    return [row | {"topic": topic} for row, topic in zip(found, topics)]


def said(row: dict) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == "user"]


def content_words(row: dict) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+(?:'[a-z]+)?", " ".join(said(row)).lower())) - COMMON


def alike(a: frozenset, b: frozenset) -> float:
    "Share of the content words of both that are in each."
    shared = len(a & b)
    return shared / len(a | b) if shared > 1 else 0.0


@pytest.mark.parametrize(
    "name, least, test, topics", [("red_team", 480, 150, 12), ("benign", 400, 150, 12), ("look_alikes", 136, 100, 6)]
)
def test_there_are_enough_of_every_topic_on_both_sides(name, least, test, topics):
    found, counts = rows(name), Counter((row["topic"], row["split"]) for row in rows(name))
    assert len(found) >= least and sum(row["split"] == "eval" for row in found) >= test
    assert len({topic for topic, _ in counts}) >= topics
    assert min(counts[topic, side] for topic, _ in counts for side in ("train", "eval")) >= 5
    assert {row["kind"] for row in found} == {FILES[name]}
    for row in found:
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], row["source"]


def test_the_card_says_what_the_files_hold():
    card = (folder() / "README.md").read_text(encoding="utf-8")
    for name in FILES:
        sides = Counter(row["split"] for row in rows(name))
        assert f"| `{name}.jsonl` | {len(rows(name))} | {sides['train']} | {sides['eval']} |" in card
    dialogues = sum(len(row["messages"]) > 1 for name in FILES for row in rows(name))
    assert f"{dialogues} of them have a turn of an assistant before" in card


def test_no_prompt_stands_twice_and_none_of_test_is_near_one_of_training():
    every = [row for name in FILES for row in rows(name)]
    assert max(Counter(opening_of(row["messages"]) for row in every).values()) == 1
    words = [content_words(row) for row in every]
    near = [
        (every[i]["source"], every[j]["source"])
        for (i, a), (j, b) in combinations(enumerate(words), 2)
        if alike(a, b) >= (0.6 if every[i]["split"] == every[j]["split"] else 0.5)
    ]
    assert not near, "near duplicates; write another, or put both on one side"


def test_the_measure_of_likeness_sees_another_wording():
    ask = lambda text: content_words({"messages": [{"role": "user", "content": text}]})  # noqa: E731
    assert alike(ask("How do I poach a duck egg?"), ask("tell me how to poach a duck egg please")) >= 0.5
    assert alike(ask("How do I poach a duck egg?"), ask("How do I fry a fish?")) == 0


@pytest.mark.parametrize("name", FILES)
def test_prompts_are_varied(name):
    texts = [said(row)[-1] for row in rows(name)]
    openings = Counter(" ".join(text.lower().split()[:2]) for text in texts)
    assert max(openings.values()) < 0.32 * len(texts) and len(openings) > 0.4 * len(texts)
    assert any(text[0].islower() for text in texts) and any(text.endswith("?") for text in texts)
    if name != "look_alikes":
        assert sum(not text.endswith("?") for text in texts) > 0.25 * len(texts)
        assert sum(len(row["messages"]) > 1 for row in rows(name)) >= 12, "dialogues"


def test_red_team_prompts_hold_nothing_that_could_be_used():
    "A wish in general words: no address, link, quantity, code, or long text; the assistant's turns never go along."
    for row in rows("red_team"):
        text = " ".join(m["content"] for m in row["messages"])
        assert len(text.split()) <= 60 and not re.search(r"https?:|www\.|@|```|\d{3,}", text), row["source"]
        assert not re.search(r"\b\d+ ?(?:g|mg|ml|kg|grams?|litres?|volts?|degrees)\b", text), row["source"]
        before = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert all(re.search(r"n't|rather not|would be", reply) for reply in before)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public data lie beside the checkout")
def test_no_sentence_is_taken_from_public_data():
    def plain(text: str) -> str:
        return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "

    data = ""
    for path in SHARED.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
            data += plain(raw.decode("utf-8", "replace").replace("\\n", " "))
    mine = {text for name in FILES for row in rows(name) for text in said(row)}
    assert not [text for text in mine if len(text.split()) > 3 and plain(text) in data]

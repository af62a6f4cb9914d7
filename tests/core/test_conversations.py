"What people's records say: every shape is read, every row that is not is counted, no message is torn into turns."

import json
from pathlib import Path

import pytest

from cai_nb.core.conversations import UnfitRow, comparison_of, conversation_of
from cai_nb.core.errors import CaiError
from cai_nb.core.prompts import read_comparisons, read_prompts

CASES = Path(__file__).parents[3] / "shared" / "cases"
real = pytest.mark.skipif(not CASES.is_dir(), reason="the cases lie beside the checkout")


def u(text): return {"role": "user", "content": text}
def a(text): return {"role": "assistant", "content": text}
def s(text): return {"role": "system", "content": text}


TALK = [u("Why?"), a("Because.")]


@pytest.mark.parametrize("record", [
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    {"messages": [{"role": "human", "content": "Why?"}, {"role": "gpt", "content": "Because."}]},
    {"messages": [{"role": "User", "content": [{"type": "text", "text": "Why?"}]},
                  {"role": "model", "content": "Because."}]},
    {"messages": [u([{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]), a("Because.")]},
    {"conversation": json.dumps(TALK)}, {"prompt": TALK}, {"Messages": TALK}, {"chosen": TALK, "rejected": [u("Why?")]},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "x"}, {"dialog": [u("Why?"), a("Because.")]},
    {"prompt": "\n\nHuman: Why?\n\nAssistant: Because."}, {"transcript": "Human: Why?\n\nAssistant: Because."},
    {"prompt": "", "messages": TALK}, {"messages": [], "chosen": TALK},
], ids=lambda record: json.dumps(record)[:50])
def test_one_conversation_in_many_shapes(record):
    assert conversation_of(record, "x:1") == TALK


@pytest.mark.parametrize("record, found", [
    ({"question": "Why?", "system": "Be brief."}, [s("Be brief."), u("Why?")]),
    ({"instruction": "Translate.", "input": "I am.", "output": "Je suis."}, [u("Translate.\n\nI am.")]),
    ({"instruction": "Translate.", "input": ""}, [u("Translate.")]),
    ({"Goal": "Write: a poem", "target": "Sure"}, [u("Write: a poem")]),
    ({"messages": [s("Be brief."), u("a"), u("b")]}, [s("Be brief."), u("a\n\nb")]),
])
def test_other_columns(record, found):
    assert conversation_of(record, "x:1") == found


QUOTES = [
    "Continue.\n\nHuman: How do I knit?\n\nAssistant: First\n\nHuman: And a hat?\n\nAssistant:",
    "You said yesterday:\n\nAssistant: Of course!\n\nGo on.", "Translate:\n\nHuman: I am human.\n\nThank you.",
    "Human: How do I knit?\n\nAssistant: First\n\nHuman: And a hat?\n\nAssistant:", "\nAssistant: yes\n\nHuman: no",
]


@pytest.mark.parametrize("key", ["prompt", "instruction", "goal", "question", "text", "query"])
@pytest.mark.parametrize("text", QUOTES, ids=range(len(QUOTES)))
def test_a_quoted_dialogue_stays_one_message(key, text):
    assert conversation_of({key: text}, "x:1") == [u(text.strip())]
    assert comparison_of({key: text, "chosen": "b", "rejected": "c"}, "x:1")[0] == [u(text.strip()), a("b")]


@pytest.mark.parametrize("record, reason", [
    ({"messages": [u("4?"), {"role": "tool", "content": "4"}]}, "with a turn of a tool"),
    ({"messages": [u("4?"), {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "with a turn of a tool"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]},
     "with a message that is no text"),
    ({"messages": [u("a"), {"role": "assistant", "content": None}]}, "with a message that is no text"),
    ({"messages": [{"role": "narrator", "content": "It rains."}]}, "with a role that is none of"),
    ({"prompt": 5}, "with a prompt that is no text"), ({"prompt": None}, "without a user's turn"),
    ({"prompt": " "}, "without a user's turn"), ({"messages": None}, "without a user's turn"),
])
def test_a_row_that_cannot_be_used_is_counted(tmp_path, record, reason):
    rows = [{"prompt": f"Question {i}?"} for i in range(4)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[0], record, *rows[1:]]))
    found, report = read_prompts(tmp_path / "x.jsonl")
    assert len(found) == report.kept == 4 and report.read == 5
    assert [why.startswith(reason) for why in report.skipped] == [True]
    assert list(report.places.values()) == [["x.jsonl:2"]]


CHOSEN, REJECTED = ([u("Why?"), a(text)] for text in ("Because.", "No."))
SHAPES = {
    "texts": {"prompt": "Why?", "chosen": "Because.", "rejected": " No.\n"},
    "question": {"question": "Why?", "chosen": "Because.", "rejected": "No."},
    "full-hh": {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No."},
    "hh": {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    "hh with its prompt": {"prompt": "\n\nHuman: Why?\n\nAssistant:",
                           "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
                           "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    "implicit messages": {"chosen": CHOSEN, "rejected": REJECTED},
    "explicit messages": {"prompt": CHOSEN[:1], "chosen": CHOSEN[1:], "rejected": REJECTED[1:]},
    "ultrafeedback": {"prompt": "Why?", "prompt_id": "x", "chosen": CHOSEN, "rejected": REJECTED, "messages": CHOSEN},
    "ours": {"messages": CHOSEN[:1], "chosen": "Because.", "rejected": "No."},
    "finished and two texts": {"messages": CHOSEN, "chosen": "Because.", "rejected": "No."},
    "sharegpt": {"conversations": [{"from": "human", "value": "Why?"}], "chosen": {"from": "gpt", "value": "Because."},
                 "rejected": {"from": "gpt", "value": "No."}},
    "numbered": {"prompt": "Why?", "response_0": "No.", "response_1": "Because.", "better_response_id": 1},
    "arena": {"conversation_a": CHOSEN, "conversation_b": REJECTED, "winner": "model_a"},
    "messages as text": {"chosen": json.dumps(CHOSEN), "rejected": json.dumps(REJECTED)},
    "parts": {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}], "chosen": CHOSEN[1:],
              "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "No."}]}]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_comparison_in_many_shapes(tmp_path, shape):
    (tmp_path / "x.jsonl").write_text(json.dumps(SHAPES[shape]) + "\n")
    rows, report = read_comparisons(tmp_path / "x.jsonl", split=None)
    assert report.skipped == {} and [(r["messages"], r["chosen"], r["rejected"]) for r in rows] == [
        ([u("Why?")], "Because.", "No.")]
    if shape != "numbered" and shape != "arena":
        prompts, report = read_prompts(tmp_path / "x.jsonl", split=None)
        assert report.skipped == {} and [row["messages"] for row in prompts] == [[u("Why?")]]


def test_a_system_message_stays_on_both_sides():
    for record in ({"system": "Be brief.", "question": "Why?", "chosen": "Because.", "rejected": "No."},
                   {"prompt": [s("Be brief."), u("Why?")], "chosen": CHOSEN[1:], "rejected": REJECTED[1:]},
                   {"prompt": [s("Be brief.")], "chosen": CHOSEN, "rejected": REJECTED}):
        assert comparison_of(record, "x:1") == ([s("Be brief."), *CHOSEN], [s("Be brief."), *REJECTED])


def test_comparisons_that_say_nothing_are_counted(tmp_path):
    rows = [SHAPES["texts"], {"chosen": "Because.", "rejected": "No."}, SHAPES["texts"] | {"rejected": None},
            SHAPES["numbered"] | {"better_response_id": -1}, SHAPES["texts"] | {"chosen": 7}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_comparisons(tmp_path / "x.jsonl", split=None)[1].skipped == {
        "without a prompt": 1, "with an empty reply": 1, "with no answer that is the better one": 1,
        "with a reply that is no text": 1}
    with pytest.raises(CaiError, match="x:1: found the keys prompt, completion; expected chosen and rejected"):
        comparison_of({"prompt": "Why?", "completion": "Because."}, "x:1")
    with pytest.raises(UnfitRow):
        comparison_of({"chosen": "Because.", "rejected": "No."}, "x:1")


def test_a_column_kind_of_another_house_hides_no_row(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "kind": "animals"}\n{"prompt": "b", "kind": ["x"]}\n'
                                      '{"prompt": "c", "kind": "helpful"}\n')
    assert [row["kind"] for row in read_prompts(tmp_path / "x.jsonl")[0]] == ["harmful", "harmful", "helpful"]


@real
@pytest.mark.parametrize("name, sides", [("mixed", {"train": 12, "validation": 12}), ("parts", {}), ("sharegpt", {}),
                                         ("split", {"test": 24})])
def test_the_cases_are_read_whole(name, sides):
    rows, report = read_prompts(CASES / f"10_{name}.jsonl")
    assert len(rows) == report.used == 24 and report.said == sides and not report.skipped
    assert rows[3]["messages"][0]["content"] == "how do i break door number 3?"
    comparisons, report = read_comparisons(CASES / "09_pairs.jsonl", split=None)
    assert len(comparisons) == 20 == report.used

"""Thoughts are told from answers: by any house's marks, finished or cut off, in text and in tokens."""

import pytest
from tiny import tiny_model

from cai_nb.core.thoughts import THOUGHT_MARKS, split_thoughts, thought_marks
from cai_nb.lm.bulk import read_reply, thoughts_of
from cai_nb.lm.generate import LocalLM
from cai_nb.method.critique import chain_steps
from cai_nb.method.preference import preference_rows


@pytest.mark.parametrize("start, end", THOUGHT_MARKS)
def test_thoughts_of_every_house(start, end):
    """At the beginning of any text; further in, and without a beginning, where the model knows the marks."""
    whole = f"\n{start}one\ntwo{end}\n\nNo."
    for text, marks, opened in [
        (whole, (), False), (whole, ((start, end),), False), (f"one\ntwo\n{end}No.", ((start, end),), False),
        (f"one\ntwo\n{end}No.", ((start, end),), True),
    ]:
        assert split_thoughts(text, marks, opened) == ("No.", "one\ntwo"), text
    assert split_thoughts(f"{start} one") == ("", "one"), "cut off within the thought: no answer"
    assert split_thoughts("one", ((start, end),), opened=True) == ("", "one")
    assert split_thoughts(f"{start}\n{end}No.") == ("No.", ""), "thinking was off"
    assert split_thoughts(f"Write {start}x{end}.") == (f"Write {start}x{end}.", ""), "of a model that knows no marks"


def test_a_thought_that_is_not_finished_leaves_an_empty_answer():
    model, tokenizer = tiny_model()
    lm = LocalLM(model, tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    assert thought_marks(tokenizer) == (("<think>", "</think>"),)
    thought, said = (tokenizer.encode(text, add_special_tokens=False) for text in ("how do i", "No ."))
    start, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    reply = lm._reply([start, *thought, end, *said], True, ())
    assert (reply.text, reply.thoughts, reply.flags) == ("No .", "how do i", ())
    cut = lm._reply([start, *thought], False, ())
    assert (cut.text, cut.thoughts, cut.flags) == ("", "how do i", ("empty", "truncated"))
    answer = read_reply(reply)
    assert answer == ("No .", []) and thoughts_of(answer) == {"thoughts": "how do i"}
    assert thoughts_of(("No .", [])) == {}


def test_a_chain_keeps_thoughts_apart():
    from types import SimpleNamespace

    from cai_nb.lm.bulk import Answer

    row = {"response": None, "steps": [], "flags": []}
    principle = SimpleNamespace(id="p", critique="Criticise.", revision="Revise.")
    chain = chain_steps(row, {"id": "1", "messages": [{"role": "user", "content": "how?"}]}, [principle], 0)
    asked = [next(chain)]
    with pytest.raises(StopIteration):
        for part in ("response", "critique", "revision"):
            asked.append(chain.send(Answer(part.upper(), [], f"of the {part}")))
    assert row == {
        "response": "RESPONSE", "thoughts": "of the response", "flags": [],
        "steps": [{"principle_id": "p", "critique": "CRITIQUE", "critique_thoughts": "of the critique",
                   "revision": "REVISION", "thoughts": "of the revision"}]}
    assert not any("of the" in message["content"] for ask in asked for message in ask.conversation)


def test_thoughts_in_comparisons_are_not_compared():
    [row] = preference_rows([], [], [], [{"messages": [], "chosen": "<think>a</think>No.", "rejected": "Sure."}])
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("No.", "Sure.")

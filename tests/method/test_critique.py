"""Chains of critique and revision: what is asked, what is drawn, what is flagged, what survives a kill."""

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripted import Killed, ScriptedLM, prompt, resumes_identically, word_of

from cai_nb.core.errors import CaiError
from cai_nb.core.constitution import Constitution
from cai_nb.core.principle import Principle
from cai_nb.method.critique import (
    CRITIQUE_EXAMPLES,
    CRITIQUE_LAYOUTS,
    chain_steps,
    critique_examples,
    critique_request,
    critique_revise,
    draw_principles,
    critique_shots,
    is_meta_talk,
    revision_request,
    revisions,
)
from cai_nb.lm.generate import Reply
from cai_nb.lm.bulk import read_reply, sample_replies

SIXTEEN = Constitution(
    "sixteen", tuple(Principle(f"p{i}", critique=f"Is it {i}?", revision=f"Make it not {i}.") for i in range(16))
)
PROMPTS = [prompt(f"request {i}") for i in range(7)]


def test_conversation_is_rebuilt_and_no_earlier_critique_is_carried_on():
    lm = ScriptedLM()
    (chain,) = critique_revise(lm, PROMPTS[:1], SIXTEEN, n_revisions=3)
    drawn = draw_principles(SIXTEEN, PROMPTS[0]["id"], 3)
    asked = [conversations[0] for conversations in lm.asked]
    assert len(asked) == 1 + 2 * 3
    start, latest = PROMPTS[0]["messages"], chain["response"]
    assert asked[0] == start
    for i, (step, principle) in enumerate(zip(chain["steps"], drawn)):
        now = start + [{"role": "assistant", "content": latest}]
        assert asked[1 + 2 * i] == now + [{"role": "user", "content": principle.critique}]
        assert asked[2 + 2 * i] == now + [
            {"role": "user", "content": principle.critique},
            {"role": "assistant", "content": step["critique"]},
            {"role": "user", "content": principle.revision},
        ]
        latest = step["revision"]


def test_multi_turn_prompts_and_system_messages_stay_in_front():
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one: two"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    lm = ScriptedLM()
    critique_revise(lm, [{"id": "x", "messages": messages}], SIXTEEN, n_revisions=1, few_shot=CRITIQUE_EXAMPLES)
    assert lm.asked[0][0] == messages
    for asked in (lm.asked[1][0], lm.asked[2][0]):
        assert (
            asked[0] == messages[0]
            and asked[1:31] == critique_shots(CRITIQUE_EXAMPLES)
            and asked[31:34] == messages[1:]
        )


def test_one_principle_is_drawn_per_step_seeded_and_stored():
    chains = critique_revise(ScriptedLM(), [prompt(f"r{i}") for i in range(200)], SIXTEEN)
    ids = [[step["principle_id"] for step in chain["steps"]] for chain in chains]
    assert 40 <= sum(len(set(drawn)) < 4 for drawn in ids) <= 95  # a third repeats one
    assert {id for drawn in ids for id in drawn} == {p.id for p in SIXTEEN.principles}
    for chain, drawn in zip(chains, ids):
        expected = [
            SIXTEEN.sample("critique", random.Random(f"0:{chain['prompt_id']}:{step}")).id for step in range(1, 5)
        ]
        assert drawn == expected
    other = critique_revise(ScriptedLM(), [prompt("r0")], SIXTEEN, seed=1)
    assert other[0]["id"] != chains[0]["id"] and other[0]["response"] != chains[0]["response"]


def test_a_row_does_not_depend_on_its_batch_or_on_its_neighbours():
    whole = critique_revise(ScriptedLM(), PROMPTS, SIXTEEN, n_revisions=2)
    assert critique_revise(ScriptedLM(), PROMPTS, SIXTEEN, n_revisions=2, batch_size=2) == whole
    assert critique_revise(ScriptedLM(), PROMPTS[::-1], SIXTEEN, n_revisions=2) == whole[::-1]
    assert critique_revise(ScriptedLM(), PROMPTS[3:4], SIXTEEN, n_revisions=2) == whole[3:4]


def test_every_draw_of_text_has_its_own_seed():
    lm = ScriptedLM()
    critique_revise(lm, PROMPTS, SIXTEEN)
    seeds = [seed for of_call in lm.seeds for seed in of_call]
    assert len(set(seeds)) == len(seeds) == 7 * (1 + 2 * 4)


@pytest.mark.parametrize("critiques", [True, False])
def test_cut_at_any_byte_the_file_ends_the_same(tmp_path, critiques):
    out = tmp_path / "chains.jsonl"

    def work():
        lm = ScriptedLM()
        return critique_revise(lm, PROMPTS, SIXTEEN, n_revisions=2, critiques=critiques, batch_size=3, out=out)

    rows = resumes_identically(work, out)
    assert [row["prompt_id"] for row in rows] == [p["id"] for p in PROMPTS]


def test_killed_within_a_batch_and_resumed(tmp_path):
    def work(out, lm):
        return critique_revise(lm, PROMPTS, SIXTEEN, n_revisions=2, batch_size=3, out=out)

    rows = work(tmp_path / "whole.jsonl", ScriptedLM())
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for die_at in range(1, 16):  # 3 batches × 5 calls
        out = tmp_path / f"killed{die_at}.jsonl"
        with pytest.raises(Killed):
            work(out, ScriptedLM(die_at=die_at))
        resumed = ScriptedLM()
        assert work(out, resumed) == rows and out.read_bytes() == whole
        assert resumed.calls == 15 - 5 * ((die_at - 1) // 5)  # what was stored is not done again


def driven(script, word, told=None):
    "A chain as the app drives it: every answer grows in its place before it is sent; what the row held at each moment."
    seen = []
    try:
        asked = script.send(told)
        while True:
            for part in ("", "wo", word(asked)):
                asked.place[asked.part] = part
                seen.append((asked.step, asked.part, asked.place[asked.part]))
            asked = script.send((word(asked), []))
    except StopIteration as end:
        return end.value, seen


@pytest.mark.parametrize("critiques", [True, False])
def test_whoever_drives_the_steps_gets_the_row_of_critique_revise(critiques):
    (chain,) = critique_revise(ScriptedLM(), PROMPTS[:1], SIXTEEN, n_revisions=2, critiques=critiques)
    word = lambda asked: word_of(asked.conversation, asked.seed)  # noqa: E731
    principles = draw_principles(SIXTEEN, PROMPTS[0]["id"], 2)
    row = {"id": chain["id"], "prompt_id": chain["prompt_id"], "response": None, "steps": [], "flags": []}
    made, seen = driven(chain_steps(row, PROMPTS[0], principles, 0, critiques), word)
    assert made == chain and made is row
    parts = [(0, "response")] + [(n, p) for n in (1, 2) for p in (["critique"] * critiques + ["revision"])]
    assert [(step, part) for step, part, _ in seen[::3]] == parts


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_chain_goes_on_from_what_was_complete(steps):
    (chain,) = critique_revise(ScriptedLM(), PROMPTS[:1], SIXTEEN, n_revisions=2)
    begun = {**chain, "steps": [dict(step) for step in chain["steps"][:steps]], "flags": []}
    word = lambda asked: word_of(asked.conversation, asked.seed)  # noqa: E731
    script = chain_steps(begun, PROMPTS[0], draw_principles(SIXTEEN, PROMPTS[0]["id"], 2), 0)
    made, seen = driven(script, word)
    assert made == chain and len(seen) == 3 * 2 * (2 - steps)


CHILD = """
import sys, time
sys.path[:0] = {folders!r}
from scripted import ScriptedLM, word_of
from test_critique import PROMPTS, SIXTEEN
from cai_nb.method.critique import critique_revise
slowly = lambda conversation, seed: time.sleep(0.05) or word_of(conversation, seed)
critique_revise(ScriptedLM(slowly), PROMPTS, SIXTEEN, n_revisions=2, batch_size=2, out={out!r})
"""


def test_a_process_killed_by_the_system_leaves_a_file_to_resume(tmp_path):
    whole = critique_revise(ScriptedLM(), PROMPTS, SIXTEEN, n_revisions=2, batch_size=2, out=tmp_path / "whole.jsonl")
    out = tmp_path / "chains.jsonl"
    here = Path(__file__).parent
    code = CHILD.format(folders=[str(here), str(here.parent)], out=str(out))
    child = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(6000):
        if out.exists() or child.poll() is not None:
            break
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert 0 < out.stat().st_size < (tmp_path / "whole.jsonl").stat().st_size
    assert critique_revise(ScriptedLM(), PROMPTS, SIXTEEN, n_revisions=2, batch_size=2, out=out) == whole
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_file_asks_the_model_nothing(tmp_path):
    out = tmp_path / "chains.jsonl"
    rows = critique_revise(ScriptedLM(), PROMPTS, SIXTEEN, out=out)
    idle = ScriptedLM()
    assert critique_revise(idle, PROMPTS, SIXTEEN, out=out) == rows and idle.calls == 0


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"n_revisions": 2}, {"critiques": False}, {"few_shot": CRITIQUE_EXAMPLES}, {"layout": "paper"},
])
def test_rows_of_other_settings_are_refused(tmp_path, change):
    out = tmp_path / "chains.jsonl"
    critique_revise(ScriptedLM(), PROMPTS, SIXTEEN, out=out)
    before = out.read_bytes()
    with pytest.raises(CaiError, match="chains.jsonl: 7 of its 7 chains were made by .* with other settings"):
        critique_revise(ScriptedLM(), PROMPTS, SIXTEEN, out=out, **change)
    assert out.read_bytes() == before


def test_direct_revisions_ask_for_no_critique():
    lm = ScriptedLM()
    (chain,) = critique_revise(lm, PROMPTS[:1], SIXTEEN, n_revisions=2, critiques=False)
    assert len(lm.asked) == 3 and all(step["critique"] is None for step in chain["steps"])
    assert [m["role"] for m in lm.asked[1][0]] == ["user", "assistant", "user"]
    assert lm.asked[1][0][-1]["content"] == draw_principles(SIXTEEN, PROMPTS[0]["id"])[0].revision


def test_mini_is_asked_what_it_was_trained_on():
    "The turns of its chain documents are those of a step."
    lessons = pytest.importorskip("cai_nb.mini.lessons")
    direct = 0
    for seed in range(20):
        document = lessons.chain(random.Random(seed))
        said, asked = (
            [{"role": t.role, "content": t.text} for t in turns] for turns in (document.trunk, document.branches[0])
        )
        requests = [turn["content"] for turn in asked if turn["role"] == "user"]
        principle = Principle("x", critique=requests[0], revision=requests[-1])
        critique = asked[1]["content"] if len(requests) == 2 else None
        direct += critique is None
        assert revision_request(said, principle, critique) == [*said, *asked][:-1]
    assert 0 < direct < 20


def test_every_request_of_minis_constitution_is_in_its_words():
    lessons = pytest.importorskip("cai_nb.mini.lessons")
    for principle in Constitution.load("mini").critique_principles:
        words = re.split(r", | or ", re.fullmatch(r"Look at the reply. Is that (.*)\?", principle.critique).group(1))
        assert lessons.critique_question(words) == principle.critique
        assert lessons.revision_demand(words) == principle.revision


def test_paper_layout_is_the_papers_transcript():
    principle = Principle("x", critique="Identify harm.", revision="Please rewrite it.")
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert critique_request(said, principle, "paper")[-1]["content"] == (
        "Ho\n\nCritiqueRequest: Identify harm.\n\nCritique:"
    )
    assert revision_request(said, principle, "It is rude.", "paper")[-1]["content"] == (
        "Ho\n\nCritiqueRequest: Identify harm.\n\nCritique: It is rude."
        "\n\nRevisionRequest: Please rewrite it.\n\nRevision:"
    )
    assert revision_request(said, principle, None, "paper")[-1]["content"] == (
        "Ho\n\nRevisionRequest: Please rewrite it.\n\nRevision:"
    )


def test_paper_layout_cuts_what_a_base_writes_beyond_its_turn():
    def runs_on(conversation, seed):
        return Reply(" " + word_of(conversation, seed) + "\n\nHuman: and then?", False, ("truncated",), 9)

    (chain,) = critique_revise(ScriptedLM(runs_on), PROMPTS[:1], SIXTEEN, n_revisions=2, layout="paper")
    texts = [chain["response"], *(t for step in chain["steps"] for t in (step["critique"], step["revision"]))]
    assert chain["flags"] == [] and all(t.startswith("word ") and "Human" not in t for t in texts)
    assert read_reply(Reply("never ends", False, ("truncated",), 9), "paper") == ("never ends", ["truncated"])


@pytest.mark.parametrize("layout", CRITIQUE_LAYOUTS)
@pytest.mark.parametrize("critiques", [True, False])
def test_few_shot_examples_are_whole_alternating_turns(layout, critiques):
    examples = critique_examples(layout)
    messages = critique_shots(examples, layout, critiques)
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert all(m["content"] == m["content"].strip() and "Human:" not in m["content"] for m in messages)
    text = "\n".join(m["content"] for m in messages)
    assert all((e.critique in text) == critiques and e.revision in text for e in examples)
    assert len(examples) == (3 if layout == "chat_plain" else 5)


def test_examples_in_simple_words_are_short_object_and_give_a_reason():
    for e in critique_examples("chat_plain"):
        assert " because " in e.revision, "a reason"
        assert re.search(r"I can help|we ", e.revision), "and a better thing to do"
        asked = [e.critique_request, e.revision_request]
        assert all(re.fullmatch(r"[^.?!]+[.]", text) and len(text.split()) <= 15 for text in asked), "one sentence"
        sentences = re.split(r"(?<=[.?!]) ", " ".join([e.prompt, e.response, e.critique, e.revision]))
        assert max(len(s.split()) for s in sentences) <= 24
        assert not is_meta_talk(e.revision)
    asked = critique_request([{"role": "user", "content": "?"}], Principle("x", critique="Why?"), "chat_plain")
    assert asked == critique_request([{"role": "user", "content": "?"}], Principle("x", critique="Why?"))


def test_a_layouts_own_examples_stand_in_front_of_every_request():
    lm, few = ScriptedLM(), critique_examples("chat_plain")
    critique_revise(lm, PROMPTS[:1], SIXTEEN, n_revisions=2, few_shot=few, layout="chat_plain")
    first, *requests = [conversations[0] for conversations in lm.asked]
    assert first == PROMPTS[0]["messages"] and len(requests) == 4
    assert all(asked[:18] == critique_shots(few) and asked[18:19] == first for asked in requests)


def test_flags_name_the_step_and_keep_flagged_revisions_out_of_training():
    replies = iter([
        Reply("Sure.", False, ("truncated",), 9),
        Reply("It is bad.", False, ("truncated",), 9),
        "Certainly! Here is a revised response: no.",
        "It is fine.",
        "",
        "Fine again.",
        "No, sorry.",
    ])
    outside = lambda messages, text: ["outside"] if text == "No, sorry." else []  # noqa: E731
    (chain,) = critique_revise(
        ScriptedLM(lambda *_: next(replies)), PROMPTS[:1], SIXTEEN, n_revisions=3, flag=outside
    )
    assert chain["flags"] == [
        "step0:truncated", "critique1:truncated", "step1:meta_talk", "step2:empty", "step3:outside",
    ]
    assert revisions(chain) == []
    assert revisions(chain, flagged=True) == ["Certainly! Here is a revised response: no.", "", "No, sorry."]
    assert "Sure." not in revisions(chain, flagged=True)  # the initial response is never trained on


@pytest.mark.parametrize("text", [
    "Certainly! Here's a revised version of the response that is not harmful:",
    "Of course. Here is my rewritten answer: no",
    "Revised response: no",
    "I've rewritten the reply so that it is kind.",
    "RevisionRequest: make it kind",
    "This is fine, but the assistant's previous reply was not.",
])
def test_meta_talk_is_recognised(text):
    assert is_meta_talk(text)


@pytest.mark.parametrize("text", [
    "I won't help with that, but here is a better idea: talk to her.",
    "Here is a letter to your landlord.",
    "Certainly not. It would hurt somebody.",
    "Sure. First take the brush.",
    "Please revise your plan.",
])
def test_plain_replies_are_not_meta_talk(text):
    assert not is_meta_talk(text)


def test_missing_answers_are_an_error_and_lose_no_row(tmp_path):
    class Loses(ScriptedLM):
        def sample(self, conversations, **kwargs):
            return super().sample(conversations, **kwargs)[1:]

    with pytest.raises(CaiError, match="7 conversations gave 6 answers"):
        critique_revise(Loses(), PROMPTS, SIXTEEN, out=tmp_path / "chains.jsonl")
    assert len(critique_revise(ScriptedLM(), PROMPTS, SIXTEEN, out=tmp_path / "chains.jsonl")) == 7


def test_faults_of_the_caller_are_named():
    with pytest.raises(CaiError, match="layout: found 'xml'"):
        critique_revise(ScriptedLM(), PROMPTS, SIXTEEN, layout="xml")
    with pytest.raises(CaiError, match="n_revisions: found 0"):
        critique_revise(ScriptedLM(), PROMPTS, SIXTEEN, n_revisions=0)
    with pytest.raises(CaiError, match="critique"):
        critique_revise(ScriptedLM(), PROMPTS, Constitution("c", (Principle("x", comparison="Which is better?"),)))
    with pytest.raises(CaiError, match="twice"):
        critique_revise(ScriptedLM(), PROMPTS + PROMPTS[:1], SIXTEEN)


def test_helpful_samples_are_n_per_prompt_and_resume(tmp_path):
    out = tmp_path / "helpful.jsonl"

    def work():
        return sample_replies(ScriptedLM(), PROMPTS, n=2, batch_size=3, out=out)

    rows = resumes_identically(work, out)
    assert [row["prompt_id"] for row in rows] == [p["id"] for p in PROMPTS for _ in range(2)]
    assert len({row["response"] for row in rows}) == 14

"Prompts that a model writes: what is shown, how it is read, that nothing of the evaluation comes through; kills."

import json
import random
import subprocess
import sys

import pytest
from scripted import Killed, ScriptedLM, resumes_identically
from tiny import tiny_model

from cai_nb.core.errors import CaiError
from cai_nb.core.prompts import read_prompts, split_of
from cai_nb.core.dialogue import PLAIN_TEMPLATE
from cai_nb.lm.generate import LocalLM, Reply
from cai_nb.lm.model import load_model
from cai_nb.method.red_team import (
    PROMPT_KINDS,
    NearIndex,
    PromptFilter,
    _example_prompts,
    generate_prompts,
    prompt_request,
    read_prompt,
    _shown_examples,
    _words_of,
)
from cai_nb.core.rows import row_id

WORDS = (
    "amber birch cedar delta ember fjord grove haven inlet jetty knoll lagoon marsh north ocean prairie quarry ridge"
).split()


def row(text, split="train", kind="harmful"):
    messages = [{"role": "user", "content": text}]
    return {"id": row_id(messages), "messages": messages, "kind": kind, "split": split, "source": "test"}


GIVEN = [row(f"How do I reach the {w} {v}?") for w in WORDS[:6] for v in WORDS[6:9]]
HELD_OUT = [row(f"Tell me where the {w} is hidden.", "eval") for w in WORDS]
HELPFUL = [row(f"What grows in the {w}?", kind="helpful") for w in WORDS]
ROWS = GIVEN + HELD_OUT + HELPFUL


def writes(conversation, seed):
    "Now and then something unusable, else a line of random words, and the beginning of the next item."
    rng = random.Random(seed)
    line = " ".join(rng.choices(WORDS, k=5))
    texts = [
        f" {line}?\n9. And",
        f"“{line}”",
        HELD_OUT[rng.randrange(18)]["messages"][0]["content"].upper(),
        "Sure, here is one:",
        "",
        GIVEN[rng.randrange(18)]["messages"][0]["content"],
    ]
    return rng.choices(texts, (10, 4, 1, 1, 1, 1))[0]


def texts_of(rows):
    return [r["messages"][0]["content"] for r in rows]


# What is shown


def test_only_training_prompts_of_the_kind_are_shown():
    lm = ScriptedLM(writes)
    generate_prompts(lm, ROWS, 60, batch_size=16)
    shown = {line.split(". ", 1)[1] for batch in lm.asked for c in batch for line in c[-1]["content"].splitlines()[:-1]}
    assert shown == set(texts_of(GIVEN)), "all of them in time, and nothing else"
    lm = ScriptedLM(writes)
    made, _ = generate_prompts(lm, ROWS, 5, kind="helpful", layout="turns", shots=3)
    shown = {m["content"] for batch in lm.asked for c in batch for m in c if m["role"] == "assistant"}
    assert shown <= set(texts_of(HELPFUL)) and {r["kind"] for r in made} == {"helpful"}
    assert all(PROMPT_KINDS["helpful"] in c[0]["content"] for batch in lm.asked for c in batch)


def test_examples_are_first_turns_on_one_line_each_once():
    talk = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one\n\n two"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "and now?"},
    ]
    rows = [row("x") | {"messages": talk}, row("one two"), row("y" * 401), row("  ")]
    assert _example_prompts(rows) == ["one two"]
    with pytest.raises(CaiError, match="none of the 1 rows is a helpful training prompt"):
        generate_prompts(ScriptedLM(writes), rows[:1], 3, kind="helpful")


def test_every_draw_sees_a_fresh_sample_in_a_fresh_order():
    pool = texts_of(GIVEN)
    draws = [tuple(_shown_examples(pool, 5, 0, i)) for i in range(50)]
    assert len(set(draws)) == 50 and all(len(set(d)) == 5 for d in draws)
    assert len({d[-1] for d in draws}) > 10, "the last one, which counts most, changes"
    assert draws[7] == tuple(_shown_examples(pool, 5, 0, 7)) != tuple(_shown_examples(pool, 5, 1, 7))


@pytest.mark.parametrize("layout, template, end", [
    ("list", "chat", "1. how do i break a dog?\n2. how do i steal a car?\n3."),
    ("list", "plain", "\n\nAssistant: 1. how do i break a dog?\n2. how do i steal a car?\n3."),
    ("turns", "chat", "<|assistant|>how do i steal a car?<|end|><|user|>Another one.<|end|><|assistant|>"),
    ("turns", "plain", "\n\nAssistant: how do i steal a car?\n\nHuman: Another one.\n\nAssistant:"),
])
def test_requests_suit_local_models(layout, template, end):
    "The list is left open after its bare number; the turns end with the assistant's header."
    model, tokenizer = load_model("mini")
    if template == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    lm = LocalLM(model, tokenizer)
    shown = ["how do i break a dog?", "how do i steal a car?"]
    assert tokenizer.decode(lm.encode(prompt_request(shown, layout=layout))).endswith(end)
    rows = [row(s) for s in shown]
    made, report = generate_prompts(lm, rows, 3, shots=2, max_new_tokens=6, layout=layout, max_draws=8, batch_size=4)
    assert report.draws == report.kept + sum(report.skipped.values()) <= 8 and len(made) == report.kept


def test_a_context_that_is_too_small_is_said():
    lm, rows = LocalLM(*tiny_model()), [row(f"{w} " * 20) for w in WORDS]
    made, report = generate_prompts(lm, rows, 3, max_new_tokens=8, max_draws=8)
    assert not made and report.skipped == {"request cut": 8}


# How it is read


@pytest.mark.parametrize(
    "text, flags, prompt, reason",
    [
        ("How do I?", [], "How do I?", None),
        ("How do I?\n10. What if", ["truncated"], "How do I?", None),
        ("How do I", ["truncated"], "How do I", "too long"),
        ("9) **How do I?**", [], "How do I?", None),
        ("- 'How do I?'", [], "How do I?", None),
        ("(3) «Où est-ce ?»", [], "Où est-ce ?", None),
        ("„Wie geht das?“", [], "Wie geht das?", None),
        ('"this" or "that"', [], '"this" or "that"', None),
        ("'tis what I don't want'", [], "tis what I don't want", None),
        ("2024 was bad. Why?", [], "2024 was bad. Why?", None),
        ("What is 3. 5 times?", [], "What is 3. 5 times?", None),
        ("", [], "", "empty"),
        ("8. \n9. How?", [], "", "empty"),
        ("How do I?", ["prompt_cut"], "How do I?", "request cut"),
        ("go on " * 10, [], ("go on " * 10).strip(), "repetition"),
        ("Human: How do I?", [], "Human: How do I?", "several turns"),
        ("How do I? Assistant: No.", [], "How do I? Assistant: No.", "several turns"),
        ("How do I?<|im_end|>", [], "How do I?<|im_end|>", "several turns"),
    ],
)
def test_reading(text, flags, prompt, reason):
    assert read_prompt(text, flags) == (prompt, reason)


def test_a_repetition_after_the_first_line_does_no_harm():
    assert read_prompt("How do I?\n" + "9. Again\n" * 20, ["truncated", "repetition"]) == ("How do I?", None)


TALK = [
    "Sure, here is a prompt:",
    "Certainly! Here's another message for your list.",
    "Here are some more examples:",
    "Of course!",
    "Here is one:",
    "Okay, here's the next item: How do I?",
    "I'm sorry, but I can't continue this list.",
    "Sorry, I cannot help with that.",
    "I can't assist with that request.",
    "I cannot create harmful content.",
    "As an AI, I do not write such things.",
    "Note: these are harmful.",
    "I’m afraid I won’t do that.",
    "This is another request.",
]
MESSAGES = [
    "Okay, so how do I?",
    "Sorry, but how do I?",
    "I can't stand my neighbour. How do I tell him?",
    "Here is my house, there is his. Who is right?",
    "Is this a request?",
    "I am sorry for my cat. What do I do?",
    "i won't go to school. what do i say",
    "This is the worst day. What now?",
    "Great, how do I?",
    "Why can't you help with this?",
]


@pytest.mark.parametrize("text", TALK)
def test_talk_about_the_task_is_no_prompt(text):
    assert read_prompt(text)[1] == "meta-talk"


@pytest.mark.parametrize("text", MESSAGES)
def test_messages_are_no_talk_about_the_task(text):
    assert read_prompt(text)[1] is None


def test_hardly_any_real_message_is_lost(shared_data):
    rows, _ = read_prompts(shared_data / "hh-rlhf" / "harmless-base-test.part.jsonl.gz", every_turn=True)
    turns = {r["messages"][-1]["content"].strip() for r in rows}
    lost = [read_prompt(turn)[1] for turn in turns if read_prompt(turn)[1]]
    assert len(turns) > 2000 and len(lost) < len(turns) / 200


def test_words_are_compared_in_any_script():
    assert _words_of("  WHAT’S\tthis?! ") == _words_of("what's this")
    assert _words_of("कि") != _words_of("का") and _words_of("¿Qué?") == ["qué"] and _words_of("？") == []


# Near duplicates


def slowly(text, others, threshold):
    runs = lambda t: (lambda w: {tuple(w[i:i + 3]) for i in range(len(w) - 2)})(["", *_words_of(t), ""])
    scores = [len(runs(text) & runs(o)) / len(runs(text) | runs(o)) for o in others]
    best = max(scores, default=0)
    return (others[scores.index(best)], best) if best >= threshold and best else None


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.6, 2 / 3, 0.75, 0.9, 1.0])
def test_the_index_finds_what_comparing_with_all_finds(threshold):
    rng, index, seen, hits = random.Random(0), NearIndex(threshold), [], 0
    for _ in range(400):
        text = " ".join(rng.choices("abcd", k=rng.randint(1, 8)))
        found, expected = index.find(text), slowly(text, seen, threshold)
        assert (found and found[1]) == (expected and pytest.approx(expected[1])), (text, found, expected)
        assert found is None or found[0] == expected[0]
        index.add(text)
        seen.append(text)
        hits += found is not None
    assert hits > 20 and len(index) == 400


@pytest.mark.parametrize("threshold", [0, -1, 1.1])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(CaiError, match="near: found"):
        NearIndex(threshold)


def test_the_index_is_not_quadratic():
    "The most frequent runs are not looked up: hardly any of 20,000 prompts that begin alike is compared with another."
    rng, index, compared = random.Random(0), NearIndex(), 0
    likeness = index._likeness
    def counting(a, b):
        nonlocal compared
        compared += 1
        return likeness(a, b)
    index._likeness = counting
    for i in range(20_000):
        text = f"How do I get to {rng.randrange(10**6)} from {rng.randrange(10**6)} by way of {rng.randrange(10**6)}?"
        assert index.find(text) is None
        index.add(text)
    assert compared < 20_000


# Training and evaluation


def test_nothing_of_the_evaluation_comes_through():
    later = row("Opening?", "eval")
    later["messages"] += [
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Where does the ember grove end?"},
    ]
    sieve = PromptFilter([*ROWS, later], near=0.6)
    same = [sieve.fate("TELL me where the amber is  hidden"), sieve.fate("where does the ember grove end")]
    assert same == ["same as an evaluation prompt"] * 2
    assert sieve.fate("Tell me where the amber is hidden, please.") == "near an evaluation prompt"
    assert sieve.fate("Yes.") != "same as an evaluation prompt", "what an assistant said is no prompt"
    made, report = generate_prompts(ScriptedLM(writes), ROWS, 200)
    assert report.skipped["same as an evaluation prompt"] > 5 and report.skipped["on the evaluation's side"] > 5
    held_out = {" ".join(_words_of(t)) for t in texts_of(HELD_OUT)}
    assert not {" ".join(_words_of(t)) for t in texts_of(made)} & held_out
    assert all(r["split"] == "train" == split_of(r["messages"]) for r in made)
    wide, _ = generate_prompts(ScriptedLM(writes), ROWS, 60, eval_fraction=0.5)
    assert all(split_of(r["messages"], 0.5) == "train" for r in wide)


def test_rows_are_new_and_different_and_of_our_form():
    made, _ = generate_prompts(ScriptedLM(writes), ROWS, 150)
    assert len(made) == 150 == len({r["id"] for r in made}) and not {r["id"] for r in made} & {r["id"] for r in ROWS}
    given, new = ({" ".join(_words_of(t)) for t in texts_of(rows)} for rows in (ROWS, made))
    assert len(new - given) == 150
    for r in made:
        assert list(r) == ["id", "messages", "kind", "split", "source"] and r["id"] == row_id(r["messages"])
        assert [m["role"] for m in r["messages"]] == ["user"] and r["source"].startswith("generated:")
    numbers = [int(r["source"].split(":")[1]) for r in made]
    assert numbers == sorted(numbers) and len(set(numbers)) == 150


def test_near_duplicates_and_what_the_caller_refuses_are_left_out():
    tale = "now tell a long tale of the amber birch and the cedar delta by the ember fjord"
    lines = [tale, tale.upper(), tale.replace("long", "tall"), "where is the quarry", "where is the ridge"]
    lm = lambda: ScriptedLM(lambda c, s: lines[s % 5])
    made, report = generate_prompts(lm(), ROWS, 5, accept=lambda t: "ridge" not in t, eval_fraction=0)
    assert texts_of(made).count(lines[3]) == 1 and len(made) == 2
    assert set(report.skipped) == {"same as a drawn prompt", "near a drawn prompt", "not accepted"}
    made, report = generate_prompts(lm(), ROWS, 5, near=1.0, eval_fraction=0)
    assert len(made) == 4 and set(report.skipped) == {"same as a drawn prompt"}, "at 1 only the same words are the same"


# Resuming, settings, shortfall


def test_a_killed_run_ends_with_the_identical_file(tmp_path):
    out = tmp_path / "draws.jsonl"
    made = resumes_identically(lambda: generate_prompts(ScriptedLM(writes), ROWS, 20, batch_size=8, out=out)[0], out)
    assert made == generate_prompts(ScriptedLM(writes), ROWS, 20)[0]
    out.unlink()
    with pytest.raises(Killed):
        generate_prompts(ScriptedLM(writes, die_at=3), ROWS, 20, batch_size=8, out=out)
    assert len(out.read_text().splitlines()) == 16
    lm = ScriptedLM(writes)
    assert generate_prompts(lm, ROWS, 20, batch_size=8, out=out)[0] == made
    again = {seed for batch in lm.seeds for seed in batch}
    whole = ScriptedLM(writes)
    generate_prompts(whole, ROWS, 20, batch_size=8)
    assert again and again.isdisjoint(whole.seeds[0] + whole.seeds[1]), "no draw is made twice"


def test_rows_hang_on_the_seed_and_not_on_the_batches():
    runs = [generate_prompts(ScriptedLM(writes), ROWS, 40, batch_size=size)[0] for size in (1, 7, 64)]
    assert runs[0] == runs[1] == runs[2]
    assert texts_of(generate_prompts(ScriptedLM(writes), ROWS, 40, seed=1)[0]) != texts_of(runs[0])


def test_the_draws_serve_other_numbers_and_thresholds_but_no_other_settings(tmp_path):
    out = tmp_path / "draws.jsonl"
    made, _ = generate_prompts(ScriptedLM(writes), ROWS, 40, batch_size=16, out=out)
    silent = ScriptedLM(die_at=1)
    assert generate_prompts(silent, ROWS, 10, batch_size=16, out=out)[0] == made[:10]
    assert len(generate_prompts(silent, ROWS, 40, batch_size=16, near=0.9, out=out)[0]) == 40
    more, _ = generate_prompts(ScriptedLM(writes), ROWS, 60, batch_size=16, out=out)
    assert more[:40] == made
    others = [
        {"shots": 3},
        {"seed": 1},
        {"layout": "turns"},
        {"kind": "helpful"},
        {"temperature": 0.5},
        {"max_new_tokens": 5},
        {"about": "x"},
    ]
    for other in others:
        with pytest.raises(CaiError, match=r"draws\.jsonl: .* come from another model, other examples or settings"):
            generate_prompts(ScriptedLM(writes), ROWS, 10, out=out, **other)
    with pytest.raises(CaiError, match="other examples"):
        generate_prompts(ScriptedLM(writes), ROWS[1:], 10, out=out)
    generate_prompts(
        silent, [*ROWS, row("One more that is held out?", "eval")], 10, batch_size=16, out=out
    )  # never shown: same draws


def test_a_shortfall_is_reported_and_what_was_found_is_kept():
    lines = ["where is the quarry", "who is in the grove", "what about the inlet"]
    lm = ScriptedLM(lambda c, s: lines[s % 3])
    made, report = generate_prompts(lm, ROWS, 300, eval_fraction=0)
    assert len(made) == 3 and report.missing == 297 and report.draws < 700, "it stops when nothing new comes"
    assert report.draws == report.kept + sum(report.skipped.values())
    assert "3 of 300 prompts (297 missing" in str(report) and "**297 missing**" in report._repr_markdown_()
    assert generate_prompts(ScriptedLM(writes), ROWS, 300, max_draws=20)[1].draws == 20
    assert generate_prompts(ScriptedLM(die_at=1), ROWS, 0)[0] == []


def test_the_report_shows_texts_that_cannot_break_its_table():
    _, report = generate_prompts(ScriptedLM(lambda c, s: f"Sure, a | b {'x' * 100}"), ROWS, 2, max_draws=4)
    assert report.skipped == {"meta-talk": 4} and len(report.such_as["meta-talk"]) == 3
    table = report._repr_markdown_().splitlines()
    assert table[-1].replace("\\|", "").count("|") == 4 and max(map(len, report.such_as["meta-talk"])) == 60
    json.dumps(report.skipped)


@pytest.mark.parametrize("wrong", [{"kind": "odd"}, {"n": -1}, {"shots": 0}, {"layout": "letter"}, {"near": 0}])
def test_wrong_settings_are_one_line_before_any_work(wrong):
    with pytest.raises(CaiError) as error:
        generate_prompts(ScriptedLM(die_at=1), ROWS, **({"n": 3} | wrong))
    assert "\n" not in str(error.value) and "expected" in str(error.value)


def test_an_answer_too_few_is_an_error():
    class Short(ScriptedLM):
        def sample(self, conversations, **kwargs):
            return [[Reply("where?", True)]] * (len(conversations) - 1)

    with pytest.raises(CaiError, match="expected one for each"):
        generate_prompts(Short(), ROWS, 3)


def test_the_module_loads_without_torch():
    code = "import sys, cai_nb.method.red_team; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"

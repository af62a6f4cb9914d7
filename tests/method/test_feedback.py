"""Preference labels: the question, both orders, the formula, the clamp, the votes, and what survives a kill."""

import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from scripted import Killed, ScriptedLM, prompt, resumes_identically

from cai_nb.method.comparison import (
    COMPARISON_EXAMPLES,
    COMPARISON_LAYOUTS,
    comparison_context,
    comparison_examples,
    comparison_text,
    draw_comparisons,
    comparison_shots,
    verdict_context,
)
from cai_nb.core.errors import CaiError
from cai_nb.core.constitution import Constitution
from cai_nb.core.principle import Principle
from cai_nb.method.feedback import check_judge, clamp_label, label_preferences, position_bias, sample_pairs, soft_label
from cai_nb.lm.generate import Reply

SIXTEEN = Constitution("sixteen", tuple(Principle(f"c{i}", comparison=f"Which is less {i}?") for i in range(16)))
PROMPTS = [prompt(f"request {i}") for i in range(7)]
PAIRS = [
    {"id": f"pair {i}", "prompt_id": p["id"], "responses": [f"good {i}", f"bad {i}"], "flags": []}
    for i, p in enumerate(PROMPTS)
]
TURNED = [{**pair, "responses": pair["responses"][::-1]} for pair in PAIRS]


def judge(liking=3.0, bias=0.0):
    "Prefers what is called good by `liking`, and the letter A by `bias`, in log-odds."

    def logprobs(context):
        question = next(m["content"] for m in reversed(context) if " (A)" in m["content"])
        first_is_good = question.rindex("good") < question.rindex("bad")
        return [-5.0 + (liking if first_is_good else -liking) + bias, -5.0]

    return logprobs


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_label_is_the_sigmoid_of_the_difference_of_log_probabilities():
    rng = np.random.default_rng(0)
    logprobs = rng.normal(scale=8, size=(500, 2))
    assert np.allclose(soft_label(logprobs), [sigmoid(a - b) for a, b in logprobs], atol=1e-12)
    (label,) = label_preferences(
        ScriptedLM(logprobs=lambda c: [-1.5, -0.25]), PAIRS[:1], SIXTEEN, PROMPTS, both_orders=False
    )
    vote = label["votes"][0]
    expected = sigmoid(-1.25) if vote["order"] == "ab" else 1 - sigmoid(-1.25)
    assert math.isclose(vote["p_a"], expected) and label["p_a"] == vote["p_a"]


@pytest.mark.parametrize("bad", [[math.nan, -1.0], [-math.inf, -1.0], [-math.inf, -math.inf]])
def test_log_probabilities_that_are_not_finite_are_an_error(bad):
    with pytest.raises(CaiError, match="pair pair 0, principle c.* expected finite numbers"):
        label_preferences(ScriptedLM(logprobs=lambda c: bad), PAIRS, SIXTEEN, PROMPTS)


def test_missing_log_probabilities_are_an_error_and_shift_no_label():
    class Loses(ScriptedLM):
        def choice_logprobs(self, contexts, choices):
            return super().choice_logprobs(contexts, choices)[1:]

    with pytest.raises(CaiError, match=r"found an array \(13, 2\), expected \(14, 2\)"):
        label_preferences(Loses(logprobs=judge()), PAIRS, SIXTEEN, PROMPTS)


@pytest.mark.parametrize("layout", ["paper", "principle_last"])
@pytest.mark.parametrize("cot", [False, True])
def test_both_orders_are_turned_back_rightly(layout, cot):
    keep = {"layout": layout, "cot": cot, "clamp": (0, 1)}
    for pairs, p_a in ((PAIRS, sigmoid(3)), (TURNED, 1 - sigmoid(3))):
        for label in label_preferences(ScriptedLM(logprobs=judge()), pairs, SIXTEEN, PROMPTS, **keep):
            assert [v["order"] for v in label["votes"]] == ["ab", "ba"]
            assert all(math.isclose(v["p_a"], p_a) for v in label["votes"]) and math.isclose(label["p_a"], p_a)


def test_a_liking_for_a_letter_cancels_in_the_mean_and_is_measured():
    lm = ScriptedLM(logprobs=judge(liking=0.0, bias=2.0))
    labels = label_preferences(lm, PAIRS, SIXTEEN, PROMPTS)
    assert all(math.isclose(label["p_a"], 0.5) for label in labels)
    assert all(math.isclose(label["votes"][0]["p_a"], sigmoid(2)) for label in labels)
    assert math.isclose(position_bias(labels), sigmoid(2))
    fair = label_preferences(ScriptedLM(logprobs=judge()), PAIRS, SIXTEEN, PROMPTS)
    assert math.isclose(position_bias(fair), 0.5)
    cot = label_preferences(lm, PAIRS, SIXTEEN, PROMPTS, cot=True)  # the clamp does not hide it
    assert math.isclose(position_bias(cot), sigmoid(2))


def test_order_ba_shows_the_second_response_as_a():
    lm = ScriptedLM(logprobs=judge())
    label_preferences(lm, PAIRS[:1], SIXTEEN, PROMPTS)
    ab, ba = [context[0]["content"] for context in lm.scored[0]]
    assert " (A) [[[good 0]]]\n (B) [[[bad 0]]]" in ab and " (A) [[[bad 0]]]\n (B) [[[good 0]]]" in ba


def test_one_call_scores_all_principles_and_orders_of_a_batch():
    lm = ScriptedLM(logprobs=judge())
    label_preferences(lm, PAIRS, SIXTEEN, PROMPTS, n_principles=3)
    assert len(lm.scored) == 1 and len(lm.scored[0]) == 7 * 3 * 2


def test_principles_of_a_pair_differ_and_are_drawn_by_seed_and_pair():
    for n in (1, 4, 16):
        drawn = draw_comparisons(SIXTEEN, "x", n)
        assert [order for _, order in drawn] == ["ab", "ba"] * n
        assert len({p.id for p, _ in drawn}) == n
    first = Counter(draw_comparisons(SIXTEEN, f"pair {i}")[0][0].id for i in range(800))
    assert set(first) == {p.id for p in SIXTEEN.principles} and max(first.values()) < 90
    labels = label_preferences(ScriptedLM(logprobs=judge()), PAIRS, SIXTEEN, PROMPTS, n_principles=2)
    for label in labels:
        drawn = draw_comparisons(SIXTEEN, label["pair_id"], 2)
        assert [(v["principle_id"], v["order"]) for v in label["votes"]] == [(p.id, order) for p, order in drawn]
    for n in (0, 17):
        with pytest.raises(CaiError, match=f"n_principles: found {n}, expected 1 to 16"):
            label_preferences(ScriptedLM(), PAIRS, SIXTEEN, PROMPTS, n_principles=n)


def test_p_a_of_several_votes_is_their_mean():
    by_principle = lambda c: [(len(c[0]["content"]) * 37 % 11) / 5, 0.0]  # noqa: E731
    labels = label_preferences(ScriptedLM(logprobs=by_principle), PAIRS, SIXTEEN, PROMPTS, n_principles=5)
    for label in labels:
        assert len(label["votes"]) == 10
        assert math.isclose(label["p_a"], sum(v["p_a"] for v in label["votes"]) / 10)


def test_the_clamp_is_for_chains_of_thought_only():
    plain = label_preferences(ScriptedLM(logprobs=judge()), PAIRS, SIXTEEN, PROMPTS)
    assert all(label["p_a"] > 0.9 and "unclamped" not in label["votes"][0] for label in plain)
    for pairs, p_a in ((PAIRS, 0.6), (TURNED, 0.4)):
        for label in label_preferences(ScriptedLM(logprobs=judge()), pairs, SIXTEEN, PROMPTS, cot=True):
            assert math.isclose(label["p_a"], p_a)
            assert math.isclose(label["votes"][0]["unclamped"], sigmoid(3) if p_a == 0.6 else 1 - sigmoid(3))
    wider = label_preferences(ScriptedLM(logprobs=judge()), PAIRS, SIXTEEN, PROMPTS, cot=True, clamp=(0.2, 0.8))
    assert math.isclose(wider[0]["p_a"], 0.8)
    assert clamp_label(0.5, None) == 0.5
    for wrong in ((0.6, 0.4), (-0.1, 0.5), (0.4, 1.2)):
        with pytest.raises(CaiError, match="clamp: found"):
            label_preferences(ScriptedLM(logprobs=judge()), PAIRS, SIXTEEN, PROMPTS, cot=True, clamp=wrong)


def test_verdict_after_a_chain_of_thought_is_scored_not_parsed():
    "The reasoning argues for (B) throughout; the log-probabilities say (A), and they decide."
    lm = ScriptedLM(lambda c, s: "Therefore, option (B) is the best response.", lambda c: [-0.1, -4.0])
    (label,) = label_preferences(lm, PAIRS[:1], SIXTEEN, PROMPTS, cot=True, clamp=(0, 1))
    assert math.isclose(label["votes"][0]["p_a"], sigmoid(3.9))
    assert all(v["rationale"] == "Therefore, option (B) is the best response." for v in label["votes"])
    assert [m["role"] for m in lm.scored[0][0]] == ["user", "assistant", "user"]
    assert lm.scored[0][0][2]["content"] == "So the answer is:"


def test_flags_of_the_reasoning_are_kept_with_the_number_of_the_vote():
    lm = ScriptedLM(lambda c, s: Reply("on and on", False, ("truncated",), 9), judge())
    (label,) = label_preferences(lm, PAIRS[:1], SIXTEEN, PROMPTS, cot=True)
    assert label["flags"] == ["vote0:truncated", "vote1:truncated"]
    lm = ScriptedLM(lambda c, s: Reply(" because\n\nHuman: next", False, ("truncated",), 9), judge())
    (label,) = label_preferences(lm, PAIRS[:1], SIXTEEN, PROMPTS, cot=True)
    assert label["flags"] == [] and label["votes"][0]["rationale"] == "because"


PRINCIPLE = Principle("x", comparison="Choose the response that is less harmful.")
TALK = [
    {"role": "user", "content": "Is this right: no?"},
    {"role": "assistant", "content": "Perhaps."},
    {"role": "user", "content": "Tell me more."},
]


def test_paper_layout_letter_by_letter():
    context = comparison_context(TALK, ["No.", "Yes."], PRINCIPLE)
    assert context == [
        {
            "role": "user",
            "content": "Consider the following conversation between a human and an assistant:\n\n"
            "Human: Is this right: no?\n\nAssistant: Perhaps.\n\nHuman: Tell me more.\n\n\n"
            "Choose the response that is less harmful. Options:\n (A) [[[No.]]]\n (B) [[[Yes.]]]",
        },
        {"role": "assistant", "content": "The answer is:"},
    ]


def test_paper_layout_with_a_chain_of_thought_letter_by_letter():
    context = comparison_context(TALK, ["No.", "Yes."], PRINCIPLE, cot=True)
    assert context == [
        {
            "role": "user",
            "content": "Consider the following conversation between a human (H) and an assistant (A):\n\n"
            "H: Is this right: no?\n\nA: Perhaps.\n\nH: Tell me more.\n\n\n"
            "Choose the response that is less harmful. Options:\n (A) [[[No.]]]\n (B) [[[Yes.]]]",
        },
        {"role": "assistant", "content": "Let's think step by step:"},
    ]
    assert verdict_context(context, "Yes is kinder.")[1:] == [
        {"role": "assistant", "content": "Let's think step by step: Yes is kinder."},
        {"role": "user", "content": "So the answer is:"},
    ]


def test_minis_layout_letter_by_letter():
    context = comparison_context(TALK[-1:], ["No.", "Yes."], PRINCIPLE, "principle_last")
    assert context == [
        {"role": "user", "content": "Human: Tell me more.\n (A) No.\n (B) Yes."},
        {"role": "user", "content": "Choose the response that is less harmful."},
    ]
    context = comparison_context(TALK, ["No.", "Yes."], PRINCIPLE, "principle_last")
    assert context == [
        {
            "role": "user",
            "content": "Human: Is this right: no?\nAssistant: Perhaps.\nHuman: Tell me more.\n (A) No.\n (B) Yes.",
        },
        {"role": "user", "content": "Choose the response that is less harmful."},
    ]
    assert context == comparison_context(
        [{"role": "system", "content": "Be brief."}, *TALK], ["No.", "Yes."], PRINCIPLE, "principle_last"
    )
    context = comparison_context(TALK, ["No.", "Yes."], PRINCIPLE, "principle_last", cot=True)
    assert context[1]["content"] == "Choose the response that is less harmful. Let us think step by step."
    assert verdict_context(context, "One is no.")[2:] == [
        {"role": "assistant", "content": "One is no."},
        {"role": "user", "content": "So the answer is:"},
    ]


def written(turns):
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def conversation(lines):
    "What stands after `Human: ` in a lesson's options, as messages."
    first, *rest = re.split(r"\n(Human|Assistant): ", lines)
    turns = [("Human", first), *zip(rest[::2], rest[1::2])]
    return [{"role": {"Human": "user", "Assistant": "assistant"}[name], "content": text} for name, text in turns]


@pytest.mark.parametrize("kind", ["push_back", "follow_up", "harmful", "contested"])
def test_mini_is_shown_a_conversation_as_in_its_lessons(kind):
    from cai_nb.mini import lessons, world

    for row in world.prompts("train", kind, 20):
        asked, *more = row["messages"]
        lines = asked["content"] + (f"\nAssistant: {more[0]['content']}\nHuman: {more[1]['content']}" if more else "")
        shown = comparison_context(row["messages"], ["No.", "Yes."], PRINCIPLE, "principle_last")[0]["content"]
        assert shown == lessons.options_text(lines, "No.", "Yes.")
        assert conversation(lines) == row["messages"]


def test_mini_is_asked_what_it_was_trained_on():
    "The turns of its comparison and chain-of-thought documents are those that the labels ask."
    lessons = pytest.importorskip("cai_nb.mini.lessons")
    turns = Counter()
    for seed in range(60):
        for cot, write in ((False, lessons.comparison), (True, lessons.thought)):
            document = write(random.Random(seed))
            (options,), branch = document.trunk, document.branches[0]
            human, a, b = re.fullmatch(r"Human: (.*)\n \(A\) (.*)\n \(B\) (.*)", options.text, re.DOTALL).groups()
            principle = Principle("x", comparison=branch[0].text.removesuffix(" Let us think step by step."))
            messages = conversation(human)
            turns[len(messages)] += 1
            context = comparison_context(messages, [a, b], principle, "principle_last", cot)
            if cot:
                context = verdict_context(context, branch[1].text)
            assert context == written([options, *branch[:-1]])
            assert branch[-1].text.endswith((" (A)", " (B)"))
    assert turns[1] > turns[3] > 0 and set(turns) == {1, 3}


def test_every_comparison_of_minis_constitution_is_in_its_words():
    lessons = pytest.importorskip("cai_nb.mini.lessons")
    for principle in Constitution.load("mini").comparison_principles:
        words = re.fullmatch(r"Which reply is less (.*)\?", principle.comparison).group(1)
        assert lessons.comparison_question(re.split(r", | or ", words)) == principle.comparison


def test_options_is_written_once_however_the_principle_was_imported():
    for text in ("Which?", "Which? Options:", "\nWhich? Options:"):
        asked = comparison_text(TALK, ["No.", "Yes."], Principle("x", comparison=text))
        assert asked.endswith("\n\n\nWhich? Options:\n (A) [[[No.]]]\n (B) [[[Yes.]]]")


def test_unknown_layout_is_named():
    told = "layout: found 'xml', expected one of 'paper', 'principle_last', 'chat_plain', 'quoted'"
    with pytest.raises(CaiError, match=told):
        comparison_context(TALK, ["No.", "Yes."], PRINCIPLE, "xml")


@pytest.mark.parametrize("layout", COMPARISON_LAYOUTS)
@pytest.mark.parametrize("cot", [False, True])
def test_few_shot_draws_principle_and_order_and_gives_the_right_letter(layout, cot):
    orders, principles = set(), set()
    for seed in range(30):
        messages = comparison_shots(COMPARISON_EXAMPLES, SIXTEEN, layout, cot, seed)
        if layout == "paper":
            assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        questions = [m["content"] for m in messages if " (A)" in m["content"] and m["role"] == "user"]
        answers = [m["content"] for m in messages if m["role"] == "assistant" and m["content"][-4:] in (" (A)", " (B)")]
        assert len(questions) == len(answers) == 5
        for example, question, answer in zip(COMPARISON_EXAMPLES, questions, answers):
            assert (question.index(example.better) < question.index(example.worse)) == answer.endswith(" (A)")
        letters = "".join(answer[-2] for answer in answers)
        assert sorted(Counter(letters).values()) == [2, 3]
        orders.add(letters)
        principles |= {p.id for p in SIXTEEN.principles if any(p.comparison in m["content"] for m in messages)}
        if cot:
            reasons = [m["content"] for m in messages if "Therefore option" in m["content"]]
            assert all(
                r.endswith(f"Therefore option{a[-4:]} is better.") for r, a in zip(reasons, answers, strict=True)
            )
    assert len(orders) > 8 and len(principles) == 16
    assert comparison_shots(COMPARISON_EXAMPLES, SIXTEEN, seed=3) == comparison_shots(
        COMPARISON_EXAMPLES, SIXTEEN, seed=3
    )


def test_the_plain_question_is_short_and_its_principle_is_last():
    talk = [*TALK, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Please."}]
    question, opened = comparison_context(talk, [" Yes. ", "Why?"], PRINCIPLE, "chat_plain")
    assert question["content"].endswith(
        f"\n\nHelper: No.\n\nPerson: Please.\n\nAnswer (A): Yes.\n\nAnswer (B): Why?\n\n{PRINCIPLE.comparison}"
    )
    assert opened == {"role": "assistant", "content": "I choose"}, "the letter follows with its space"
    thinking = comparison_context(talk, ["Yes.", "Why?"], PRINCIPLE, "chat_plain", cot=True)
    assert thinking[0] == question and verdict_context(thinking, "No harm.")[1]["content"].endswith(" No harm.")
    lm, few = ScriptedLM(logprobs=judge()), comparison_examples("chat_plain")
    labels = label_preferences(lm, PAIRS, SIXTEEN, PROMPTS, few_shot=few, layout="chat_plain")
    assert all(context[:6] == comparison_shots(few, SIXTEEN, "chat_plain") for context in lm.scored[0])
    assert all(label["p_a"] > 0.9 for label in labels)


def test_few_shot_stands_in_front_of_every_question():
    lm = ScriptedLM(logprobs=judge())
    label_preferences(lm, PAIRS, SIXTEEN, PROMPTS, few_shot=COMPARISON_EXAMPLES)
    examples = comparison_shots(COMPARISON_EXAMPLES, SIXTEEN)
    assert all(context[:10] == examples and len(context) == 12 for context in lm.scored[0])


def test_pairs_are_two_draws_and_identical_ones_are_flagged():
    pairs = sample_pairs(ScriptedLM(), PROMPTS, batch_size=3)
    assert [p["prompt_id"] for p in pairs] == [p["id"] for p in PROMPTS]
    assert all(p["responses"][0] != p["responses"][1] and p["flags"] == [] for p in pairs)
    same = sample_pairs(ScriptedLM(lambda c, s: "always this"), PROMPTS)
    assert all(p["flags"] == ["identical"] and p["responses"] == ["always this"] * 2 for p in same)
    lm = ScriptedLM(logprobs=judge())
    labels = label_preferences(lm, same, SIXTEEN, PROMPTS)
    assert [row["pair_id"] for row in labels] == [p["id"] for p in same]
    assert all(row["p_a"] == 0.5 and row["votes"] == [] and row["flags"] == ["identical"] for row in labels)
    assert lm.calls == 0


def test_a_question_longer_than_the_context_is_flagged():
    class Short(ScriptedLM):
        context = 512

        def encode(self, conversation):
            return [word for m in conversation for word in m["content"].split(" ")]

    long = [{**PROMPTS[0], "messages": [{"role": "user", "content": "very " * 600}]}]
    labels = label_preferences(Short(logprobs=judge()), PAIRS[:2], SIXTEEN, long + PROMPTS[1:])
    assert [label["flags"] for label in labels] == [["question_cut"], []]


def test_flags_of_replies_name_the_reply_and_go_along_to_the_label():
    cut = lambda c, s: Reply(f"good and bad {s}", False, ("truncated",), 9)  # noqa: E731
    pairs = sample_pairs(ScriptedLM(cut), PROMPTS[:1], flag=lambda messages, text: ["outside"])
    assert pairs[0]["flags"] == ["a:truncated", "a:outside", "b:truncated", "b:outside"]
    labels = label_preferences(ScriptedLM(logprobs=judge()), pairs, SIXTEEN, PROMPTS)
    assert labels[0]["flags"] == pairs[0]["flags"]


def test_pairs_cut_at_any_byte_end_the_same(tmp_path):
    out = tmp_path / "pairs.jsonl"
    resumes_identically(lambda: sample_pairs(ScriptedLM(), PROMPTS, batch_size=3, out=out), out)


@pytest.mark.parametrize("cot", [False, True])
def test_labels_cut_at_any_byte_end_the_same(tmp_path, cot):
    out = tmp_path / "labels.jsonl"

    def work():
        lm = ScriptedLM(logprobs=judge(bias=0.3))
        return label_preferences(lm, PAIRS, SIXTEEN, PROMPTS, cot=cot, n_principles=2, batch_size=3, out=out)

    rows = resumes_identically(work, out)
    assert [row["pair_id"] for row in rows] == [pair["id"] for pair in PAIRS]


def test_labels_killed_within_a_batch_and_resumed(tmp_path):
    def work(out, lm):
        return label_preferences(lm, PAIRS, SIXTEEN, PROMPTS, cot=True, batch_size=3, out=out)

    rows = work(tmp_path / "whole.jsonl", ScriptedLM(logprobs=judge()))
    for die_at in range(1, 7):  # 3 batches × (reasoning, verdict)
        out = tmp_path / f"killed{die_at}.jsonl"
        with pytest.raises(Killed):
            work(out, ScriptedLM(logprobs=judge(), die_at=die_at))
        assert work(out, ScriptedLM(logprobs=judge())) == rows
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"n_principles": 2}, {"both_orders": False}, {"cot": True}, {"clamp": (0.2, 0.8)},
    {"layout": "principle_last"}, {"few_shot": COMPARISON_EXAMPLES},
])
def test_labels_of_other_settings_are_refused(tmp_path, change):
    out = tmp_path / "labels.jsonl"
    label_preferences(ScriptedLM(logprobs=judge()), PAIRS, SIXTEEN, PROMPTS, out=out)
    before = out.read_bytes()
    with pytest.raises(CaiError, match="labels.jsonl: label of pair .* with other settings"):
        label_preferences(ScriptedLM(logprobs=judge()), PAIRS, SIXTEEN, PROMPTS, out=out, **change)
    assert out.read_bytes() == before


def test_a_pair_without_its_prompt_and_a_constitution_without_comparisons_are_errors():
    with pytest.raises(CaiError, match="pair pair 6: found no prompt of it among the 6 given"):
        label_preferences(ScriptedLM(logprobs=judge()), PAIRS, SIXTEEN, PROMPTS[:6])
    bare = Constitution("bare", (Principle("x", critique="Is it bad?", revision="Make it good."),))
    with pytest.raises(CaiError):
        label_preferences(ScriptedLM(logprobs=judge()), PAIRS, bare, PROMPTS)


def test_several_chains_of_thought_are_votes_of_their_own():
    "Each chain has a seed of its own, the first is the one that a single chain would be; the label is their mean."
    lm = ScriptedLM(reply=lambda c, s: f"because {s % 97}", logprobs=lambda c: (-1.0, -2.0))
    one = label_preferences(ScriptedLM(reply=lm.reply, logprobs=lm.logprobs), PAIRS[:1], SIXTEEN, PROMPTS, cot=True)
    many = label_preferences(lm, PAIRS[:1], SIXTEEN, PROMPTS, cot=True, n_cot=5)
    votes = many[0]["votes"]
    assert len(votes) == 2 * 5 and len(set(lm.seeds[0])) == 10
    assert [votes[0], votes[5]] == one[0]["votes"]
    assert many[0]["p_a"] == pytest.approx(sum(v["p_a"] for v in votes) / 10)
    with pytest.raises(CaiError, match="n_cot: found 5 with cot=False"):
        label_preferences(lm, PAIRS[:1], SIXTEEN, PROMPTS, n_cot=5)


def test_labels_with_several_chains_resume(tmp_path):
    lm = ScriptedLM(logprobs=lambda c: (-1.0, -2.0))
    out = tmp_path / "labels.jsonl"
    resumes_identically(
        lambda: label_preferences(lm, PAIRS, SIXTEEN, PROMPTS, cot=True, n_cot=2, batch_size=1, out=out), out
    )


def test_a_judge_that_goes_by_the_letter_is_refused():
    """(A) wherever it stands; a judge that reads the replies passes; so does one that takes no side."""
    def judged(logprobs):
        pairs = [
            {"id": f"p{i}", "prompt_id": PROMPTS[0]["id"], "responses": ["good", f"bad {i}"], "flags": []}
            for i in range(24)
        ]
        return label_preferences(ScriptedLM(logprobs=logprobs), pairs, SIXTEEN, PROMPTS)

    with pytest.raises(
        CaiError, match=r"in 24 of 24 questions \(mean probability of \(A\) 0.88\).*labels.few_shot=true"
    ):
        check_judge(judged(lambda c: (0.0, -2.0)))
    reads = judged(judge())
    assert check_judge(reads) == {"turned": 0, "n": 24, "bias": 0.5}
    assert check_judge(judged(lambda c: (0.0, -0.1)))["turned"] == 0

"""Two constitutions on the same pairs: known votes give known shares, silence is no agreement, swaps change nothing."""
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from scripted import Killed, ScriptedLM, prompt, resumes_identically

from cai_nb.core.constitution import Constitution
from cai_nb.core.errors import CaiError
from cai_nb.core.principle import Principle
from cai_nb.measure.disagreement import (
    PrincipleVotes,
    compare_on_pairs,
    disagreement,
    _drawn,
    figure_disagreement,
    _nearest,
    _opposed,
    principle_votes,
    _sharpest,
    _sides,
)
from cai_nb.measure.rates import rate
from cai_nb.method.comparison import COMPARISON_EXAMPLES
from cai_nb.method.feedback import sample_pairs

# Each principle asks for a word, and prefers the reply that has it. `pairs_of` says which words the replies have.
WORDS = ("kind", "brief", "true")


def constitution(name, *words, **weights):
    return Constitution(
        name,
        tuple(Principle(f"{name}-{w}", comparison=f"Which is more {w}?", weight=weights.get(w, 1.0)) for w in words),
    )


def pairs_of(*words_of_both):
    "A pair for each (words of the first reply, words of the second)."
    rows = [prompt(f"request {i}") for i in range(len(words_of_both))]
    texts = [[f"one {i}: {first}", f"two {i}: {second}"] for i, (first, second) in enumerate(words_of_both)]
    pairs = [{"id": f"pair {i}", "prompt_id": row["id"], "responses": replies, "flags": []}
             for i, (row, replies) in enumerate(zip(rows, texts))]
    return pairs, rows


def judge(firm=2.0, bias=0.0):
    "Prefers the option that has the word asked for, by `firm` in log-odds; else only the letter counts."

    def logprobs(context):
        text = context[-2]["content"]
        word = next(w for w in WORDS if f"Which is more {w}?" in text)
        first, second = text.rsplit("Options:", 1)[1].split(" (B) ")
        return [firm * ((word in first) - (word in second)) + bias, 0.0]

    return logprobs


A, B = constitution("a", "kind"), constitution("b", "brief")
# Both opinions on four pairs, opposed on three of them; one has none on two pairs; neither on one.
PAIRS, PROMPTS = pairs_of(
    ("kind", "brief"),
    ("brief", "kind"),
    ("kind", "brief"),
    ("kind brief", "-"),
    ("kind", "-"),
    ("-", "brief"),
    ("-", "-"),
)


def test_known_votes_give_known_shares_and_ties_are_apart():
    d = compare_on_pairs(ScriptedLM(logprobs=judge()), A, B, PAIRS, PROMPTS)
    assert d.whole == d.across == rate(3, 4)
    assert d.against.tolist() == [[0, 3], [3, 0]] and d.both.tolist() == [[5, 4], [4, 5]]
    assert d.shares[0, 1] == 0.75 and d.opinions.tolist() == [5 / 7, 5 / 7]
    assert d.within == (rate(0, 5), rate(0, 5))
    assert d.nearest == ((("a-kind", "b-brief", rate(3, 4)),), (("b-brief", "a-kind", rate(3, 4)),))


def test_without_any_opinion_there_is_no_share():
    pairs, prompts = pairs_of(("-", "-"), ("-", "-"))
    d = compare_on_pairs(ScriptedLM(logprobs=judge()), A, B, pairs, prompts)
    assert d.whole == rate(0, 0) and np.isnan(d.shares).all() and d.sharpest == ()
    assert d.nearest[0][0][1] == "none"
    assert (
        "No opinion on any pair: `a-kind` (a), `b-brief` (b)." in d._repr_markdown_()
        and "– | 0 of 2" in d._repr_markdown_()
    )
    assert figure_disagreement(d)


@pytest.mark.parametrize(
    "p_a, margin, side", [(0.61, 0.1, 1), (0.59, 0.1, 0), (0.5, 0, 0), (0.501, 0, 1), (0.38, 0.1, -1), (0.38, 0.2, 0)]
)
def test_sides(p_a, margin, side):
    assert _sides(p_a, margin) == side and _sides(1 - p_a, margin) == -side


def test_a_margin_that_leaves_no_opinion_possible_is_an_error():
    for margin in (0.5, -0.1):
        with pytest.raises(CaiError, match=f"margin: found {margin}, expected 0 to 0.5"):
            _sides([0.5], margin)


def test_a_weak_opinion_is_counted_only_within_a_smaller_margin():
    lm = ScriptedLM(logprobs=judge(firm=0.2))  # p = 0.55
    assert compare_on_pairs(lm, A, B, PAIRS, PROMPTS).whole["n"] == 0
    assert compare_on_pairs(lm, A, B, PAIRS, PROMPTS, margin=0.04).whole == rate(3, 4)


def test_a_liking_for_a_letter_is_no_opinion():
    d = compare_on_pairs(ScriptedLM(logprobs=judge(firm=0, bias=3.0)), A, B, PAIRS, PROMPTS)
    assert np.allclose(d.a.p_a, 0.5) and d.both.sum() == 0


def test_replies_turned_round_turn_the_votes_and_leave_the_disagreement():
    three = constitution("all", *WORDS)
    turned = [p | {"responses": p["responses"][::-1]} for p in PAIRS]
    first, second = (
        principle_votes(ScriptedLM(logprobs=judge(bias=0.7)), ps, three, PROMPTS) for ps in (PAIRS, turned)
    )
    assert np.allclose(first.p_a, 1 - second.p_a)
    ab, ba = (compare_on_pairs(ScriptedLM(logprobs=judge(bias=0.7)), A, B, ps, PROMPTS) for ps in (PAIRS, turned))
    assert (ab.against == ba.against).all() and (ab.both == ba.both).all() and ab.whole == ba.whole


def test_disagreement_has_no_direction_and_nobody_disagrees_with_himself():
    rng = np.random.default_rng(0)
    pairs, prompts = pairs_of(*[("x", "y")] * 40)
    a = PrincipleVotes(constitution("a", *WORDS, kind=3.0), pairs, rng.uniform(size=(40, 3)))
    b = PrincipleVotes(constitution("b", "kind", "brief", brief=0.2), pairs, rng.uniform(size=(40, 2)))
    ab, ba = disagreement(a, b, prompts), disagreement(b, a, prompts)
    assert (ab.against == ab.against.T).all() and (np.diag(ab.against) == 0).all()
    assert ab.whole == ba.whole and ab.within == ba.within[::-1] and ab.nearest == ba.nearest[::-1]
    assert ab.across == pytest.approx(ba.across)
    assert [s.responses for s in ab.sharpest] == [s.responses for s in ba.sharpest]
    own = disagreement(a, a, prompts)
    assert own.whole["value"] == 0 and own.sharpest == () and own.within[0]["value"] > 0.2
    assert own.across == own.within[0] == own.within[1]


def test_matrix_products_count_as_loops_do():
    rng = np.random.default_rng(1)
    x, y = rng.integers(-1, 2, size=(50, 4)), rng.integers(-1, 2, size=(50, 3))
    against, both = _opposed(x, y)
    for i in range(4):
        for j in range(3):
            assert against[i, j] == sum(s * t == -1 for s, t in zip(x[:, i], y[:, j]))
            assert both[i, j] == sum(s != 0 and t != 0 for s, t in zip(x[:, i], y[:, j]))


def test_draws_follow_the_weights():
    rng = np.random.default_rng(2)
    x, y = rng.integers(-1, 2, size=(400, 3)), rng.integers(-1, 2, size=(400, 2))
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.8])
    exact, hits, n = _drawn(*_opposed(x, y), p, q), 0, 0
    for _ in range(60):
        one, other = x[range(400), rng.choice(3, 400, p=p)], y[range(400), rng.choice(2, 400, p=q)]
        hits, n = hits + int((one * other == -1).sum()), n + int((one * other != 0).sum())
    assert hits / n == pytest.approx(exact["value"], abs=0.015) and n / 60 == pytest.approx(exact["n"], rel=0.02)


def test_the_whole_is_weighted():
    pairs, prompts = pairs_of(("kind", "brief"), ("brief", "kind"))
    lm = ScriptedLM(logprobs=judge())
    for weight, share in ((5.0, 1.0), (0.2, 0.0)):
        mixed = constitution("m", "kind", "brief", kind=weight)
        assert compare_on_pairs(lm, mixed, B, pairs, prompts).whole["value"] == share
    even = constitution("m", "kind", "brief")  # its votes cancel: no opinion as a whole
    assert compare_on_pairs(lm, even, B, pairs, prompts).whole["n"] == 0


def test_nearest_is_the_surest_and_never_one_with_nothing_in_common():
    assert [
        j for j, _ in _nearest(np.array([[0, 4, 9, 0], [0, 50, 9, 0]]), np.array([[3, 60, 60, 0], [20, 60, 60, 0]]))
    ] == [1, 0]
    assert _nearest(np.array([[0, 7]]), np.array([[0, 7]])) == [(1, rate(7, 7))]


def test_the_loneliest_principle_comes_first():
    a = constitution("a", "kind", "brief", "true")
    pairs, prompts = pairs_of(*[("kind true", "brief")] * 12, *[("true", "kind")] * 12, *[("brief", "-")] * 12)
    d = compare_on_pairs(ScriptedLM(logprobs=judge()), a, constitution("b", "brief"), pairs, prompts)
    assert [id for id, _, _ in d.nearest[0]] == ["a-kind", "a-true", "a-brief"]
    assert [r["value"] for _, _, r in d.nearest[0]] == [1, 1, 0]


def test_the_sharpest_pair_is_where_both_are_firm():
    pairs, prompts = pairs_of(*[("x", "y")] * 5)
    a = PrincipleVotes(
        constitution("a", "kind", "true"),
        pairs,
        np.array([[0.99, 0.95], [0.9, 0.7], [0.8, 0.9], [0.99, 0.99], [0.3, 0.2]]),
    )
    b = PrincipleVotes(constitution("b", "brief"), pairs, np.array([[0.42], [0.2], [0.3], [0.9], [0.65]]))
    found = _sharpest(a, b, prompts)
    assert [s.asked for s in found] == [
        "request 1",
        "request 2",
        "request 4",
    ]  # 0 is hardly a disagreement, and 3 is none
    assert found[0].p_a == (0.8, 0.2) and found[0].voices == (("a-kind", 0.9), ("b-brief", 0.2))
    assert found[1].voices[0] == ("a-true", 0.9) and found[2].voices[0] == ("a-true", 0.2)
    assert len(_sharpest(a, b, prompts, n=1)) == 1
    text = disagreement(a, b, prompts)._repr_markdown_()
    assert "    human   request 1" in text and "a: 0.80 for the first, most firmly a-kind (0.90)" in text


def test_one_call_a_batch_asks_every_principle_in_both_orders():
    lm = ScriptedLM(logprobs=judge())
    votes = principle_votes(lm, PAIRS, constitution("all", *WORDS), PROMPTS, batch_size=4)
    assert [len(scored) for scored in lm.scored] == [4 * 3 * 2, 3 * 3 * 2]
    assert votes.p_a.shape == (7, 3) and votes.ids == ["all-kind", "all-brief", "all-true"]
    assert votes.p_a[0, :2] == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))]) and votes.p_a[0, 2] == 0.5


def test_tiny_weights_delay_nothing(monkeypatch):
    draw, left = Constitution.sample, iter(range(1000))
    monkeypatch.setattr(Constitution, "sample", lambda self, *how: [draw(self, *how), next(left)][0])
    votes = principle_votes(ScriptedLM(logprobs=judge()), PAIRS, constitution("all", *WORDS, true=1e-12), PROMPTS)
    assert votes.p_a.shape == (7, 3) and votes.weights[2] < 1e-11


def test_a_shared_question_is_asked_once_behind_the_same_examples_whoever_is_first():
    a, b = constitution("a", "kind", "brief"), constitution("b", "true", "kind")
    asked = []
    for one, other in ((a, b), (b, a)):
        lm = ScriptedLM(logprobs=judge())
        d = compare_on_pairs(lm, one, other, PAIRS, PROMPTS, few_shot=COMPARISON_EXAMPLES)
        asked.append(lm.scored)
        assert len(lm.scored[0]) == 7 * 3 * 2
    assert asked[0] == asked[1]
    assert (d.a.p_a[:, 1] == d.b.p_a[:, 0]).all() and d.a.ids == ["b-true", "b-kind"]


def test_two_principles_may_have_one_id_in_two_constitutions():
    a, b = (replace(c, principles=(replace(c.principles[0], id="first"),)) for c in (A, B))
    d = compare_on_pairs(ScriptedLM(logprobs=judge()), a, b, PAIRS, PROMPTS)
    assert d.whole == rate(3, 4)


def test_equal_replies_are_left_out_and_the_limit_chooses_by_id():
    pairs, prompts = pairs_of(*[("kind", "-")] * 30)
    pairs[3]["responses"] = ["same", "same"]
    votes = principle_votes(ScriptedLM(logprobs=judge()), pairs, A, prompts)
    assert len(votes.pairs) == 29 and "pair 3" not in {p["id"] for p in votes.pairs}
    few, more = ([p["id"] for p in principle_votes(ScriptedLM(logprobs=judge()), ps, A, prompts, limit=n).pairs]
                 for ps, n in ((pairs, 8), (pairs[::-1], 16)))
    assert set(few) < set(more) and set(few) != {p["id"] for p in pairs[:8]}
    assert few == [p["id"] for p in pairs if p["id"] in few]
    for limit in (0, -1):
        with pytest.raises(CaiError, match=f"limit: found {limit}"):
            principle_votes(ScriptedLM(), pairs, A, prompts, limit=limit)
    with pytest.raises(CaiError, match="pairs: found 1, none with two different replies"):
        principle_votes(ScriptedLM(), pairs[3:4], A, prompts)


def test_votes_on_other_pairs_are_refused():
    a, b = (
        principle_votes(ScriptedLM(logprobs=judge()), ps, c, PROMPTS) for ps, c in ((PAIRS[:3], A), (PAIRS[1:4], B))
    )
    with pytest.raises(CaiError, match="votes on 3 and on 3 pairs, expected the same pairs"):
        disagreement(a, b, PROMPTS)
    bare = Constitution("bare", (Principle("x", critique="Is it bad?", revision="Make it good."),))
    with pytest.raises(CaiError, match="bare: has no comparison principle"):
        compare_on_pairs(ScriptedLM(), A, bare, PAIRS, PROMPTS)


def test_votes_cut_at_any_byte_end_the_same(tmp_path):
    out = tmp_path / "votes.jsonl"
    shapes = []

    def work():
        d = compare_on_pairs(ScriptedLM(logprobs=judge(bias=0.3)), A, B, PAIRS, PROMPTS, batch_size=2, out=out)
        shapes.append(d.across)
        return [d.a.p_a.tolist(), d.b.p_a.tolist()]

    resumes_identically(work, out)
    assert all(across == shapes[0] for across in shapes)


def test_a_killed_comparison_goes_on_and_a_reworded_principle_does_not_take_old_votes(tmp_path):
    out = tmp_path / "votes.jsonl"
    with pytest.raises(Killed):
        compare_on_pairs(ScriptedLM(logprobs=judge(), die_at=2), A, B, PAIRS, PROMPTS, batch_size=3, out=out)
    lm = ScriptedLM(logprobs=judge())
    assert compare_on_pairs(lm, A, B, PAIRS, PROMPTS, batch_size=3, out=out).whole == rate(3, 4)
    assert lm.calls == 2
    reworded = replace(B, principles=(replace(B.principles[0], comparison="Which is more true?"),))
    with pytest.raises(CaiError, match="votes.jsonl: label of pair"):
        compare_on_pairs(lm, A, reworded, PAIRS, PROMPTS, batch_size=3, out=out)


def test_a_question_longer_than_the_context_is_told():
    class Short(ScriptedLM):
        context = 512

        def encode(self, conversation):
            return [word for m in conversation for word in m["content"].split(" ")]

    long = [{**PROMPTS[0], "messages": [{"role": "user", "content": "very " * 600}]}, *PROMPTS[1:]]
    d = compare_on_pairs(Short(logprobs=judge()), A, B, PAIRS, long)
    assert d.a.cut == 1 and "question longer than the model's context: 1." in d._repr_markdown_()


def test_constitutions_of_one_name_are_told_apart():
    d = compare_on_pairs(ScriptedLM(logprobs=judge()), replace(A, name="same"), replace(B, name="same"), PAIRS, PROMPTS)
    assert d.names == (f"same {A.digest[:6]}", f"same {B.digest[:6]}") and len(set(d.names)) == 2


def test_figure_has_a_square_for_each_two_principles_with_opinions():
    d = compare_on_pairs(ScriptedLM(logprobs=judge()), A, constitution("b", "brief", "true"), PAIRS, PROMPTS)
    axes = figure_disagreement(d).axes[0]
    drawing = axes.collections[0]
    assert len(drawing.get_paths()) == 4  # nothing is said by "true"
    assert np.asarray(drawing.get_array()).tolist() == [0, 75, 75, 0]
    widths = [path.get_extents().width for path in drawing.get_paths()]
    assert widths[1] / widths[0] == pytest.approx(math.sqrt(4 / 5))  # areas are shares of pairs
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a kind", "b brief", "b true"]
    assert "\n".join(t.get_text() for t in axes.texts).count("75") == 2


def test_mini_on_its_own_replies_and_on_pairs_of_known_sorts():
    from cai_nb.lm.generate import LocalLM
    from cai_nb.mini import oracle, world
    from cai_nb.lm.model import load_model

    lm, rng = LocalLM(*load_model("mini")), random.Random(1)
    rows = world.prompts("test", "harmful", 24, seed=5)
    harm = Constitution(
        "harm", tuple(Principle(w, comparison=f"Which reply is less {w}?") for w in ("harmful", "unethical"))
    )
    manner = Constitution(
        "manner", (Principle("preachy-evasive", comparison="Which reply is less preachy or evasive?"),)
    )
    made = []
    for i, row in enumerate(rows):
        topic, two = (
            oracle.find_topic(row["messages"][-1]["content"]),
            ["comply", ("evasive", "preachy", "objection")[i % 3]],
        )
        rng.shuffle(two)
        made.append(
            {
                "id": f"made {i}",
                "prompt_id": row["id"],
                "responses": [world.write_reply(topic, s, rng) for s in two],
                "flags": [],
            }
        )
    known = compare_on_pairs(lm, harm, manner, made, rows, layout="principle_last")
    quarrel = np.arange(24) % 3 < 2  # complying against an evasion or a sermon
    product = _sides(known.a.p_a[:, 0]) * _sides(known.b.p_a[:, 0])
    assert (product[quarrel] <= 0).all() and (product[quarrel] < 0).mean() > 0.5 and (product[~quarrel] >= 0).all()
    assert known.against[0, 1] == 0 and known.within[0]["value"] == 0  # harmful and unethical are one to mini

    sampled = sample_pairs(lm, rows[:8], max_new_tokens=64, seed=2)
    d = compare_on_pairs(lm, harm, manner, sampled, rows, layout="principle_last", limit=6, margin=0)
    assert d.whole["n"] == len(d.a.pairs) == 6 and ((d.a.p_a > 0) & (d.a.p_a < 1)).all()
    assert "**harm** and **manner** on 6 pairs" in d._repr_markdown_()

"""Elo: known strengths come back, the library agrees, intervals hold what they promise, few votes claim little."""
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from cai_nb.core.errors import CaiError
from cai_nb.measure import elo
from cai_nb.measure.elo import (
    CHOICES,
    ELO,
    bradley_terry,
    elo_cells,
    elo_table,
    figure_elo,
    label_votes,
    model_pairs,
    _reach,
    _read_votes,
    _resampled_scores,
    show_elo,
    _virtual_votes,
    vote_from_choice,
    win_rate,
)

TRUTH = {"base": -120.0, "sl": 0.0, "rl": 90.0, "other": 200.0}


def played(n, seed, truth=TRUTH, soft=False, per_prompt=1):
    "n votes between models of known Elo."
    rng, votes = random.Random(seed), []
    for i in range(n):
        a, b = rng.sample(list(truth), 2)
        p = win_rate(truth[a], truth[b])
        votes.append(
            {"a": a, "b": b, "p_a": p if soft else float(rng.random() < p), "prompt_id": f"p{i // per_prompt}"}
        )
    return votes


def by_model(*args, **settings):
    return {row["model"]: row for row in elo_table(*args, **settings)}


def won(a, b, times=1, p=1.0, **more):
    return [{"a": a, "b": b, "p_a": p, **more} for _ in range(times)]


# Scores


def test_known_strengths_come_back_within_their_intervals():
    found = by_model(played(3000, 0), anchor="sl")
    assert list(found) == ["other", "rl", "sl", "base"]
    for model, row in found.items():
        assert row["low"] <= TRUTH[model] <= row["high"] and abs(row["elo"] - TRUTH[model]) < 40
        assert row["low"] <= row["elo"] <= row["high"]
    assert found["sl"]["elo"] == found["sl"]["low"] == found["sl"]["high"] == 0
    assert sum(r["n"] for r in found.values()) == 6000 and sum(r["wins"] for r in found.values()) == pytest.approx(3000)


def test_true_probabilities_as_soft_votes_give_the_true_scores():
    """Fractions of wins are counted as they are, and exactly."""
    for model, row in by_model(played(400, 1, soft=True), anchor="sl", virtual=0, n_resamples=50).items():
        assert row["elo"] == pytest.approx(TRUTH[model], abs=1e-6)
        assert row["low"] == pytest.approx(TRUTH[model], abs=1e-6) == row["high"]


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_evalica(seed):
    evalica = pytest.importorskip("evalica")
    votes = played(80, seed, soft=bool(seed % 2)) + won("sl", "rl", 2, 0.5)
    ballots = _read_votes(votes)
    wins = ballots.wins() + _virtual_votes(4)
    i, j = (index.tolist() for index in np.nonzero(wins))
    theirs = evalica.bradley_terry(
        i, j, [evalica.Winner.X] * len(i), weights=wins[i, j].tolist(), tolerance=1e-12, limit=10_000
    ).scores
    theirs = {ballots.models[k]: ELO * math.log(s) for k, s in theirs.items()}
    for model, row in by_model(votes, anchor="rl", n_resamples=2).items():
        assert row["elo"] == pytest.approx(theirs[model] - theirs["rl"], abs=1e-3)


def test_ties_agree_with_evalicas_ties():
    evalica = pytest.importorskip("evalica")
    votes = [v | {"p_a": random.Random(i).choice([0, 0.5, 1])} for i, v in enumerate(played(60, 3))]
    w = {1: evalica.Winner.X, 0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
    for kept, ties in ((votes, "half"), ([v for v in votes if v["p_a"] != 0.5], "drop")):
        columns = zip(*((v["a"], v["b"], w[v["p_a"]]) for v in kept))
        theirs = evalica.bradley_terry(*columns, tolerance=1e-12, limit=10_000).scores
        ours = by_model(votes, anchor="sl", ties=ties, virtual=0, n_resamples=2)
        for model, row in ours.items():
            assert row["elo"] == pytest.approx(ELO * math.log(theirs[model] / theirs["sl"]), abs=1e-3)
        assert sum(row["n"] for row in ours.values()) == 2 * len(kept)


@pytest.mark.parametrize("seed", range(30))
def test_every_model_wins_as_often_as_its_score_says(seed):
    """The condition of the likelihood's top, over matrices with numbers of very different sizes."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 12))
    wins = 10 ** rng.uniform(-6, 3, (k, k)) * (rng.random((k, k)) < 0.6) + _virtual_votes(k, 0.01)
    np.fill_diagonal(wins, 0)
    x = bradley_terry(wins)
    expected = (wins + wins.T) / (1 + np.exp(x - x[:, None]))
    assert np.allclose(expected.sum(1), wins.sum(1), rtol=1e-6, atol=1e-8 * wins.sum()) and abs(x.mean()) < 1e-9


def test_many_matrices_at_once_are_as_one_by_one():
    wins = np.random.default_rng(0).uniform(0, 9, (3, 2, 5, 5)) * (1 - np.eye(5))
    together = bradley_terry(wins)
    assert together.shape == (3, 2, 5)
    assert np.allclose(together[2, 1], bradley_terry(wins[2, 1]), atol=1e-9)


def test_the_anchor_moves_all_and_nothing_else():
    votes = played(200, 5)
    at_sl, at_rl, at_mean = (by_model(votes, anchor=a) for a in ("sl", "rl", None))
    for model in TRUTH:
        assert at_sl[model]["elo"] - at_sl["rl"]["elo"] == pytest.approx(at_rl[model]["elo"])
    assert at_sl["rl"]["low"] == pytest.approx(-at_rl["sl"]["high"])  # one distance, seen from its two ends
    assert sum(row["elo"] for row in at_mean.values()) == pytest.approx(0, abs=1e-9)
    assert all(row["low"] < row["elo"] < row["high"] for row in at_mean.values())


def test_order_sides_and_seed():
    votes = played(150, 7, per_prompt=3)
    shuffled = random.Random(1).sample(votes, len(votes))
    turned = [v | {"a": v["b"], "b": v["a"], "p_a": 1 - v["p_a"]} for v in shuffled]
    first = elo_table(votes, anchor="sl", seed=4)
    assert first == elo_table(shuffled, anchor="sl", seed=4) == elo_table(turned, anchor="sl", seed=4)
    assert (
        first == elo_table(votes, anchor="sl", seed=4, models=["new", "sl"])[:4]
    )  # a model without votes changes nothing
    other = elo_table(votes, anchor="sl", seed=5)
    assert first != other and [r["elo"] for r in first] == [r["elo"] for r in other]


def test_win_rate_is_the_papers_formula():
    assert win_rate(0, 0) == 0.5 and win_rate(400, 0) == pytest.approx(10 / 11)
    assert win_rate(30, -70) == pytest.approx(1 / (1 + math.exp(-100 / ELO)))


# Intervals


@pytest.mark.parametrize("anchor", ["sl", None])
def test_intervals_cover_the_truth(anchor):
    truth = {"base": -100.0, "sl": 0.0, "rl": 130.0}
    zero, inside = truth["sl"] if anchor else sum(truth.values()) / 3, {"base": 0, "rl": 0}
    for seed in range(100):
        for model, row in by_model(played(30, seed, truth), anchor=anchor, n_resamples=200).items():
            if model in inside:
                low, high = (
                    (-math.inf if row["low"] is None else row["low"]),
                    (math.inf if row["high"] is None else row["high"]),
                )
                inside[model] += low <= truth[model] - zero <= high
    assert min(inside.values()) >= 85, inside


def width(votes, model="rl"):
    row = by_model(votes, anchor="sl")[model]
    return row["high"] - row["low"]


def test_more_votes_are_surer_and_repeated_prompts_are_not():
    votes = played(100, 2)
    assert width(played(900, 2)) < 0.45 * width(votes)
    assert 0.85 < width([v for v in votes for _ in range(5)]) / width(votes) < 1.2
    apart = [{k: x for k, x in v.items() if k != "prompt_id"} for v in votes for _ in range(5)]
    assert width(apart) < 0.6 * width(votes)  # without prompts the same votes are taken for independent ones


def test_votes_without_a_prompt_are_not_one_prompt():
    named, missing, none = (played(60, 3) for _ in range(3))
    for v in missing: del v["prompt_id"]
    for v in none: v["prompt_id"] = None
    assert elo_table(missing) == elo_table(none)
    assert width(missing) == pytest.approx(width(named), rel=0.2)
    assert sorted(_read_votes(missing).group) == list(range(60))
    assert (
        len({*_read_votes([v | {"prompt_id": i % 2} for i, v in enumerate(named)]).group}) == 2
    )  # numbers are ids, too, and 0 is one


def test_two_models_have_jeffreys_interval():
    """7 of 10: the 2.5 and 97.5 % points of a Beta distribution with 7.5 and 3.5 are 0.3942 and 0.9073."""
    row = by_model(won("rl", "sl", 7) + won("sl", "rl", 3), anchor="sl", n_resamples=20_000)["rl"]
    assert [win_rate(row[end], 0) for end in ("low", "high")] == pytest.approx([0.3942, 0.9073], abs=0.006)


def test_five_thousand_votes_ask_the_solver_once_for_all_resamples(monkeypatch):
    asked = []
    monkeypatch.setattr(elo, "bradley_terry", lambda wins: asked.append(wins.shape) or bradley_terry(wins))
    assert _resampled_scores(_read_votes(played(5000, 0)), np.ones(4, dtype=bool), n_resamples=200).shape == (200, 4)
    assert asked == [(200, 4, 4)]


# Few votes


def test_no_votes_at_all():
    assert elo_table([]) == [] and "Elo" in show_elo([])
    rows = elo_table([], anchor="sl", models=["sl", "rl"])
    assert [(r["model"], r["elo"], r["n"], r["note"]) for r in rows] == [
        ("rl", None, 0, "no votes yet"),
        ("sl", None, 0, "no votes yet"),
    ]
    assert elo_table(won("sl", "rl", p=None)) == elo_table([], models=["sl", "rl"])
    assert "–" in show_elo(rows)


def test_unbeaten_and_winless():
    found = by_model(won("rl", "sl", 3) + won("sl", "base", 4) + won("base", "sl", 1), anchor="sl")
    assert (
        found["rl"]["high"] is None
        and found["rl"]["low"] < found["rl"]["elo"]
        and found["rl"]["note"] == "no upper bound yet"
    )
    assert 0 < found["rl"]["elo"] < 400  # finite, and modest after three votes
    assert None not in (found["base"]["low"], found["base"]["high"])
    winless = by_model(won("sl", "base", 3), anchor="sl")["base"]
    assert winless["low"] is None and winless["high"] > winless["elo"] and winless["note"] == "no lower bound yet"
    assert by_model(won("sl", "base", 50), anchor="sl")["base"]["high"] < -300
    with pytest.raises(CaiError, match="virtual votes"):
        elo_table(won("rl", "sl", 3), virtual=0)


def test_an_unbeaten_group_is_open_although_each_of_it_lost():
    votes = won("a", "b", 3) + won("b", "a", 3) + won("a", "sl", 5) + won("b", "sl", 5)
    found = by_model(votes, anchor="sl")
    assert found["a"]["high"] is found["b"]["high"] is None and found["a"]["low"] > 0
    inner = by_model(votes, anchor="a")
    assert None not in (inner["b"]["low"], inner["b"]["high"]) and inner["sl"]["low"] is None


def test_two_winners_over_the_same_model_cannot_be_compared():
    row = by_model(won("rl", "base", 2) + won("sl", "base", 2), anchor="sl")["rl"]
    assert (row["low"], row["high"], row["note"]) == (None, None, "no lower or upper bound yet")
    assert row["elo"] == pytest.approx(0, abs=1e-6)


def test_groups_that_never_met():
    votes = won("sl", "base", 2) + won("base", "sl") + won("x", "y", 2) + won("y", "x") + won("y", "z", 1, 0.5)
    found = by_model(votes, anchor="sl")
    assert {m for m, r in found.items() if r["elo"] is not None} == {"sl", "base"}
    assert found["x"]["note"] == "no chain of votes to SL-CAI" and found["x"]["n"] == 3 and found["x"]["wins"] == 2
    alone = by_model(won("sl", "base", 2) + won("base", "sl"), anchor="sl")
    assert found["base"]["elo"] == alone["base"]["elo"]  # the others' votes change nothing
    assert found["base"]["low"] == pytest.approx(alone["base"]["low"], rel=0.1)  # but the random numbers
    more = votes + won("sl", "base", 9)  # no anchor: the group of most models, and not of most votes
    assert {m for m, r in by_model(more).items() if r["elo"] is not None} == {"x", "y", "z"}
    assert {r["elo"] for r in elo_table(votes, anchor="new", models=["new"])} == {None}


def test_ties_only():
    row = by_model(won("sl", "rl", 4, 0.5, choice="both bad") + won("rl", "sl", 1, 0.5), anchor="sl")["rl"]
    assert (
        row["elo"] == pytest.approx(0, abs=1e-9)
        and row["low"] < 0 < row["high"]
        and (row["n"], row["both_bad"]) == (5, 4)
    )
    assert by_model(won("sl", "rl", 4, 0.5, choice="both bad") + won("rl", "base", 1, 0.5))["base"]["both_bad"] == 0
    dropped = by_model(won("sl", "rl", 4, 0.5, choice="both bad"), ties="drop")["rl"]
    assert (dropped["elo"], dropped["n"], dropped["both_bad"]) == (None, 0, 4)


def test_wins_without_an_answer_are_refused_at_once():
    for wins in (np.kron(np.eye(2), [[0, 1], [1, 0]]), [[0, 3], [0, 0]]):
        with pytest.raises(CaiError, match="never lost to, or never met"):
            bradley_terry(wins)


def test_chains_of_links():
    links = np.zeros((9, 9), dtype=bool)
    links[np.arange(8), np.arange(1, 9)] = True
    assert (_reach(links) == np.triu(np.ones((9, 9), dtype=bool))).all()
    assert (_reach(np.stack([links, links.T]))[1] == _reach(links).T).all()


# Votes


def test_choices_of_an_arena():
    assert {c: vote_from_choice(c) for c in CHOICES} == {"A better": 1.0, "B better": 0.0, "tie": 0.5, "both bad": 0.5}
    assert vote_from_choice(None) is None and vote_from_choice("") is None
    with pytest.raises(CaiError, match="A better, B better, tie, both bad"):
        vote_from_choice("left")


@pytest.mark.parametrize("vote, message", [
    ({"a": "sl", "p_a": 1}, "vote 2: found no 'b'"),
    ({"a": "sl", "b": "rl"}, "vote 2: found no 'p_a'"),
    ({"a": "sl", "b": "sl", "p_a": 1}, "vote 2: found 'sl' against itself"),
    ({"a": "sl", "b": None, "p_a": 1}, "vote 2: found b None"),
    ({"a": "sl", "b": "rl", "p_a": 1.01}, "found p_a 1.01"),
    ({"a": "sl", "b": "rl", "p_a": float("nan")}, "found p_a nan"),
    ({"a": "sl", "b": "rl", "p_a": "A"}, "found p_a 'A'"),
])
def test_wrong_votes_are_named(vote, message):
    with pytest.raises(CaiError) as error:
        elo_table([*won("sl", "rl"), vote])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("settings, message", [
    ({"anchor": "SL"}, "anchor: found 'SL', expected one of: rl, sl"), ({"ties": "keep"}, "ties: found 'keep'"),
    ({"virtual": -1}, "virtual: found -1"), ({"n_resamples": 0}, "n_resamples: found 0"),
])
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(CaiError, match=message):
        elo_table(won("sl", "rl") + won("rl", "sl"), **settings)


def test_replies_become_pairs_and_labels_become_votes():
    samples = [
        {"model": m, "prompt_id": p, "response": f"{m} on {p}"} for m in ("sl", "base", "rl") for p in ("p1", "p2")
    ]
    pairs = model_pairs(samples + [{"model": "sl", "prompt_id": "p3", "response": "alone"}])
    assert len(pairs) == len({p["id"] for p in pairs}) == 6
    for pair in pairs:
        assert pair["responses"] == [f"{m} on {pair['prompt_id']}" for m in pair["models"]] and pair["flags"] == []
    labels = [
        {"pair_id": p["id"], "p_a": 0.9 if p["models"][0] == "rl" else 0.1 if p["models"][1] == "rl" else 0.5}
        for p in pairs
    ]
    assert {tuple(p["models"]) for p in pairs} == {
        ("base", "rl"),
        ("base", "sl"),
        ("rl", "sl"),
    }  # whatever the order of the rows
    votes = label_votes(random.Random(0).sample(labels, 6), pairs)
    assert {v["prompt_id"] for v in votes} == {"p1", "p2"}
    assert elo_table(votes, anchor="sl")[0]["model"] == "rl"
    with pytest.raises(CaiError, match="label x: found no such pair among 6"):
        label_votes([{"pair_id": "x", "p_a": 1.0}], pairs)


# What is shown


ROWS = elo_table(
    won("sl", "base", 6, prompt_id="p")
    + won("base", "sl", 3)
    + won("rl", "sl", 2)
    + won("b|c", "y", choice="A better"),
    anchor="sl",
    models=["new"],
)


def test_table_as_text_and_markdown():
    text = show_elo(ROWS)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["RL-CAI", "SL-CAI", "base"] and len(lines) == 8
    assert "above " in lines[2] and "no upper bound yet" in lines[2] and " to " in lines[4] and "−" in lines[4]
    assert "both bad" not in text and not any(line != line.rstrip() for line in lines)
    markdown = show_elo(ROWS, markdown=True).splitlines()
    assert len(markdown) == len(ROWS) + 2 and {line.replace("\\|", "").count("|") for line in markdown} == {7}
    assert [len(row) for row in elo_cells(ROWS)] == [7] * 7


def test_rounded_scores_have_no_minus_zero():
    row = {"model": "x", "elo": -0.3, "low": -0.4, "high": 0.2, "n": 9, "wins": 4.5, "both_bad": 0, "note": ""}
    assert elo_cells([row])[1] == ["x", "0", "0 to 0", "9", "50 %", "0", ""]


@pytest.mark.parametrize("rows", [ROWS, [], elo_table([], models=["sl"]), elo_table(played(50, 0))],
                         ids=["few", "none", "no votes", "no anchor"])
def test_figure_shows_every_model_inside_its_axes(rows):
    axes = figure_elo(rows).axes[0]
    assert len(axes.get_yticklabels()) == len(rows)
    left, right = axes.get_xlim()
    for row in rows:
        assert all(left < row[key] < right for key in ("elo", "low", "high") if row[key] is not None)
    arrows = [line.get_marker() for line in axes.lines if line.get_marker() in ("<", ">")]
    scored = [row for row in rows if row["elo"] is not None]
    assert arrows == [m for row in scored for key, m in (("low", "<"), ("high", ">")) if row[key] is None]
    said = [t.get_text().strip() for t in axes.texts]
    assert all(row["note"] in said for row in rows if row["elo"] is None)


def test_one_sided_young_arenas_get_their_scores():
    """Where the slope is as level as rounding lets it be, the search ends, however long its steps still are."""
    votes = [{"a": "sl", "b": "rl", "p_a": 1.0, "prompt_id": str(i)} for i in range(20)]
    found = {row["model"]: row for row in elo_table(votes, "sl", ["base", "sl", "rl"])}
    assert found["rl"]["elo"] < -400 and found["rl"]["low"] is None and found["base"]["elo"] is None
    for seed in range(60):  # a few votes between six models, most of them one-sided
        rng = random.Random(seed)
        drawn = [rng.sample("abcdef", 2) for _ in range(rng.randint(2, 9))]
        votes = [{"a": a, "b": b, "p_a": rng.choice((1.0, 1.0, 0.0, 0.5)), "prompt_id": str(i)}
                 for i, (a, b) in enumerate(drawn)]
        rows = elo_table(votes, models=list("abcdef"), n_resamples=200)
        assert all(row["elo"] is None or abs(row["elo"]) < 4000 for row in rows)


def test_works_without_the_extra_and_without_matplotlib():
    code = (
        "import sys; sys.modules['evalica'] = None; sys.modules['matplotlib'] = None; "
        "from cai_nb.measure.elo import elo_table, show_elo; "
        "print(show_elo(elo_table([{'a': 'x', 'b': 'y', 'p_a': 1}])))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no upper bound yet" in out.stdout, out.stderr

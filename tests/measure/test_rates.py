"""Rates, their table and their figures: counted by hand here; a run that knows less is still shown."""

import importlib.util
import random
import re

import pytest
from scripted import ScriptedLM

from cai_nb.core.errors import CaiError
from cai_nb.measure.figures import (
    COLOURS, figure_calibration, figure_outcomes, figure_revisions, figure_training, save_figures,
)
from cai_nb.measure.judging import REPLY_KINDS, evaluate_models
from cai_nb.measure.rates import by_confidence, metrics_table, pooled, rate, table_rows
from cai_nb.mini import oracle, world
from cai_nb.runs.prompts_stage import EVAL_SETS

PROMPTS = {name: world.prompts("test", name, 12, seed=3) for name in EVAL_SETS}


def spoken(sort):
    "A model that answers every prompt of mini's world in one way."
    return ScriptedLM(lambda talk, seed: world.write_reply(oracle.topic_of(talk), sort, random.Random(seed)))


# Rates


@pytest.mark.parametrize("n", [1, 7, 240, 5000])
def test_interval_ends_are_where_the_score_test_gives_up(n):
    """Wilson's ends solve (p̂ − p)² = z² p (1 − p) / n."""
    for k in {0, 1, n // 3, n // 2, n - 1, n}:
        r = rate(k, n)
        assert 0 <= r["low"] <= r["value"] <= r["high"] <= 1 and r["n"] == n
        for end in (r["low"], r["high"]):
            if 0 < end < 1:
                assert (k / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, rel=1e-6)


def test_nothing_counted_is_no_rate():
    assert rate(0, 0) == {"value": None, "low": None, "high": None, "n": 0}
    with pytest.raises(CaiError, match="between 0 and 3"):
        rate(4, 3)


@pytest.mark.parametrize("options", [2, 9])
def test_confidence_goes_from_chance_to_certainty(options):
    """An answer at chance is in the first bin, a certain one in the last, whatever chance is."""
    low, high = by_confidence([(1 / options, False), (1.0, True)], 1 / options, bins=4)
    assert (low["confidence"], low["value"], high["confidence"], high["value"]) == (1 / options, 0, 1, 1)
    middle = 1 / options + .3 * (1 - 1 / options)
    assert len(by_confidence([(1 / options, False), (middle, True)], 1 / options, bins=4)) == 2
    assert len(by_confidence([(1 / options, False), (middle, True)], 1 / options, bins=3)) == 1
    assert by_confidence([]) == []


# Tables and figures


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "a run"
    lms = {"base": spoken("comply"), "rl": spoken("objection")}
    metrics, _ = evaluate_models(lms, PROMPTS, oracle, out=run / "eval" / "samples.jsonl")
    metrics |= {"labels": {"agreement": rate(93, 100)}, "preference": {"accuracy": rate(9, 10)}}
    return metrics


def test_table_has_the_rows_that_are_asked_for(evaluated):
    text, table = metrics_table(evaluated), metrics_table(evaluated, markdown=True)
    for title in (
        "harmful compliance", "objection with a safe alternative", "reason without another way", "evasive or preachy",
        "garbled or off-topic", "benign helpfulness", "held-out verbs: harmful compliance",
        "after push-back: harmful compliance", "after push-back: objection", "follow-ups: helpful",
        "contested: helpful", "labels that agree with the oracle",
    ):
        assert title in text and title in table
    assert text.splitlines()[0].split() == ["base", "RL-CAI"]
    assert re.search(r"harmful compliance +100\.0 % \(75\.8–100\.0\) +0\.0 % \(0\.0–24\.2\)", text)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert pooled([rate(1, 12), rate(3, 12)]) == rate(4, 12)


def test_replies_to_harmful_prompts_are_divided_without_rest():
    """Whatever a model says to a harmful prompt is in one row of the table, and those rows add up to 100 %."""
    titles = ["harmful compliance", "objection with a safe alternative", "reason without another way",
              "evasive or preachy", "garbled or off-topic"]
    sorts = [*world.SOUND, "garbled", "off_topic"]
    def any_sort(talk, seed):
        return world.write_reply(oracle.topic_of(talk), sorts[seed % len(sorts)], random.Random(seed))

    mixed = ScriptedLM(any_sort)
    prompts = world.prompts("test", "harmful", 80)
    metrics, rows = evaluate_models({"base": mixed}, {"harmful": prompts}, oracle)
    assert {r["kind"] for r in rows} == set(REPLY_KINDS) - {"helpful", "over_refusal"}
    shares = {r[0]: float(r[1].split(" %")[0]) for r in table_rows(metrics)[1:]}
    assert sum(shares[title] for title in titles) == pytest.approx(100, abs=.3)
    assert set(COLOURS) == set(REPLY_KINDS)


def test_run_from_before_a_kind_was_counted_can_still_be_read():
    kinds = {k: rate(0, 12) for k in REPLY_KINDS if k != "curt"} | {"objection": rate(12, 12)}
    titles = [r[0] for r in table_rows({"models": {"rl": {"harmful": kinds}}})]
    assert "evasive or preachy" in titles and "reason without another way" not in titles
    figure = figure_outcomes({"models": {"rl": {"harmful": kinds}}})
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["objection"]


@pytest.mark.parametrize("n", [1, 5, 7, len(REPLY_KINDS)])
def test_legend_stays_on_the_figure(n):
    kinds = {k: rate(int(i < n), n) for i, k in enumerate(REPLY_KINDS)}
    figure = figure_outcomes({"models": {m: {s: kinds for s in ("harmful", "benign")} for m in ("base", "sl", "rl")}})
    figure.draw_without_rendering()
    legend, page = figure.axes[0].get_legend().get_window_extent(), figure.bbox
    assert page.x0 <= legend.x0 and legend.x1 <= page.x1 and page.y0 <= legend.y0


def test_reach_counts_what_the_table_counts(root):
    """The targets are met by good rates, each is missed by a bad one, and several seeds are pooled."""
    spec = importlib.util.spec_from_file_location("reach", root / "benchmarks" / "reach.py")
    reach = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reach)
    share = lambda **counts: {k: rate(counts.get(k, 0), 1000) for k in REPLY_KINDS}
    good = {
        "base": {"harmful": share(harmful=980, curt=20)},
        "sl": {"harmful": share(harmful=100, objection=800, curt=100)},
        "rl": {"harmful": share(harmful=10, objection=960, curt=30), "harmful_new_verbs": share(objection=1000)},
    }
    for model in good: good[model]["benign"] = share(helpful=970, garbled=30)
    metrics = {"models": good, "labels": {"agreement": rate(950, 1000)}, "preference": {"accuracy": rate(9, 10)}}
    assert all(ok for *_, ok in reach.check(metrics))
    bad = {"harmful": share(harmful=11, objection=949, preachy=40), "benign": share(helpful=940, garbled=60)}
    worse = metrics | {"models": good | {"rl": good["rl"] | bad}}
    missed = {(title, model) for title, model, *_, ok in reach.check(worse) if not ok}
    titles = ("harmful compliance", "objection with a safe alternative", "benign helpfulness, of base")
    assert missed == {(title, "rl") for title in titles}
    assert reach.together([metrics, metrics])["models"]["rl"]["harmful"]["curt"] == rate(60, 2000)
    assert "reason without another way" in metrics_table(reach.together([metrics, metrics]))


def test_table_of_a_run_without_models_is_only_short():
    assert "93.0 %" in metrics_table({"models": {}, "labels": {"agreement": rate(93, 100)}})
    assert metrics_table({"models": {"base": {}}}).splitlines()[0].strip() == "base"


def test_figures_of_very_little_are_drawn_all_the_same(tmp_path):
    none = {k: rate(0, 0) for k in REPLY_KINDS}
    outcomes = figure_outcomes({"models": {"base": {"harmful": none}}})
    paths = save_figures(tmp_path, outcomes=outcomes, revisions=figure_revisions([none]),
                         calibration=figure_calibration([]), training=figure_training([]))
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in paths)

"""Rates, judging, agreement, tables, figures and the report: counted by hand here, resumed after kills, safe to open."""
import importlib.util
import json
import random
import re

import pytest
from scripted import Killed, ScriptedLM

from cai_nb.core.errors import CaiError
from cai_nb.measure.rates import (
    KINDS,
    ROWS,
    calibration,
    conversation_of,
    evaluate_models,
    judge_replies,
    kinds_by_revision,
    label_agreement,
    metrics_table,
    pooled,
    preference_accuracy,
    prompt_text,
    ranked_pairs,
    rate,
    table_rows,
)
from cai_nb.mini import oracle, world
from cai_nb.measure.figures import (
    COLOURS,
    figure_calibration,
    figure_outcomes,
    figure_revisions,
    figure_training,
    save_figures,
)
from cai_nb.runs.prompts_stage import EVAL_SETS

PROMPTS = {name: world.prompts("test", name, 12, seed=3) for name in EVAL_SETS}


def spoken(sort):
    "A model that answers every prompt of mini's world in one way."
    return ScriptedLM(lambda conversation, seed: world.answer(oracle.topic_of(conversation), sort, random.Random(seed)))


def pair_of(first, second, row, name="pair"):
    rng, topic = random.Random(name), oracle.topic_of(row["messages"])
    return {"id": name, "prompt_id": row["id"], "responses": [world.answer(topic, s, rng) for s in (first, second)]}


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


# Models


def test_metrics_have_the_shape_of_the_contract(tmp_path):
    lms = {"base": spoken("comply"), "sl": spoken("evasive"), "rl": spoken("objection")}
    metrics, rows = evaluate_models(lms, PROMPTS, oracle, out=tmp_path / "eval" / "samples.jsonl")
    assert list(metrics["models"]) == ["base", "sl", "rl"]
    for sets in metrics["models"].values():
        assert set(sets) == set(EVAL_SETS)
        for kinds in sets.values():
            assert set(kinds) == set(KINDS) and all(set(r) == {"value", "low", "high", "n"} for r in kinds.values())
            assert sum(r["value"] for r in kinds.values()) == pytest.approx(1)
    assert metrics == json.loads(json.dumps(metrics))
    models = metrics["models"]
    assert models["base"]["harmful"]["harmful"]["value"] == models["base"]["benign"]["helpful"]["value"] == 1
    assert (
        models["sl"]["harmful_new_verbs"]["evasive"]["value"]
        == models["sl"]["look_alikes"]["over_refusal"]["value"]
        == 1
    )
    assert models["rl"]["harmful"]["objection"]["value"] == models["rl"]["push_back"]["objection"]["value"] == 1
    assert models["base"]["contested"]["helpful"]["value"] == models["base"]["follow_up"]["helpful"]["value"] == 1
    assert models["rl"]["contested"]["over_refusal"]["value"] == models["base"]["push_back"]["harmful"]["value"] == 1
    assert len(rows) == 3 * len(EVAL_SETS) * 12 and {
        "id",
        "model",
        "set",
        "prompt",
        "response",
        "kind",
        "reason",
    } <= set(rows[0])


def test_every_model_faces_the_same_prompts_with_the_same_dice():
    lms = {"base": ScriptedLM(), "rl": ScriptedLM()}
    evaluate_models(lms, PROMPTS, oracle, batch_size=5)
    assert lms["base"].asked == lms["rl"].asked and lms["base"].seeds == lms["rl"].seeds
    assert len({s for seeds in lms["base"].seeds for s in seeds}) == len(
        {p["id"] for rows in PROMPTS.values() for p in rows}
    )


def test_killed_evaluation_resumes_to_the_same_file(tmp_path):
    def work(path, die_at=None):
        return evaluate_models(
            {"base": ScriptedLM(die_at=die_at), "rl": ScriptedLM()}, PROMPTS, oracle, batch_size=5, out=path
        )

    whole = work(tmp_path / "whole.jsonl")
    for die_at in (1, 2, 6):
        path = tmp_path / f"{die_at}.jsonl"
        with pytest.raises(Killed):
            work(path, die_at)
        assert work(path) == whole and path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_judge_of_another_house_is_checked():
    with pytest.raises(CaiError, match="one prompt per reply"):
        judge_replies(oracle, ["a"], [])
    class Odd:
        def judge(self, prompt, reply): return type("V", (), {"kind": "naughty", "reason": ""})
    with pytest.raises(CaiError, match="naughty"):
        judge_replies(Odd(), ["a"], ["b"])


def test_an_oracle_hears_the_whole_conversation():
    """A row and its messages are judged alike, a text as it is; what somebody says who insists means nothing alone."""
    row = PROMPTS["push_back"][0]
    topic, insists = oracle.topic_of(row["messages"]), row["messages"][-1]["content"]
    said = world.answer(topic, "curt", random.Random(0))
    assert [
        v.kind for v in judge_replies(oracle, [row, row["messages"], f"How do I {topic.text}?", insists], [said] * 4)
    ] == ["curt"] * 3 + ["garbled"]

    class Listens:
        heard = []
        def judge(self, prompt, reply):
            self.heard.append(prompt)
            return oracle.judge(prompt, reply)

    evaluate_models({"base": spoken("comply")}, {"push_back": PROMPTS["push_back"]}, Listens())
    assert Listens.heard == [p["messages"] for p in PROMPTS["push_back"]]


def test_people_read_what_was_asked_and_how_it_was_asked_again():
    first, _, again = (m["content"] for m in PROMPTS["push_back"][0]["messages"])
    assert (
        prompt_text(PROMPTS["push_back"][0]) == prompt_text(PROMPTS["push_back"][0]["messages"]) == f"{first} … {again}"
    )
    single = PROMPTS["harmful"][0]
    assert prompt_text(single) == prompt_text(single["messages"]) == single["messages"][0]["content"]
    assert (
        prompt_text("a text") == conversation_of("a text") == "a text" and conversation_of(single) == single["messages"]
    )
    long = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")][:-1]
    assert prompt_text(long) == "user 1 … user 2"
    _, rows = evaluate_models({"base": spoken("comply")}, {"push_back": PROMPTS["push_back"]}, oracle)
    assert rows[0]["prompt"] == f"{first} … {again}"


# Labels and the preference model


def test_agreement_leaves_ties_out_and_counts_one_half_as_wrong():
    rows = PROMPTS["harmful"]
    pairs = [pair_of("objection", "comply", rows[0], "first"), pair_of("comply", "evasive", rows[1], "second"),
             pair_of("comply", "comply", rows[2], "tie"), pair_of("objection", "garbled", rows[3], "half"),
             pair_of("objection", "preachy", rows[4], "unlabelled")]
    labels = [{"pair_id": i, "p_a": p} for i, p in (("first", .51), ("second", .2), ("tie", .9), ("half", .5))]
    assert [p["first"] for p in ranked_pairs(pairs, rows, oracle)] == [True, False, True, True]
    assert label_agreement(labels, pairs, rows, oracle) == rate(2, 3)
    turned = [{"pair_id": x["pair_id"], "p_a": 1 - x["p_a"]} for x in labels]
    assert label_agreement(turned, pairs, rows, oracle) == rate(0, 3)
    with pytest.raises(CaiError, match="not among"):
        label_agreement(labels, pairs, rows[:1], oracle)


@pytest.mark.parametrize("name", ["push_back", "follow_up", "contested"])
def test_agreement_and_accuracy_in_every_new_set(name):
    """Replies that end a conversation are ranked by what the conversation is about."""
    rows = PROMPTS[name]
    good, bad = ("objection", "curt") if name == "push_back" else ("comply", "objection")
    pairs = [
        pair_of(good, bad, rows[0], "good first"),
        pair_of(bad, good, rows[1], "good last"),
        pair_of(good, good, rows[2], "tie"),
    ]
    assert [p["first"] for p in ranked_pairs(pairs, rows, oracle)] == [True, False]
    labels = [{"pair_id": i, "p_a": p} for i, p in (("good first", .9), ("good last", .8), ("tie", .9))]
    assert label_agreement(labels, pairs, rows, oracle) == rate(1, 2)
    assert [(round(b["confidence"], 1), b["value"]) for b in calibration(labels, pairs, rows, oracle, bins=10)] == [
        (0.8, 0),
        (0.9, 1),
    ]

    class Truth:
        def score(self, talks): return [oracle.rank(t[:-1], t[-1]["content"]) for t in talks]

    assert preference_accuracy(Truth(), pairs, rows, oracle) == rate(2, 2)


def test_preference_accuracy_reads_the_whole_conversation():
    rows = PROMPTS["harmful"]
    pairs = [
        pair_of("objection", "comply", rows[0], "a"),
        pair_of("comply", "objection", rows[1], "b"),
        pair_of("comply", "comply", rows[2], "tie"),
    ]

    class Truth:
        sign = 1
        def score(self, talks): return [self.sign * oracle.rank(t[0]["content"], t[1]["content"]) for t in talks]

    assert preference_accuracy(Truth(), pairs, rows, oracle) == rate(2, 2)
    Truth.sign = -1
    assert preference_accuracy(Truth(), pairs, rows, oracle) == rate(0, 2)
    Truth.sign = 0
    assert preference_accuracy(Truth(), pairs, rows, oracle) == rate(0, 2)
    assert preference_accuracy(Truth(), [], rows, oracle)["n"] == 0


def test_calibration_bins_by_how_sure_a_label_is():
    rows = PROMPTS["harmful"]
    pairs = [pair_of("objection", "comply", rows[i], f"p{i}") for i in range(4)]
    labels = [{"pair_id": f"p{i}", "p_a": p} for i, p in enumerate((1.0, .0, .5, .62))]
    bins = calibration(labels, pairs, rows, oracle)
    assert [(b["n"], b["value"]) for b in bins] == [(1, 0), (1, 1), (2, .5)]
    assert [b["confidence"] for b in bins] == pytest.approx([.5, .62, 1.0])


def test_kinds_by_revision():
    row, benign = PROMPTS["push_back"][0], PROMPTS["benign"][0]
    texts = {s: pair_of(s, s, row)["responses"][0] for s in ("comply", "curt", "objection")}
    chain = {"id": "c", "prompt_id": row["id"], "response": texts["comply"],
             "steps": [{"revision": texts["curt"]}, {"revision": texts["objection"]}]}
    other = dict(chain, id="d", prompt_id=benign["id"])
    found = kinds_by_revision([chain, other], [row, benign], oracle)
    assert [max(step, key=lambda k: step[k]["value"]) for step in found] == ["harmful", "curt", "objection"]
    assert [step["harmful"]["n"] for step in found] == [1, 1, 1]


# Tables, figures, the page


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "a run"
    metrics, _ = evaluate_models(
        {"base": spoken("comply"), "rl": spoken("objection")}, PROMPTS, oracle, out=run / "eval" / "samples.jsonl"
    )
    metrics |= {
        "labels": {"agreement": rate(93, 100)},
        "preference": {"accuracy": rate(9, 10)},
        "seconds": {"sl": 61.2},
    }
    (run / "eval" / "metrics.json").write_text(json.dumps(metrics))
    return run, metrics


def test_table_has_the_rows_that_are_asked_for(evaluated):
    text, table = metrics_table(evaluated[1]), metrics_table(evaluated[1], markdown=True)
    for title in (
        "harmful compliance",
        "objection with a safe alternative",
        "reason without another way",
        "evasive or preachy",
        "garbled or off-topic",
        "benign helpfulness",
        "held-out verbs: harmful compliance",
        "after push-back: harmful compliance",
        "after push-back: objection",
        "follow-ups: helpful",
        "contested: helpful",
        "labels that agree with the oracle",
    ):
        assert title in text and title in table
    assert text.splitlines()[0].split() == ["base", "RL-CAI"]
    assert re.search(r"harmful compliance +100\.0 % \(75\.8–100\.0\) +0\.0 % \(0\.0–24\.2\)", text)
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert pooled([rate(1, 12), rate(3, 12)]) == rate(4, 12)


def test_replies_to_harmful_prompts_are_divided_without_rest():
    """Whatever a model says to a harmful prompt is in one row of the table, and those rows add up to 100 %."""
    of_harmful = [row for row in ROWS if row[1] == "harmful"]
    kinds = [k for _, _, ks in of_harmful for k in ks]
    assert len(kinds) == len(set(kinds)) and set(kinds) == {
        "objection",
        "curt",
        "evasive",
        "preachy",
        "harmful",
        "garbled",
    }
    sorts = [*world.SOUND, "garbled", "off_topic"]
    mixed = ScriptedLM(lambda c, seed: world.answer(oracle.topic_of(c), sorts[seed % len(sorts)], random.Random(seed)))
    prompts = world.prompts("test", "harmful", 80)
    metrics, rows = evaluate_models({"base": mixed}, {"harmful": prompts}, oracle)
    assert {r["kind"] for r in rows} == set(kinds)
    shares = {r[0]: float(r[1].split(" %")[0]) for r in table_rows(metrics)[1:]}
    assert sum(shares[title] for title, _, _ in of_harmful) == pytest.approx(100, abs=.3)
    assert set(COLOURS) == set(KINDS)


def test_run_from_before_a_kind_was_counted_can_still_be_read():
    kinds = {k: rate(0, 12) for k in KINDS if k != "curt"} | {"objection": rate(12, 12)}
    titles = [r[0] for r in table_rows({"models": {"rl": {"harmful": kinds}}})]
    assert "evasive or preachy" in titles and "reason without another way" not in titles
    figure = figure_outcomes({"models": {"rl": {"harmful": kinds}}})
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["objection"]


@pytest.mark.parametrize("n", [1, 5, 7, len(KINDS)])
def test_legend_stays_on_the_figure(n):
    kinds = {k: rate(int(i < n), n) for i, k in enumerate(KINDS)}
    figure = figure_outcomes({"models": {m: {s: kinds for s in ("harmful", "benign")} for m in ("base", "sl", "rl")}})
    figure.draw_without_rendering()
    legend, page = figure.axes[0].get_legend().get_window_extent(), figure.bbox
    assert page.x0 <= legend.x0 and legend.x1 <= page.x1 and page.y0 <= legend.y0


def test_reach_counts_what_the_table_counts(root):
    """The targets are met by good rates, each is missed by a bad one, and several seeds are pooled."""
    spec = importlib.util.spec_from_file_location("reach", root / "benchmarks" / "reach.py")
    reach = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reach)
    share = lambda **counts: {k: rate(counts.get(k, 0), 1000) for k in KINDS}
    good = {
        "base": {"harmful": share(harmful=980, curt=20)},
        "sl": {"harmful": share(harmful=100, objection=800, curt=100)},
        "rl": {"harmful": share(harmful=10, objection=960, curt=30), "harmful_new_verbs": share(objection=1000)},
    }
    for model in good: good[model]["benign"] = share(helpful=970, garbled=30)
    metrics = {"models": good, "labels": {"agreement": rate(950, 1000)}, "preference": {"accuracy": rate(9, 10)}}
    assert all(ok for *_, ok in reach.check(metrics))
    bad = {"harmful": share(harmful=11, objection=949, preachy=40), "benign": share(helpful=940, garbled=60)}
    missed = {
        (title, model)
        for title, model, *_, ok in reach.check(metrics | {"models": good | {"rl": good["rl"] | bad}})
        if not ok
    }
    assert missed == {
        ("harmful compliance", "rl"),
        ("objection with a safe alternative", "rl"),
        ("benign helpfulness, of base", "rl"),
    }
    assert reach.together([metrics, metrics])["models"]["rl"]["harmful"]["curt"] == rate(60, 2000)
    assert "reason without another way" in metrics_table(reach.together([metrics, metrics]))


def test_table_of_a_run_without_models_is_only_short():
    assert "93.0 %" in metrics_table({"models": {}, "labels": {"agreement": rate(93, 100)}})
    assert metrics_table({"models": {"base": {}}}).splitlines()[0].strip() == "base"


def test_figures_of_very_little_are_drawn_all_the_same(tmp_path):
    none = {k: rate(0, 0) for k in KINDS}
    paths = save_figures(
        tmp_path,
        outcomes=figure_outcomes({"models": {"base": {"harmful": none}}}),
        revisions=figure_revisions([none]),
        calibration=figure_calibration([]),
        training=figure_training([]),
    )
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in paths)

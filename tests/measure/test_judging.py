"""Judging: models, labels, preference model and revisions counted by a judge; by hand here, resumed after kills."""

import json
import random

import pytest
from scripted import Killed, ScriptedLM

from cai_nb.core.errors import CaiError
from cai_nb.measure.judging import (
    REPLY_KINDS, JudgeRecord, Verdict, calibration, evaluate_models, _judge_replies, kinds_by_revision, label_agreement,
    open_judge, preference_accuracy, prompt_text, _ranked_pairs,
)
from cai_nb.measure.rates import rate
from cai_nb.mini import oracle, world
from cai_nb.runs.prompts_stage import EVAL_SETS

PROMPTS = {name: world.prompts("test", name, 12, seed=3) for name in EVAL_SETS}


def spoken(sort):
    "A model that answers every prompt of mini's world in one way."
    return ScriptedLM(lambda talk, seed: world.write_reply(oracle.topic_of(talk), sort, random.Random(seed)))


def pair_of(first, second, row, name="pair"):
    rng, topic = random.Random(name), oracle.topic_of(row["messages"])
    replies = [world.write_reply(topic, sort, rng) for sort in (first, second)]
    return {"id": name, "prompt_id": row["id"], "responses": replies}


# Who judges


def test_a_judge_is_named_by_a_record_and_brought_in_when_it_is_asked_for():
    loaded = []
    def load(): return loaded.append("mini") or oracle
    records = [JudgeRecord("mini", "mini's oracle", "It parses mini's world.", load),
               JudgeRecord("half", "half a judge", "It cannot rank.", lambda: type("Half", (), {"judge": None})())]
    assert open_judge(records, None) is None and loaded == []
    assert open_judge(records, "mini") is oracle and loaded == ["mini"]
    with pytest.raises(CaiError, match="judge: found 'crowd', expected mini, half or null"):
        open_judge(records, "crowd")
    with pytest.raises(CaiError, match="judge half: found Half without judge or rank"):
        open_judge(records, "half")


def test_another_judge_stands_behind_the_same_seam():
    """One that reads the first word only: everything that is counted goes by its verdicts."""

    class Polite:
        def judge(self, prompt, reply): return Verdict("objection" if reply.startswith("No") else "harmful", "")
        def rank(self, prompt, reply): return int(reply.startswith("No"))

    row = PROMPTS["harmful"][0]
    lm = ScriptedLM(lambda conversation, seed: "No, sorry.")
    metrics, rows = evaluate_models({"base": lm}, {"harmful": [row]}, Polite())
    assert metrics["models"]["base"]["harmful"]["objection"] == rate(1, 1) and rows[0]["kind"] == "objection"
    pair = {"id": "p", "prompt_id": row["id"], "responses": ["Yes.", "No."]}
    assert label_agreement([{"pair_id": "p", "p_a": .1}], [pair], [row], Polite()) == rate(1, 1)


# Models


def test_metrics_have_the_shape_of_the_contract(tmp_path):
    lms = {"base": spoken("comply"), "sl": spoken("evasive"), "rl": spoken("objection")}
    metrics, rows = evaluate_models(lms, PROMPTS, oracle, out=tmp_path / "eval" / "samples.jsonl")
    assert list(metrics["models"]) == ["base", "sl", "rl"]
    for sets in metrics["models"].values():
        assert set(sets) == set(EVAL_SETS)
        for kinds in sets.values():
            assert set(kinds) == set(REPLY_KINDS)
            assert all(set(r) == {"value", "low", "high", "n"} for r in kinds.values())
            assert sum(r["value"] for r in kinds.values()) == pytest.approx(1)
    assert metrics == json.loads(json.dumps(metrics))
    models = metrics["models"]
    assert models["base"]["harmful"]["harmful"]["value"] == models["base"]["benign"]["helpful"]["value"] == 1
    assert models["sl"]["harmful_new_verbs"]["evasive"]["value"] == 1
    assert models["sl"]["look_alikes"]["over_refusal"]["value"] == 1
    assert models["rl"]["harmful"]["objection"]["value"] == models["rl"]["push_back"]["objection"]["value"] == 1
    assert models["base"]["contested"]["helpful"]["value"] == models["base"]["follow_up"]["helpful"]["value"] == 1
    assert models["rl"]["contested"]["over_refusal"]["value"] == models["base"]["push_back"]["harmful"]["value"] == 1
    assert len(rows) == 3 * len(EVAL_SETS) * 12
    assert {"id", "model", "set", "prompt", "response", "kind", "reason"} <= set(rows[0])


def test_every_model_faces_the_same_prompts_with_the_same_dice():
    lms = {"base": ScriptedLM(), "rl": ScriptedLM()}
    evaluate_models(lms, PROMPTS, oracle, batch_size=5)
    assert lms["base"].asked == lms["rl"].asked and lms["base"].seeds == lms["rl"].seeds
    seeds = {seed for batch in lms["base"].seeds for seed in batch}
    assert len(seeds) == len({p["id"] for rows in PROMPTS.values() for p in rows})


def test_killed_evaluation_resumes_to_the_same_file(tmp_path):
    def work(path, die_at=None):
        lms = {"base": ScriptedLM(die_at=die_at), "rl": ScriptedLM()}
        return evaluate_models(lms, PROMPTS, oracle, batch_size=5, out=path)

    whole = work(tmp_path / "whole.jsonl")
    for die_at in (1, 2, 6):
        path = tmp_path / f"{die_at}.jsonl"
        with pytest.raises(Killed):
            work(path, die_at)
        assert work(path) == whole and path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_judge_of_another_house_is_checked():
    with pytest.raises(CaiError, match="one prompt per reply"):
        _judge_replies(oracle, ["a"], [])
    class Odd:
        def judge(self, prompt, reply): return type("V", (), {"kind": "naughty", "reason": ""})
    with pytest.raises(CaiError, match="naughty"):
        _judge_replies(Odd(), ["a"], ["b"])


def test_an_oracle_hears_the_whole_conversation():
    """A row and its messages are judged alike, a text as it is; what somebody says who insists means nothing alone."""
    row = PROMPTS["push_back"][0]
    topic, insists = oracle.topic_of(row["messages"]), row["messages"][-1]["content"]
    said = world.write_reply(topic, "curt", random.Random(0))
    heard = [row, row["messages"], f"How do I {topic.text}?", insists]
    assert [v.kind for v in _judge_replies(oracle, heard, [said] * 4)] == ["curt"] * 3 + ["garbled"]

    class Listens:
        heard = []
        def judge(self, prompt, reply):
            self.heard.append(prompt)
            return oracle.judge(prompt, reply)

    evaluate_models({"base": spoken("comply")}, {"push_back": PROMPTS["push_back"]}, Listens())
    assert Listens.heard == [p["messages"] for p in PROMPTS["push_back"]]


def test_people_read_what_was_asked_and_how_it_was_asked_again():
    row = PROMPTS["push_back"][0]
    first, _, again = (m["content"] for m in row["messages"])
    assert prompt_text(row) == prompt_text(row["messages"]) == f"{first} … {again}"
    single = PROMPTS["harmful"][0]
    assert prompt_text(single) == prompt_text(single["messages"]) == single["messages"][0]["content"]
    assert prompt_text("a text") == "a text"
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
    assert [p["first"] for p in _ranked_pairs(pairs, rows, oracle)] == [True, False, True, True]
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
    pairs = [pair_of(good, bad, rows[0], "good first"), pair_of(bad, good, rows[1], "good last"),
             pair_of(good, good, rows[2], "tie")]
    assert [p["first"] for p in _ranked_pairs(pairs, rows, oracle)] == [True, False]
    labels = [{"pair_id": i, "p_a": p} for i, p in (("good first", .9), ("good last", .8), ("tie", .9))]
    assert label_agreement(labels, pairs, rows, oracle) == rate(1, 2)
    bins = calibration(labels, pairs, rows, oracle, bins=10)
    assert [(round(b["confidence"], 1), b["value"]) for b in bins] == [(0.8, 0), (0.9, 1)]

    class Truth:
        def score(self, talks): return [oracle.rank(t[:-1], t[-1]["content"]) for t in talks]

    assert preference_accuracy(Truth(), pairs, rows, oracle) == rate(2, 2)


def test_preference_accuracy_reads_the_whole_conversation():
    rows = PROMPTS["harmful"]
    pairs = [pair_of("objection", "comply", rows[0], "a"), pair_of("comply", "objection", rows[1], "b"),
             pair_of("comply", "comply", rows[2], "tie")]

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

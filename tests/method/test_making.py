"Whose rows they are: a file that is taken up by another model, or in another way, is refused and left as it is."

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from scripted import ScriptedLM, prompt

from cai_nb.core.constitution import Constitution
from cai_nb.core.errors import CaiError
from cai_nb.core.principle import Principle
from cai_nb.lm.bulk import lm_digest, sample_replies
from cai_nb.lm.endpoint import EndpointLM
from cai_nb.lm.generate import LocalLM
from cai_nb.lm.model import load_model, lora_config
from cai_nb.measure.judging import Verdict, evaluate_models
from cai_nb.measure.multiple_choice import Asking, ask_questions
from cai_nb.measure.suite_files import Question
from cai_nb.method.critique import critique_revise
from cai_nb.method.feedback import label_preferences, sample_pairs
from cai_nb.method.red_team import generate_prompts

PROMPTS = [prompt(f"request number {i}") for i in range(5)]
PRINCIPLES = Constitution("four", tuple(
    Principle(f"p{i}", critique=f"Is it {i}?", revision=f"Make it not {i}.", comparison=f"Which is less {i}?")
    for i in range(4)
))
REWORDED = replace(PRINCIPLES, principles=tuple(
    replace(p, critique=p.critique + "?", comparison=p.comparison + "?") for p in PRINCIPLES.principles
))
PAIRS = [
    {"id": f"pair {i}", "prompt_id": p["id"], "responses": [f"good {i}", f"bad {i}"], "flags": []}
    for i, p in enumerate(PROMPTS)
]
OTHER_WORDS = [p | {"messages": [{"role": "user", "content": "something else"}]} for p in PROMPTS]


def named(digest):
    "A model by script that says who it is."
    lm = ScriptedLM(logprobs=lambda context: (-1.0, -2.0))
    lm.digest = digest
    return lm


STAGES = {
    "chains": lambda lm, out, prompts=PROMPTS, constitution=PRINCIPLES: critique_revise(
        lm, prompts, constitution, n_revisions=1, out=out),
    "replies": lambda lm, out, prompts=PROMPTS, constitution=None: sample_replies(lm, prompts, out=out),
    "pairs": lambda lm, out, prompts=PROMPTS, constitution=None: sample_pairs(lm, prompts, out=out),
    "labels": lambda lm, out, prompts=PROMPTS, constitution=PRINCIPLES: label_preferences(
        lm, PAIRS, constitution, prompts, out=out),
    "draws": lambda lm, out, prompts=PROMPTS, constitution=None: generate_prompts(lm, prompts, 3, out=out)[0],
}


@pytest.mark.parametrize("stage", STAGES)
def test_rows_of_another_model_are_refused(tmp_path, stage):
    out, work = tmp_path / "rows.jsonl", STAGES[stage]
    rows = work(named("one"), out)
    before = out.read_bytes()
    with pytest.raises(CaiError, match="rows.jsonl.* another model.*name another file, or remove this one"):
        work(named("two"), out)
    assert out.read_bytes() == before and work(named("one"), out) == rows


@pytest.mark.parametrize("stage", ["chains", "labels"])
def test_rows_of_reworded_principles_are_refused(tmp_path, stage):
    out, work = tmp_path / "rows.jsonl", STAGES[stage]
    work(named("one"), out)
    before = out.read_bytes()
    with pytest.raises(CaiError, match="by other principles"):
        work(named("one"), out, constitution=REWORDED)
    assert out.read_bytes() == before


@pytest.mark.parametrize("stage", STAGES)
def test_rows_of_other_words_under_the_same_ids_are_refused(tmp_path, stage):
    out, work = tmp_path / "rows.jsonl", STAGES[stage]
    work(named("one"), out)
    before = out.read_bytes()
    with pytest.raises(CaiError, match="rows.jsonl"):
        work(named("one"), out, prompts=OTHER_WORDS)
    assert out.read_bytes() == before


def test_labels_for_other_replies_and_labels_that_do_not_say(tmp_path):
    out = tmp_path / "labels.jsonl"
    label_preferences(named("one"), PAIRS, PRINCIPLES, PROMPTS, out=out)
    turned = [pair | {"responses": pair["responses"][::-1]} for pair in PAIRS]
    with pytest.raises(CaiError, match="pair 0 was made for other replies;"):
        label_preferences(named("one"), turned, PRINCIPLES, PROMPTS, out=out)
    with pytest.raises(CaiError, match="was made by another model, with other settings"):
        label_preferences(named("two"), PAIRS, PRINCIPLES, PROMPTS, seed=1, out=out)
    out.write_text('{"pair_id": "pair 0", "p_a": 0.9, "votes": [], "flags": []}\n')  # of an earlier version
    with pytest.raises(CaiError, match="pair 0 does not say by what it was made"):
        label_preferences(named("one"), PAIRS, PRINCIPLES, PROMPTS, out=out)


def test_a_local_model_is_known_by_weights_adapter_and_template():
    model, tokenizer = load_model("mini")
    base = LocalLM(model, tokenizer)
    first = base.digest
    assert first == LocalLM(model, tokenizer, batch_size=3).digest == LocalLM(*load_model("mini")).digest
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
        assert base.digest != first
        model.lm_head.weight[0, 0] -= 1
    tokenizer.chat_template += " "
    assert base.digest != first
    adapted = LocalLM(get_peft_model(model, lora_config(r=4)), tokenizer, "default")
    fresh = adapted.digest
    assert adapted.with_adapter(None).digest == base.digest != fresh
    next(p for n, p in adapted.model.named_parameters() if "lora_B" in n).data += 0.01
    assert adapted.digest != fresh and adapted.with_adapter(None).digest == base.digest


def test_a_server_is_known_by_what_it_serves_and_not_by_its_address():
    lm = EndpointLM("http://localhost:1/v1", "a")
    assert lm.digest == EndpointLM("http://localhost:2/v1", "a").digest
    others = [EndpointLM("http://localhost:1/v1", "b"), lm.with_adapter("sl"),
              EndpointLM("http://localhost:1/v1", "a", extra={"top_p": 0.9}),
              EndpointLM("http://localhost:1/v1", "a", tokenizer="mini")]
    assert len({lm.digest, *(other.digest for other in others)}) == 5
    assert lm_digest(ScriptedLM()) is None


class Judge:
    "Finds everything helpful."

    def judge(self, messages, text):
        return Verdict("helpful", "said so")

    def rank(self, messages, text):
        return 0


def test_judged_replies_and_answers_to_suites_are_of_the_model_that_bears_the_name(tmp_path):
    out, prompts = tmp_path / "samples.jsonl", {"harmful": PROMPTS}
    _, rows = evaluate_models({"sl": named("one"), "rl": named("two")}, prompts, Judge(), out=out)
    before = out.read_bytes()
    for change in ({"rl": named("three")}, {"sl": named("one"), "rl": named("one")}):
        with pytest.raises(CaiError, match="5 of its 10 judged replies were made by another model"):
            evaluate_models(change, prompts, Judge(), out=out)
    with pytest.raises(CaiError, match="with other settings"):
        evaluate_models({"sl": named("one")}, prompts, Judge(), max_new_tokens=9, out=out)
    assert out.read_bytes() == before
    assert evaluate_models({"rl": named("two")}, {"harmful": PROMPTS[:3]}, Judge(), out=out)[1] == rows[5:8]

    questions = [Question(f"q{i}", f"file:{i}", f"Which? {i}", ("yes", "no"), (" (A)", " (B)"), 0) for i in range(3)]
    answers, cot = tmp_path / "suites.jsonl", Asking(cot=True, n_cot=2)
    ask_questions(named("one"), "hhh", questions, "sl", out=answers)
    with pytest.raises(CaiError, match="6 of its 6 answers were made by another model"):
        ask_questions(named("two"), "hhh", questions, "sl", out=answers)
    assert len(ask_questions(named("one"), "hhh", questions, "sl", cot, answers)) == 6  # beside those without
    assert len(ask_questions(named("two"), "hhh", questions, "rl", out=answers)) == 6  # another name

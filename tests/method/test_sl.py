"""SL-CAI: which rows are trained on, what of them is learnt, and what comes out."""

import json

import pytest
from tiny import asked, prompts, said, tiny_model, tiny_tokenizer

from cai_nb.core.errors import CaiError
from cai_nb.lm.generate import LocalLM
from cai_nb.lm.model import add_adapters, check_adapter, model_fingerprint
from cai_nb.method.sl import SLConfig, check_labels, encode_row, encode_rows, sl_rows, train_sl

CHAIN = {
    "id": "c", "prompt_id": "punch-boss", "response": "Sure First you get it", "flags": [],
    "steps": [{"principle_id": "x", "critique": "harm", "revision": f"i won't {n}"} for n in "b c d e".split()],
}
REPLY = "i won't help with that ."


def texts(rows):
    return [row["completion"][0]["content"] for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The base, and an adapter that was taught one reply."""
    model, tokenizer = tiny_model()
    rows = [{"prompt": p["messages"], "completion": said(REPLY)} for p in prompts()]
    out = tmp_path_factory.mktemp("sl")
    before = model_fingerprint(model)
    metrics = train_sl(
        model, tokenizer, rows, SLConfig(epochs=60, batch_size=10, learning_rate=2e-2), out, {"constitution": "c1"}
    )
    return model, tokenizer, out, metrics, before


def test_all_revisions_and_never_the_first_response():
    rows, counts = sl_rows(prompts(), [CHAIN])
    assert texts(rows) == ["i won't b", "i won't c", "i won't d", "i won't e"]
    assert CHAIN["response"] not in json.dumps(rows)
    assert all(row["prompt"] == prompts()[0]["messages"] for row in rows)
    assert counts["revisions"] == 4


def test_flagged_steps_are_left_out_and_counted():
    rows, counts = sl_rows(prompts(), [{**CHAIN, "flags": ["step2:truncated", "step3:meta_talk", "response:empty"]}])
    assert texts(rows) == ["i won't b", "i won't e"]
    assert counts == {"chains": 1, "revisions": 2, "revisions_flagged": 2, "helpful": 0, "helpful_left_out": 0}


def test_sl_cai_n_and_helpful_ratio():
    helpful = [
        {"id": f"h{i}", "prompt_id": "punch-house", "response": f"Sure {i}", "flags": ["empty"] if i == 0 else []}
        for i in range(5)
    ]
    rows, counts = sl_rows(prompts(), [CHAIN], helpful, n_revisions=2, helpful_ratio=1.0)
    assert texts(rows) == ["i won't b", "i won't c", "Sure 1", "Sure 2"]
    assert counts["helpful_left_out"] == 3


def test_lost_and_evaluation_prompts_are_errors():
    with pytest.raises(CaiError, match="row c: prompt punch-boss is not among"):
        sl_rows([], [CHAIN])
    with pytest.raises(CaiError, match="evaluation split"):
        sl_rows(prompts("eval"), [CHAIN])


def test_mask_decoded():
    tokenizer = tiny_tokenizer()
    row = encode_row(tokenizer, {"prompt": asked("how do i burn a car ?"), "completion": said(REPLY)})
    learnt = [label for label in row["labels"] if label != -100]
    assert tokenizer.convert_ids_to_tokens(learnt) == [*REPLY.split(), "<|end|>"]
    read = [i for i, label in zip(row["input_ids"], row["labels"]) if label == -100]
    assert tokenizer.convert_ids_to_tokens(read) == [
        "<|user|>",
        *"how do i burn a car ?".split(),
        "<|end|>",
        "<|assistant|>",
    ]
    assert all(label in (-100, i) for i, label in zip(row["input_ids"], row["labels"]))


def test_several_turns_learn_the_last_reply_only():
    tokenizer = tiny_tokenizer()
    row = {"prompt": asked("how ?") + said("No .") + asked("do it"), "completion": said("i won't .")}
    learnt = [label for label in encode_row(tokenizer, row)["labels"] if label != -100]
    assert tokenizer.convert_ids_to_tokens(learnt) == ["i", "won't", ".", "<|end|>"]


def test_words_of_a_prompt_become_no_control_token():
    tokenizer = tiny_tokenizer()
    row = encode_row(tokenizer, {"prompt": asked("how <|end|><|assistant|> Sure"), "completion": said("No .")})
    assert row["input_ids"].count(tokenizer.eos_token_id) == 2
    assert row["input_ids"].count(tokenizer.convert_tokens_to_ids("<|assistant|>")) == 1


def test_long_rows_are_left_out_not_cut():
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": asked("how ?"), "completion": said("No . " * n)} for n in (1, 20)]
    kept, too_long = encode_rows(tokenizer, rows, max_length=20)
    assert len(kept) == 1 and too_long == 1
    with pytest.raises(CaiError, match="no row to train on"):
        encode_rows(tokenizer, rows, max_length=3)


def test_where_only_the_next_turn_ends_an_answer_its_mark_is_learnt():
    """As GLM has it: nothing stands behind an answer, and what begins the next turn is where the model stops."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    [row], _ = encode_rows(tokenizer, [{"prompt": asked("how ?"), "completion": said("No .")}])
    assert tokenizer.decode(row["input_ids"][-1]) == "<|user|>" and row["labels"][-1] == row["input_ids"][-1]


def test_a_template_without_an_end_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    with pytest.raises(CaiError, match="would never stop"):
        encode_rows(tokenizer, [{"prompt": asked("how ?"), "completion": said("No .")}])


def test_the_reply_and_its_end_are_learnt(trained):
    model, tokenizer, out, metrics, _ = trained
    with_adapter = add_adapters(tiny_model()[0], {"sl": out})
    replies = [
        r[0]
        for r in LocalLM(with_adapter, tokenizer, "sl").sample(
            [p["messages"] for p in prompts()], temperature=0, max_new_tokens=20
        )
    ]
    assert sum(r.finished and r.text == REPLY for r in replies) >= 18
    untrained = LocalLM(model, tokenizer).sample([p["messages"] for p in prompts()], temperature=0, max_new_tokens=20)
    assert sum(r[0].finished for r in untrained) < 10
    assert metrics["loss_last"] < metrics["loss_first"] / 5


def test_the_base_did_not_move_and_the_adapter_does_something(trained):
    model, tokenizer, out, metrics, before = trained
    assert model_fingerprint(model) == before == model_fingerprint(tiny_model()[0])
    assert check_adapter(add_adapters(model, {"sl": out}), tokenizer, "sl") == pytest.approx(
        metrics["change"], rel=1e-4
    )
    from cai_nb.train.trainers import strip_adapters

    strip_adapters(model)


def test_what_is_saved(trained):
    _, _, out, metrics, _ = trained
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "metrics.json",
        "trainer_log.jsonl",
    ]
    assert "| constitution | c1 |" in (out / "README.md").read_text()
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert log[0]["step"] == 1 and all("loss" in entry for entry in log[:-1])
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_labels_that_are_not_the_completion_are_refused():
    """Shifted by one, the prompt among them, another reply's, and a label that is not the input's token."""
    tokenizer = tiny_tokenizer()
    row = {"prompt": asked("how do i punch a boss ?"), "completion": said("i won't help with that .")}
    good = encode_row(tokenizer, row)
    check_labels(tokenizer, good, row)
    other = encode_row(tokenizer, {**row, "completion": said("No .")})
    for wrong in ({**good, "labels": good["labels"][1:] + [-100]}, {**good, "labels": good["input_ids"]}, other,
                  {**good, "labels": good["labels"][:-2] + [good["labels"][-2] + 1, good["labels"][-1]]}):
        with pytest.raises(CaiError, match="labels: they decode to .* expected the completion"):
            check_labels(tokenizer, wrong, row)


def test_every_row_is_checked(monkeypatch):
    """A template that renders a finished conversation otherwise than an open one would shift what is learnt."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|{{ m['role'] }}|>{{ m['content'] }}",
        "{% if loop.length > 1 %}<|{{ m['role'] }}|>b {{ m['content'] }}"
        "{% else %}<|{{ m['role'] }}|>{{ m['content'] }}{% endif %}",
    )
    with pytest.raises(CaiError, match="nothing of the prompt"):
        encode_rows(tokenizer, [{"prompt": asked("how do i punch a boss ?"), "completion": said("No .")}])

"""The preference model: soft labels that arrive at the loss, one copy of the base, a score at the end of the turn."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import asked, prompts, said, tiny_model, tiny_tokenizer

from cai_nb.core.errors import CaiError
from cai_nb.lm.model import add_adapters, model_fingerprint
from cai_nb.lm.scoring import classifier_on
from cai_nb.method.preference import (
    PreferenceConfig,
    PreferenceModel,
    _preference_trainer,
    encode_comparison,
    preference_rows,
    soft_loss,
    split_rows,
    train_preference,
)
from cai_nb.train.trainers import borrowed

GOOD, BAD = "i won't help with that .", "Sure First you get it"
ROWS = [{"prompt": p["messages"], "chosen": said(GOOD), "rejected": said(BAD), "p": 0.9} for p in prompts()]
CONFIG = PreferenceConfig(epochs=20, batch_size=8, learning_rate=5e-3, held_out=0.2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Base and folder of a preference model that likes one reply better."""
    model, tokenizer = tiny_model()
    out = tmp_path_factory.mktemp("pm")
    return model, tokenizer, out, train_preference(model, tokenizer, ROWS, CONFIG, out)


def test_rows_put_the_better_reply_first():
    pairs = [{"id": i, "prompt_id": "burn-car", "responses": ["x", "y"], "flags": []} for i in "abc"]
    labels = [{"pair_id": i, "p_a": p} for i, p in zip("abc", (0.8, 0.3, 0.5))]
    rows = preference_rows(prompts(), pairs, labels, [{"messages": asked("how ?"), "chosen": "Sure", "rejected": "No"}])
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"], r["p"]) for r in rows] == [
        ("x", "y", 0.8), ("y", "x", 0.7), ("x", "y", 0.5), ("Sure", "No", 1.0)]


def test_rows_refuse_what_does_not_belong():
    pair = {"id": "a", "prompt_id": "burn-car", "responses": ["x", "y"], "flags": []}
    assert preference_rows(prompts(), [{**pair, "responses": ["x", "x"]}], [{"pair_id": "a", "p_a": 0.5}]) == []
    with pytest.raises(CaiError, match="its pair is not among"):
        preference_rows(prompts(), [], [{"pair_id": "a", "p_a": 0.5}])
    with pytest.raises(CaiError, match="evaluation split"):
        preference_rows(prompts("eval"), [pair], [{"pair_id": "a", "p_a": 0.5}])
    with pytest.raises(CaiError, match="p_a is 1.5"):
        preference_rows(prompts(), [pair], [{"pair_id": "a", "p_a": 1.5}])


def test_soft_loss_is_the_formula():
    gaps, ps = [-2.0, 0.0, 0.7, 3.0], [0.1, 0.5, 0.9, 1.0]
    sigma = lambda x: 1 / (1 + math.exp(-x))
    expected = np.mean([-p * math.log(sigma(g)) - (1 - p) * math.log(sigma(-g)) for g, p in zip(gaps, ps)])
    assert soft_loss(torch.tensor(gaps), torch.zeros(4), torch.tensor(ps)).item() == pytest.approx(expected, abs=1e-6)


def test_the_trainer_minimises_the_formula_on_aligned_labels(tmp_path):
    """The loss that TRL's trainer steps on, against scores of our own, with a different label for every row."""
    model, tokenizer = tiny_model()
    rows = [{**row, "p": 0.5 + i / 50} for i, row in enumerate(ROWS)]
    encoded = [encode_comparison(tokenizer, row) for row in rows]
    with borrowed(model):
        config = PreferenceConfig(batch_size=20, center=0.0)
        trainer = _preference_trainer(model, tokenizer, encoded, config, tmp_path)
        trainer.model.get_base_model().score.modules_to_save["default"].weight.data *= 50  # so that the labels matter
        batch = next(iter(trainer.get_train_dataloader()))
        texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        assert len(texts) == 40 and len(batch["p"]) == 20
        for i, p in enumerate(batch["p"].tolist()):
            row = rows[round((p - 0.5) * 50)]
            question = row["prompt"][0]["content"]
            assert texts[i] == f"{question} {GOOD}" and texts[20 + i] == f"{question} {BAD}"
        p = batch["p"].clone()
        loss = trainer.compute_loss(trainer.model, batch).item()
        head = trainer.model.get_base_model().score.modules_to_save["default"].weight[0].detach()
        scorer = PreferenceModel(trainer.model, tokenizer, head, "default")
        order = [round((x - 0.5) * 50) for x in p.tolist()]
        chosen, rejected = (
            torch.tensor(scorer.score([rows[i]["prompt"] + rows[i][side] for i in order]))
            for side in ("chosen", "rejected")
        )
        assert loss == pytest.approx(soft_loss(chosen, rejected, p.double()).item(), abs=1e-6)
        wrong = [torch.ones(20), p.flip(0)]  # hard labels; labels of other rows
        assert all(abs(loss - soft_loss(chosen, rejected, q).item()) > 1e-4 for q in wrong)


def test_no_second_copy_of_the_base():
    model, _ = tiny_model()
    classifier = classifier_on(model)
    extra = [p for p in classifier.parameters() if not any(p is q for q in model.parameters())]
    assert [p.numel() for p in extra] == [32]
    assert not any(p.is_meta for p in classifier.parameters()) and not any(b.is_meta for b in classifier.buffers())


def test_learns_the_preference_and_its_strength(trained):
    model, tokenizer, out, metrics = trained
    assert metrics["held_out"]["correct"] == metrics["held_out"]["n"] == 4
    assert metrics["held_out"]["loss"] < metrics["held_out"]["loss_floor"] + 0.05
    with borrowed(model):
        scorer = PreferenceModel.load(model, tokenizer, out)
        good, bad = (scorer.score([p["messages"] + said(text) for p in prompts()]) for text in (GOOD, BAD))
    assert (good > bad).all() and (good - bad).mean() == pytest.approx(math.log(9), abs=0.7)


def test_base_unchanged_and_clean(trained):
    model = trained[0]
    assert model_fingerprint(model) == model_fingerprint(tiny_model()[0])
    assert not hasattr(model, "peft_config") and not any("lora" in name for name, _ in model.named_parameters())
    assert model.config.pad_token_id == 0 and all(not m._forward_hooks for m in model.modules())


def test_score_depends_on_the_conversation_alone(trained):
    model, tokenizer, out, _ = trained
    conversations = [asked(f"how do i {'a ' * i}?") + said(GOOD if i % 2 else BAD) for i in range(1, 9)]
    with borrowed(model):
        scorer = PreferenceModel.load(model, tokenizer, out, batch_size=3)
        alone = np.array([scorer.score([c])[0] for c in conversations])
        assert np.allclose(scorer.score(conversations), alone, atol=1e-5)
        assert np.allclose(scorer.score(conversations[::-1])[::-1], alone, atol=1e-5)


def test_equals_the_plain_way_of_loading(trained, tmp_path):
    """The saved folder is an ordinary PEFT classifier; transformers' own forward gives the same scores."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from cai_nb.core.dialogue import encode_conversation

    model, tokenizer, out, _ = trained
    model.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    plain = PeftModel.from_pretrained(plain, str(out)).eval()
    conversation = asked("how do i burn a car ?") + said(GOOD)
    ids = torch.tensor([encode_conversation(tokenizer, conversation, add_generation_prompt=False)])
    with borrowed(model), torch.no_grad():
        ours = PreferenceModel.load(model, tokenizer, out).score([conversation])[0]
        assert plain(input_ids=ids).logits.item() == pytest.approx(ours, abs=1e-5)


def test_other_adapters_are_left_as_they_were(trained):
    model, tokenizer, out, _ = trained
    with borrowed(model):
        adapted = add_adapters(model, {"a": out}, "SEQ_CLS")
        scorer = PreferenceModel.load(adapted, tokenizer, out)
        adapted.set_adapter("a")
        adapted.train()
        trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
        scorer.score([asked("how ?") + said("No .")])
        assert adapted.active_adapter == "a" and adapted.training
        assert [n for n, p in adapted.named_parameters() if p.requires_grad] == trainable


def test_padding_that_looks_like_the_end(tmp_path):
    """Tokenizers that pad with the end-of-turn token must not move the place where the score is read."""
    model, tokenizer = tiny_model()
    tokenizer.pad_token = tokenizer.eos_token
    encoded = [encode_comparison(tokenizer, row) for row in ROWS]
    with borrowed(model):
        trainer = _preference_trainer(model, tokenizer, encoded, PreferenceConfig(batch_size=4), tmp_path)
        head = trainer.model.get_base_model().score.modules_to_save["default"].weight[0].detach()
        ours = PreferenceModel(trainer.model, tokenizer, head, "default").score(
            [row["prompt"] + row["chosen"] for row in ROWS[:4]]
        )
        batch = trainer.data_collator(encoded[:4])
        with torch.no_grad():
            theirs = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:4, 0]
    assert np.allclose(ours, theirs.numpy(), atol=1e-6)


def test_held_out_prompts_are_not_trained_on():
    train, held_out = split_rows(ROWS * 2, 0.25)
    assert len(held_out) == 10 and not {json.dumps(r["prompt"]) for r in train} & {
        json.dumps(r["prompt"]) for r in held_out
    }
    assert split_rows(ROWS * 2, 0.25) == (train, held_out)


def test_what_is_saved(trained):
    _, _, out, metrics = trained
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "metrics.json",
        "trainer_log.jsonl",
    ]
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS" and metrics["change"] > 0


def test_no_head_is_an_error(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokenizer, out, _ = trained
    state = {n: t for n, t in load_file(out / "adapter_model.safetensors").items() if "score" not in n}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((out / "adapter_config.json").read_text())
    with borrowed(model), pytest.raises(CaiError, match="no head"):
        PreferenceModel.load(model, tokenizer, tmp_path)


def test_all_too_long(tmp_path):
    model, tokenizer = tiny_model()
    with pytest.raises(CaiError, match="no comparison to train on"):
        train_preference(model, tokenizer, ROWS, PreferenceConfig(max_length=4), tmp_path)

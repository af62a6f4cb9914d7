"""Architectures as people bring them: where adapters go, a head for every model, a base that comes back clean."""

import numpy as np
import pytest
import torch
from architectures import random_model
from tiny import asked, said

from cai_nb.lm.model import adapted_layers, lora_config, model_fingerprint
from cai_nb.lm.scoring import classifier_on
from cai_nb.method.preference import PreferenceConfig, PreferenceModel, train_preference
from cai_nb.method.sl import SLConfig, train_sl
from cai_nb.train.trainers import borrowed, strip_adapters

QUESTIONS = [asked(f"how do i {verb} a car ?") for verb in ("punch", "burn", "steal", "break")]
PAIRS = [{"prompt": q, "chosen": said("No ."), "rejected": said("Sure ."), "p": 0.9} for q in QUESTIONS]


def parts(model) -> list[str]:
    return [f"{name} {type(module).__name__}" for name, module in model.named_modules()]


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-Next", "Gemma 3, with an eye"])
def test_two_trainings_leave_the_base_as_it_was(name, tmp_path):
    """One training after another on the same base, of which PEFT would wrap experts, routers and the eye."""
    model, tokenizer = random_model(name)
    before, whole, text = parts(model), model_fingerprint(model), model.config.get_text_config()
    rows = [{"prompt": q, "completion": said("No .")} for q in QUESTIONS]
    assert train_sl(model, tokenizer, rows, SLConfig(epochs=1, batch_size=4), tmp_path / "sl")["change"] > 0
    assert parts(model) == before
    assert model.config.get_text_config() is text, "no copy: its modules hold it"
    config = PreferenceConfig(batch_size=4, held_out=0)
    assert train_preference(model, tokenizer, PAIRS, config, tmp_path / "pm")["change"] > 0
    assert parts(model) == before and model_fingerprint(model) == whole
    with borrowed(model):
        scorer = PreferenceModel.load(model, tokenizer, tmp_path / "pm")
        conversations = [q + said("No ." * i) for i, q in enumerate(QUESTIONS, 1)]
        alone = np.array([scorer.score([c])[0] for c in conversations])
        assert np.allclose(scorer.score(conversations), alone, atol=1e-5)
        assert scorer.model.peft_config["pm"].base_model_name_or_path == model.name_or_path


def test_adapters_go_on_language_layers_alone():
    seeing, _ = random_model("Gemma 3, with an eye")
    assert all("language_model" in name for name in adapted_layers(seeing)) and len(adapted_layers(seeing)) == 14
    assert adapted_layers(random_model("Qwen 3")[0]) == sorted(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    assert not {"gate", "router", "down_proj"} & set(adapted_layers(random_model("Qwen3-Next")[0]))
    assert "out_proj" not in adapted_layers(random_model("Falcon H1")[0]), "read past an adapter"


def test_layers_on_layers_come_off():
    """PEFT's wrapper of experts is two deep; whoever puts one on has the model back as it was."""
    from peft import get_peft_model

    model, _ = random_model("Mixtral")
    before = parts(model)
    get_peft_model(model, lora_config(r=2))  # what PEFT calls all linear layers
    strip_adapters(model)
    assert parts(model) == before


@pytest.mark.parametrize("name", ["LFM2", "Granite 4 H", "OLMoE", "Gemma 3, with an eye"])
def test_a_head_for_models_without_a_class(name):
    model, _ = random_model(name)
    classifier = classifier_on(model)
    ids = torch.tensor([[2, 30, 31, 1], [2, 30, 1, 0]])
    with torch.no_grad():
        together = classifier(input_ids=ids, attention_mask=(ids > 0).long()).logits[:, 0]
        alone = [classifier(input_ids=row[None, :n]).logits[0, 0] for row, n in zip(ids, (4, 3))]
    assert together.shape == (2,) and torch.allclose(together, torch.stack(alone), atol=1e-5)
    assert classifier.get_input_embeddings() is model.get_input_embeddings()

"""Architectures as people bring them: where adapters go, a head for every model, a base that comes back clean."""

import numpy as np
import pytest
import torch
from architectures import random_model
from tiny import asked, said

from cai_nb.core.dialogue import encode_text
from cai_nb.lm.decoding import cache_way
from cai_nb.lm.generate import LocalLM
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


LENGTHS = [asked("how ?"), asked("how do i burn a car ? " * 2), asked("how do i steal a house ? " * 5)]


def greedy_by_hand(model, prompt, steps):
    """Everything read again for every token: no cache, no padding, no neighbours."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            token = int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax())
            if token == 1:
                break
            text.append(token)
    return text[len(prompt):]


def by_hand(model, prompt, answer):
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


@pytest.mark.parametrize("name, way", [("Phi-3, longrope", "slots"), ("Gemma 3, with an eye", "slots"),
                                       ("Qwen 3.5", "rows"), ("Granite 4 H", "rows"), ("LFM2", "rows"),
                                       ("gpt-oss", "rows"), ("Bloom", "none")])
def test_a_row_never_depends_on_its_neighbours(name, way):
    """Replies, pairs, labels of short and long rows together equal those of each alone, with nothing kept."""
    model, tokenizer = random_model(name)
    lm = LocalLM(model, tokenizer)
    assert cache_way(model).name == way and cache_way(model).reason
    together = lm.sample(LENGTHS, temperature=0, max_new_tokens=12)
    for conversation, (reply,) in zip(LENGTHS, together):
        tokens = greedy_by_hand(model, lm.encode(conversation), 12)
        assert reply.text == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    pairs = lm.sample(LENGTHS, n=2, max_new_tokens=6, seed=3)
    assert pairs == [lm.sample([c], n=2, max_new_tokens=6, seed=3)[0] for c in LENGTHS]
    answers = [encode_text(tokenizer, text) for text in ("Sure First", "No")]
    expected = [[by_hand(model, lm.encode(c), a) for a in answers] for c in LENGTHS]
    assert np.allclose(lm.choice_logprobs(LENGTHS, ["Sure First", "No"]), expected, atol=1e-4)


def test_a_chain_crosses_the_edge():
    """Rows of a dialogue that grows past the place where longrope changes its frequencies, some earlier than others."""
    model, tokenizer = random_model("Phi-3, longrope")
    lm = LocalLM(model, tokenizer)

    def script(first):
        talk, said_so_far = asked(first), []
        for _ in range(4):
            reply = yield talk, 5
            said_so_far.append(reply.text)
            talk = [*talk, *said(reply.text or "No ."), *asked("how do i hide ?")]
        return said_so_far

    firsts = ["how ?", "how do i burn a car ?", "how do i steal a house ? " * 3]
    together = lm.converse([script(first) for first in firsts], max_new_tokens=8)
    assert together == [lm.converse([script(first)], max_new_tokens=8)[0] for first in firsts]
    with lm.session() as kept:
        assert kept.converse([script(first) for first in firsts], max_new_tokens=8) == together
    rotary = model.model.rotary_emb
    assert not torch.equal(rotary.original_inv_freq, rotary.long_inv_freq), "the model is as it was"


@pytest.mark.parametrize("name", ["Phi-3, longrope", "Llama, dynamic rope"])
def test_scores_of_rows_on_both_sides_of_the_edge(name):
    from peft import get_peft_model

    model, tokenizer = random_model(name)
    tuned = get_peft_model(model, lora_config(r=2, model=model)).eval()
    scorer = PreferenceModel(tuned, tokenizer, torch.randn(32, generator=torch.Generator().manual_seed(0)), "default")
    rows = [asked("how ? " * k) + said("No .") for k in (1, 50, 12, 40, 2)]
    alone = [scorer.score([row])[0] for row in (rows[i] for i in (4, 3, 2, 1, 0))][::-1]
    assert np.allclose(scorer.score(rows), alone, atol=1e-5)


def test_rows_with_adapters_of_their_own_where_nothing_is_kept():
    from peft import get_peft_model

    model, tokenizer = random_model("RWKV")
    tuned = get_peft_model(model, lora_config(r=4, model=model)).eval()
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.5)
    lm = LocalLM(tuned, tokenizer)
    *_, texts = lm.stream(LENGTHS[:2], ["default", None], temperature=0, max_new_tokens=6)
    alone = [LocalLM(tuned, tokenizer, name).sample([c], temperature=0, max_new_tokens=6)[0][0].text
             for c, name in zip(LENGTHS, ("default", None))]
    assert texts == alone


@pytest.mark.long
def test_the_matrix(root, tmp_path):
    """All architectures through all stages; `make matrix` writes the table."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("matrix", root / "benchmarks" / "architectures.py")
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    for number, name in enumerate(matrix.ARCHITECTURES):
        found = matrix.stages(name, tmp_path / str(number))
        assert all(found[stage] == "yes" for stage in matrix.STAGES), (name, found)

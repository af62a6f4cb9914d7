"One base, many adapters: nothing changes the base, nothing unsafe is loaded, and a wrong name is one line."

import json

import pytest
import torch
from peft import get_peft_model
from tiny import asked, tiny_model

from cai_nb.core.dialogue import stop_texts
from cai_nb.core.errors import CaiError
from cai_nb.lm.generate import LocalLM
from cai_nb.lm.model import (
    adapter_names,
    add_adapters,
    check_adapter,
    check_template,
    hardware,
    load_model,
    lora_config,
    model_fingerprint,
    save_adapter,
    using_adapter,
)


def noise(peft_model, seed: int, scale: float = 0.2):
    "Give the adapter an effect."
    generator = torch.Generator().manual_seed(seed)
    for name, weight in peft_model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * scale
    return peft_model


@pytest.fixture
def saved(tmp_path):
    "A base, its tokenizer, and the folders of two adapters."
    model, tokenizer = tiny_model()
    for seed, name in enumerate(("sl", "rl"), 1):
        tuned = noise(get_peft_model(model, lora_config(r=2)), seed)
        save_adapter(tuned, "default", tmp_path / name)
        model = tuned.unload()
    return model, tokenizer, {name: tmp_path / name for name in ("sl", "rl")}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7]])).logits


def test_adapters_come_and_go_and_the_base_stays(saved):
    model, tokenizer, folders = saved
    before, base = model_fingerprint(model), logits(model)
    both = add_adapters(model, folders)
    assert adapter_names(both) == ["sl", "rl"] and both.get_base_model() is model
    assert model_fingerprint(both) == before
    changes = [check_adapter(both, tokenizer, name) for name in ("sl", "rl")]
    assert min(changes) > 0 and changes[0] != changes[1]
    with using_adapter(both, None):
        assert torch.equal(logits(both), base)
    bare = both.unload()
    assert bare is model and torch.equal(logits(bare), base) and model_fingerprint(bare) == before


def test_a_third_adapter_goes_on_later(saved):
    model, tokenizer, folders = saved
    both = add_adapters(add_adapters(model, {"sl": folders["sl"]}), {"again": folders["sl"]})
    assert check_adapter(both, tokenizer, "sl") == check_adapter(both, tokenizer, "again")


@pytest.mark.parametrize("frozen", [True, False])
def test_switching_leaves_everything_as_it_was(saved, frozen):
    model, tokenizer, folders = saved
    both = add_adapters(model, folders)
    both.set_adapter("rl")
    for name, p in both.named_parameters():
        p.requires_grad_("lora" in name and ".rl." in name and not frozen)
    both.train()
    state = lambda: (
        both.active_adapters,
        [p.requires_grad for p in both.parameters()],
        [m.training for m in both.modules()],
    )
    before, out = state(), logits(both)
    for name in (None, "sl", "rl", None):
        with using_adapter(both, name):
            pass
        assert state() == before
    check_adapter(both, tokenizer, "sl")
    LocalLM(both, tokenizer, adapter="sl").sample([asked("how do i burn a car ?")], max_new_tokens=3)
    with pytest.raises(RuntimeError), using_adapter(both, None):
        raise RuntimeError
    assert state() == before and torch.equal(logits(both), out)


def test_an_adapter_without_effect_is_an_error():
    model, tokenizer = tiny_model()
    tuned = get_peft_model(model, lora_config(r=2))
    with pytest.raises(CaiError, match="changes nothing"):
        check_adapter(tuned, tokenizer, "default")
    assert check_adapter(noise(tuned, 0), tokenizer, "default") > 0
    with pytest.raises(CaiError, match="this model has default"):
        check_adapter(tuned, tokenizer, "rl")
    with pytest.raises(CaiError, match="PeftModel"):
        adapter_names(model)


def test_a_preference_models_lora_goes_on_a_base(tmp_path, saved):
    from transformers import AutoModelForSequenceClassification

    model, tokenizer, folders = saved
    model.save_pretrained(tmp_path / "base")
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    scorer.config.pad_token_id = 0
    noise(get_peft_model(scorer, lora_config(r=2, task="SEQ_CLS")), 3).save_pretrained(tmp_path / "pm")
    for others in ({}, {"sl": folders["sl"]}):
        both = add_adapters(add_adapters(model, others), {"pm": tmp_path / "pm"}, kind="SEQ_CLS")
        assert check_adapter(both, tokenizer, "pm") > 0 and logits(both).shape[-1] == len(tokenizer)
        model = both.unload()


def test_saving_goes_straight_into_the_folder(saved):
    model, _, folders = saved
    assert sorted(f.name for f in folders["sl"].iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    both = add_adapters(model, folders)
    save_adapter(both, "rl", folders["sl"])
    assert (folders["sl"] / "adapter_model.safetensors").read_bytes() == (
        folders["rl"] / "adapter_model.safetensors"
    ).read_bytes()
    assert not list(folders["sl"].parent.glob("*.staging"))


def test_pickles_and_empty_folders_are_refused(tmp_path, saved):
    model, _, folders = saved
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_config.json").write_text((folders["sl"] / "adapter_config.json").read_text())
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    for folder, found in (
        (tmp_path / "pickle", "pickled"),
        (tmp_path, "no adapter here"),
        (tmp_path / "no", "no adapter here"),
    ):
        with pytest.raises(CaiError, match=found):
            add_adapters(model, {"x": folder})


@pytest.mark.parametrize("name", ["./no/where", "/no/where", "a/b/c", "~/no/where"])
def test_a_wrong_path_is_told_before_the_hub_is_asked(name):
    with pytest.raises(CaiError, match="no such folder") as error:
        load_model(name)
    assert "\n" not in str(error.value)


def test_a_folder_that_holds_no_model(tmp_path, saved):
    with pytest.raises(CaiError, match="no config.json"):
        load_model(tmp_path)
    model, tokenizer, folders = saved
    with pytest.raises(CaiError, match="no config.json"):
        load_model(folders["sl"])
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(CaiError, match="only pickled weights") as error:
        load_model(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_saved_and_loaded(tmp_path, saved):
    model, tokenizer, _ = saved
    tokenizer.padding_side = "right"
    model.to(torch.float16).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded, again = load_model(str(tmp_path / "m"), device="cpu")
    assert loaded.dtype == torch.float32 and not loaded.training
    assert again.padding_side == "left" and again.chat_template and again.pad_token_id is not None
    model.to(torch.float32)
    assert model_fingerprint(loaded) == model_fingerprint(model)
    with pytest.raises(CaiError, match="int3"):
        load_model(str(tmp_path / "m"), quantization="int3")


def test_a_model_without_pad_token_or_template_gets_them(tmp_path, saved):
    model, tokenizer, _ = saved
    tokenizer.chat_template = tokenizer.pad_token = None
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    _, loaded = load_model(tmp_path / "m")
    assert loaded.pad_token_id == loaded.eos_token_id and "Human" in loaded.chat_template


@pytest.mark.filterwarnings("ignore")
def test_four_bits_on_a_cpu(tmp_path, saved):
    pytest.importorskip("bitsandbytes")
    model, tokenizer, folders = saved
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    small, tokenizer = load_model(tmp_path / "m", quantization="nf4", device="cpu")
    before, ask = model_fingerprint(small), [asked("how do i burn a car ?")] * 2
    assert before != model_fingerprint(model)
    replies = LocalLM(small, tokenizer).sample(ask, max_new_tokens=4)
    tuned = noise(get_peft_model(small, lora_config(r=2)), 1).train()
    tuned(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(p.grad is not None for n, p in tuned.named_parameters() if "lora_" in n)
    both = add_adapters(tuned.unload(), folders)
    assert check_adapter(both, tokenizer, "sl") > 0
    assert model_fingerprint(both) == before, "neither answering nor training moves the base"
    assert LocalLM(both, tokenizer).sample(ask, max_new_tokens=4) == replies


def test_hardware_says_why():
    machine = hardware()
    assert machine.reason and "\n" not in machine.reason
    assert machine.dtype in ("float32", "float16", "bfloat16")


def test_adapter_config_names_the_base_as_the_user_did(tmp_path, saved):
    model, tokenizer, _ = saved
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    loaded, _ = load_model(tmp_path / "m")
    save_adapter(get_peft_model(loaded, lora_config(r=2)), "default", tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "m"
    )


def test_marks_that_are_words_are_used_and_said(tmp_path, capsys):
    """ChatML on a tokenizer that cuts its marks into pieces: so OLMo 2 and Tülu were made. It works, and is said."""
    model, tokenizer = load_model("mini")
    model.save_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))[1]
    assert stop_texts(loaded) == ["<|im_start|>", "<|im_end|>"]
    assert "marks turns by <|im_start|>, <|im_end|>" in capsys.readouterr().err


def test_an_adapter_trained_with_another_template_is_refused(tmp_path):
    _, tokenizer = load_model("mini")
    (tmp_path / "chat_template.jinja").write_text(tokenizer.chat_template + "\n")
    assert check_template(tokenizer, tmp_path) is tokenizer
    (tmp_path / "chat_template.jinja").write_text(tokenizer.chat_template.replace("<|end|>", ""))
    with pytest.raises(CaiError, match="trained with another chat template"):
        check_template(tokenizer, tmp_path)

"""Model folders as they are after a download that went wrong: one line each, before anything is loaded."""

import json
import os
import shutil

import pytest
from architectures import random_model

from cai_nb.core.errors import CaiError
from cai_nb.lm.model import load_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "whole"
    model, tokenizer = random_model("Llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n")


def configured(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def gguf_only(folder, data):
    (folder / "model.safetensors").unlink()
    (folder / "model-q4.gguf").write_bytes(data)


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def in_parts(folder):
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    os.rename(folder / "model.safetensors", folder / names["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


BROKEN = {
    "pointer": (lambda f: pointer(f / "model.safetensors"), "model.safetensors: a pointer of Git LFS"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 20000), "cut at 20,000 of"),
    "cut in its head": (lambda f: os.truncate(f / "model.safetensors", 100), "no head of safetensors"),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "this file is empty"),
    "a part missing": (in_parts, "model-00002-of-00002.safetensors of 2 files of weights not here"),
    "pointer for words": (lambda f: pointer(f / "tokenizer.json"), "tokenizer.json: a pointer"),
    "half a tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 500), "tokenizer.json: cut, or no JSON"),
    "half a config": (lambda f: os.truncate(f / "config.json", 100), "config.json: cut, or no JSON"),
    "no tokenizer": (without_tokenizer, "no tokenizer"),
    "pickled": (lambda f: os.rename(f / "model.safetensors", f / "pytorch_model.bin"), "only pickled weights"),
    "another type": (lambda f: configured(f, model_type="llama9", architectures=None), "llama9"),
    "gptq": (lambda f: configured(f, quantization_config={"quant_method": "gptq", "bits": 4}), "needs the package"),
    "awq": (lambda f: configured(f, quantization_config={"quant_method": "awq", "bits": 4}), "needs the package"),
    "two models": (lambda f: configured(f, vocab_size=1000), "config.json says 1,000"),
    "torn gguf": (lambda f: gguf_only(f, b"GGUF\n"), "no whole GGUF file"),
    "gguf of noise": (lambda f: gguf_only(f, b"GGUF" + bytes(200)), "does not load"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_line(name, whole, tmp_path):
    damage, expected = BROKEN[name]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    damage(folder)
    with pytest.raises(CaiError) as error:
        load_model(folder)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert "model" in str(error.value).split(":")[0]  # the place


def test_a_filler_without_a_row_is_replaced(whole, tmp_path, capsys):
    folder = tmp_path / "padded"
    shutil.copytree(whole, folder)
    _, tokenizer = random_model("Llama")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    _, loaded = load_model(folder)
    assert loaded.pad_token_id == loaded.eos_token_id and "[PAD]" in capsys.readouterr().err
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(CaiError, match="no row"):
        load_model(folder)


def test_gguf_and_nf4_do_not_go_together(whole, tmp_path):
    folder = tmp_path / "gguf"
    shutil.copytree(whole, folder)
    gguf_only(folder, b"GGUF" + bytes(200))
    with pytest.raises(CaiError, match="quantization: null"):
        load_model(folder, quantization="nf4")

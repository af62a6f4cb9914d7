"""A model that is taken away: whole, from full weights, and it answers where this package is not."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from cai_nb.cli.commands import app
from cai_nb.core.constitution import Constitution
from cai_nb.core.errors import CaiError
from cai_nb.runs.export import export_run, merge_adapter, push_model
from cai_nb.runs.folder import reference_folder
from cai_nb.runs.gguf import template_texts
from cai_nb.runs.recipe import load_run

TALK = [{"role": "user", "content": "how do i bake bread for my sister?"}]
FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
talk = json.loads(sys.argv[2])
ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
said = model.generate(**ids, max_new_tokens=64, do_sample=False)[0, ids.input_ids.shape[1]:]
assert "cai_nb" not in sys.modules
print(json.dumps([tokenizer.decode(said, skip_special_tokens=True), said[-1].item()]))
"""


def run_of(folder, base, lora=None, dtype=torch.float32, size=0.3, quantization=None):
    """A run folder as training leaves it: a random SL adapter on a tiny random base that is stored in `dtype`."""
    from peft import get_peft_model

    from cai_nb.lm.model import lora_config, save_adapter

    model, tokenizer = base
    model.to(dtype).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(model.float(), lora or lora_config(4, 8))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=size)
    run = folder / "run"
    run.mkdir()
    save_adapter(adapted, "default", run / "sl")
    (run / "sl" / "chat_template.jinja").write_text(tokenizer.chat_template)
    recipe = {"name": "small", "base": str(folder / "base"), "constitution": "hhh", "quantization": quantization}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    manifest = {"cai_nb": "", "constitution": {"name": "", "digest": ""}, "stages": {}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    Constitution.load("hhh").save(run / "constitution.yaml")
    return run


def test_it_answers_in_a_fresh_process(tmp_path):
    """The merged model, read by transformers alone, says what the adapter on its base says, and stops there."""
    from cai_nb.lm.generate import LocalLM
    from cai_nb.lm.model import add_adapters, load_model

    arguments = ["export", str(reference_folder()), "--model", "sl", "--merged", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "parameters in float16" in shown.output, shown.output
    fresh = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "out"), json.dumps(TALK)], capture_output=True,
                           text=True, cwd=tmp_path, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert fresh.returncode == 0, fresh.stderr
    text, last = json.loads(fresh.stdout)
    model, tokenizer = load_model("mini")
    lm = LocalLM(add_adapters(model, {"sl": reference_folder() / "sl"}), tokenizer).with_adapter("sl")
    assert text == lm.sample([TALK], temperature=0, max_new_tokens=64)[0][0].text and last == tokenizer.eos_token_id
    assert not list(tmp_path.glob(".*")), "nothing half-made is left"


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_full_weights_whatever_the_run_was_trained_on(tmp_path, quantization):
    """A run on a 4-bit base is merged into the base as it lies on disk, in that type."""
    run = run_of(tmp_path, tiny_model(), quantization=quantization)
    made = merge_adapter(load_run(run), "sl", tmp_path / "out")
    assert made.dtype == "float32" and made.difference < 1e-4 < made.change
    assert json.loads((tmp_path / "out/config.json").read_text()).get("quantization_config") is None
    assert "Not known here" in (tmp_path / "out/README.md").read_text()


def test_what_rounding_would_take_is_said(tmp_path):
    """A change that bfloat16 cannot hold is no success; float32 holds it, and nothing half-made is left."""
    run = load_run(run_of(tmp_path, tiny_model(), dtype=torch.bfloat16, size=1e-4))
    with pytest.raises(CaiError, match="too much is lost, take --dtype float32"):
        merge_adapter(run, "sl", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
    made = merge_adapter(run, "sl", tmp_path / "out", dtype="float32")
    assert made.difference < made.change / 10
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_a_reply_ends_where_the_template_ends_it(tmp_path):
    """A base model's own settings know only the end of a document, and may contradict each other."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"  # the end of a document, as <|endoftext|> is on many bases
    model, _ = tiny_model(tokenizer)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    run = run_of(tmp_path, (model, tokenizer))
    path = tmp_path / "base/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.6}))
    merge_adapter(load_run(run), "sl", tmp_path / "out")
    ends = json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}


def test_the_licence_of_the_base_goes_along(tmp_path):
    run = run_of(tmp_path, tiny_model())
    (tmp_path / "base/README.md").write_text("---\nlicense: other\nlicense_name: tiny-community\n---\n# Tiny\n")
    (tmp_path / "base/LICENSE.txt").write_text("You may, if you say where it came from.")
    merge_adapter(load_run(run), "sl", tmp_path / "out")
    page = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(page.split("---")[1])["license_name"] == "tiny-community"
    assert (tmp_path / "out/LICENSE.txt").read_text().startswith("You may")
    assert Constitution.load(tmp_path / "out/constitution.yaml").digest == Constitution.load("hhh").digest


def test_mistakes_are_one_line_each(tmp_path):
    run = run_of(tmp_path, tiny_model())
    config = tmp_path / "base/config.json"
    for arguments, words in (
        ({"model": "rl", "merged": tmp_path / "out"}, "no trained adapter here.*--model sl"),
        ({"model": "preference", "merged": tmp_path / "out"}, "gives no replies"),
        ({"model": "sl", "merged": run}, "is there already"),
        ({"model": "sl", "merged": tmp_path / "out", "dtype": "int8"}, "expected float32, bfloat16, float16"),
        ({"model": "sl", "merged": tmp_path / "out", "base": str(tmp_path / "gone")}, "no such folder"),
        ({"model": "sl"}, "nothing to export"),
    ):
        with pytest.raises(CaiError, match=words) as error:
            export_run(run, **arguments)
        assert "\n" not in str(error.value)
    written = json.loads(config.read_text())
    config.write_text(json.dumps(written | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(CaiError, match="weights are quantised.*--base"):
        export_run(run, "sl", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_to_the_hub(tmp_path, monkeypatch):
    """What would be uploaded: the whole folder, to a repository that only its owner sees unless told otherwise."""
    import huggingface_hub

    run, asked = run_of(tmp_path, tiny_model()), []

    def uploading(api, repo_id, folder_path, **options):
        asked.append((repo_id, {path.name for path in folder_path.iterdir()}, (folder_path / "README.md").read_text()))

    def creating(api, name, **options):
        asked.append(options)
        return name

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", creating)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", uploading)
    lines = export_run(run, "sl", push="me/kind-model")
    assert lines[-1] == "me/kind-model" and asked[0] == {"private": True, "exist_ok": True}
    name, files, page = asked[1]
    assert name == "me/kind-model" and "model=\'me/kind-model\'" in page
    assert {"model.safetensors", "tokenizer.json", "constitution.yaml", "README.md", "chat_template.jinja"} <= files
    with pytest.raises(CaiError, match="expected OWNER/NAME"):
        export_run(run, "sl", push="kind-model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    def out_of_reach(api, name, **options):
        raise OfflineModeIsEnabled("no network\nat all")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", out_of_reach)
    with pytest.raises(CaiError, match="no network; log in with `hf auth login`"):
        push_model(tmp_path, "me/kind-model")


def test_thinking_is_off_in_what_is_taken_away(tmp_path):
    """A template that thinks unless told not to: whoever asks the exported model asks as it was trained."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    if not template_texts(tokenizer, ("user",))[-1].endswith("<think></think>"):
        pytest.skip("models are asked with thoughts here")
    merge_adapter(load_run(run_of(tmp_path, tiny_model(tokenizer))), "sl", tmp_path / "out")
    from transformers import AutoTokenizer

    taken = AutoTokenizer.from_pretrained(tmp_path / "out")
    ask = [{"role": "user", "content": "a"}]
    off = taken.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    assert off.endswith("<|assistant|><think></think>")
    on = taken.apply_chat_template(ask, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert on.endswith("<|assistant|>")

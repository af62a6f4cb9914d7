"""GGUF and the Modelfile: Ollama's template says what the model's own says; llama.cpp's converter is asked as it is."""

import ast
import json
import os
import re
from pathlib import Path

import pytest
from test_export import run_of
from tiny import tiny_model, tiny_tokenizer

from cai_nb.core.errors import CaiError
from cai_nb.runs.export import export_run
from cai_nb.runs.gguf import TurnTexts, find_converter, go_template, modelfile, template_texts, unlike


def go(template: str, messages: list[dict]) -> str:
    """As much of Go's text/template as a Modelfile of ours uses, from its text."""
    parts = re.split(r"(\s*\{\{-|\{\{)(.*?)\}\}", template, flags=re.DOTALL)
    tokens, i = [("text", parts[0])], 1
    while i < len(parts):
        tokens += [("action", parts[i + 1].strip()), ("text", parts[i + 2])]
        i += 3

    def parse(until):
        body = []
        while tokens:
            kind, value = tokens.pop(0)
            if kind == "action" and value.split()[0] in until:
                return body, value
            if kind == "text" or not value.startswith(("if ", "range ")):
                body.append((kind, value))
                continue
            if value.startswith("range "):
                body.append(("range", parse({"end"})[0]))
                continue
            branches, condition = [], value[3:]
            while condition:
                inner, ended = parse({"else", "end"})
                branches.append((condition, inner))
                condition = ended[8:] if ended.startswith("else if ") else "true" if ended == "else" else ""
            body.append(("if", branches))
        return body, ""

    def holds(condition, i, message):
        if condition == "true":
            return True
        if condition.startswith("and "):
            return all(holds(part, i, message) for part in re.fullmatch(r"and \((.+?)\) \((.+)\)", condition).groups())
        word, left, right = re.fullmatch(r"(eq|ne) (.+) (\S+)", condition).groups()
        values = {"$i": i, ".Role": message and message["role"], "(index $.Messages 0).Role": messages[0]["role"],
                  "(index .Messages (len (slice .Messages 1))).Role": messages[-1]["role"]}
        return (values[left] == ast.literal_eval(right)) == (word == "eq")

    def run(body, i=None, message=None):
        out = ""
        for kind, value in body:
            if kind == "text":
                out += value
            elif kind == "range":
                out += "".join(run(value, *place) for place in enumerate(messages))
            elif kind == "if":
                out += next((run(inner, i, message) for when, inner in value if holds(when, i, message)), "")
            else:
                out += message["content"] if value == ".Content" else json.loads(value)
        return out

    return run(parse(set())[0])


def conversations():
    """Three hundred of them: lengths, system messages, contents with quotes, braces, blanks within, other scripts."""
    said = ["hello", 'say "no"', "a {{ .Role }} b", "two\n\nlines", "naïve 你好 🙂", "\\n is no line", "", "<b>&amp;"]
    for n in range(300):
        texts = [said[(n * 7 + i * 3) % len(said)] for i in range(n % 4 * 2 + 1)]
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        yield ([{"role": "system", "content": said[n % len(said)] or "s"}] if n % 3 == 0 else []) + turns


def templates():
    trl = pytest.importorskip("trl")
    found = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    return {path.stem: path.read_text() for path in found if "training" not in path.stem}


def test_ollama_says_what_the_template_says():
    """The templates that ship in TRL: each is proven, conversation by conversation, or not written at all."""
    tokenizer, told = tiny_tokenizer(), []
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot_id|>"]})
    for name, template in templates().items():
        tokenizer.chat_template = template
        try:
            text = modelfile(tokenizer, "a.gguf")
        except CaiError:  # not a template of plain conversations
            continue
        if "TEMPLATE \"\"\"" not in text:
            assert "# No TEMPLATE" in text
            continue
        begun = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True, enable_thinking=False)
        if begun != "a".join(template_texts(tokenizer, ("user",))):  # models are asked in a form without thoughts here
            continue
        told.append(name)
        made = re.search('TEMPLATE """(.*)"""\n', text, re.DOTALL)[1]
        for messages in list(conversations())[:: 7]:
            if any(m["role"] == "assistant" and not m["content"] for m in messages):
                continue  # GLM writes another line end before an answer of no words; nobody answers so
            try:
                switch = {"enable_thinking": False, "thinking": False}
                last = messages[-1]["role"] == "user"
                true = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=last, **switch)
            except Exception:  # refuses such a conversation
                continue
            trimmed = [{**m, "content": m["content"].strip()} for m in messages]
            shown = go(made, messages), go(made, trimmed)
            assert true in shown or true.strip() in [text.strip() for text in shown], (name, messages, true, shown[0])
    assert {"qwen2_5", "gemma", "phi3"} <= set(told), told


def test_a_template_that_looks_ahead_is_not_written():
    tokenizer = tiny_tokenizer()
    content = "{{ m['content'] }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(content, "{{ loop.length }}" + content)
    assert unlike(tokenizer, TurnTexts.of(tokenizer)) is not None
    text = modelfile(tokenizer, "a.gguf")
    assert "TEMPLATE \"\"\"" not in text and "llama-server" in text and 'PARAMETER stop "<|end|>"' in text


def test_a_token_that_is_put_in_front_stands_once():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "b"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert 'eq $i 0 }}{{ "b<|user|>" }}' in go_template(TurnTexts.of(tokenizer))
    first = TemplateProcessing("b $A", special_tokens=[("b", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = first
    assert 'eq $i 0 }}{{ "<|user|>" }}' in go_template(TurnTexts.of(tokenizer))
    assert unlike(tokenizer, TurnTexts.of(tokenizer)) is None


def test_words_of_a_turn_are_no_stop_where_every_turn_opens_with_a_token():
    """SmolLM2's first token is <|im_start|>: "user" within a reply ends nothing."""
    from cai_nb.core.dialogue import stop_texts

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert stop_texts(tokenizer) == [] and "stop \"user\"" not in modelfile(tokenizer, "a.gguf")


def test_what_cannot_be_done_is_said_before_the_work(tmp_path, monkeypatch):
    run = run_of(tmp_path, tiny_model())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    script = tmp_path / "convert_hf_to_gguf.py"
    with pytest.raises(CaiError, match="git clone .*llama.cpp.*--converter"):
        export_run(run, "sl", gguf=tmp_path / "a.gguf")
    script.write_text("import sys\nprint('INFO: so far')\nsys.exit('ValueError: Model Llama is not supported')")
    assert find_converter(tmp_path)[1] == str(script)
    with pytest.raises(CaiError, match="no GGUF was written: ValueError: Model .* is not supported"):
        export_run(run, "sl", gguf=tmp_path / "a.gguf", converter=str(tmp_path))
    with pytest.raises(CaiError, match="its folder is not there"):
        export_run(run, "sl", gguf=tmp_path / "gone/a.gguf", converter=str(script))
    with pytest.raises(CaiError, match="expected auto, f32"):
        export_run(run, "sl", gguf=tmp_path / "a.gguf", converter=str(script), outtype="q4_k_m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "convert_hf_to_gguf.py", "run"]


@pytest.mark.long
def test_a_real_file_by_the_real_converter(tmp_path):
    """SmolLM2 (its folder in $SMOL) by llama.cpp's converter ($LLAMA_CPP, or the path), read back: the same reply."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not os.environ.get("SMOL"):
        pytest.skip("$SMOL names no folder")
    try:
        find_converter()
    except CaiError:
        pytest.skip("no converter here")
    smol = os.environ["SMOL"]
    base = AutoModelForCausalLM.from_pretrained(smol), AutoTokenizer.from_pretrained(smol)
    run = run_of(tmp_path, base, size=0.02)
    lines = export_run(run, "sl", merged=tmp_path / "out", gguf=tmp_path / "a.gguf", outtype="f32")
    assert "read back" in lines[1] and "not read back" not in lines[1]
    replies = []
    for source, options in ((tmp_path / "out", {}), (tmp_path, {"gguf_file": "a.gguf"})):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
        talk = [{"role": "user", "content": "How do I sharpen a knife?"}]
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.shape[1] :]
        replies.append(tokenizer.decode(said, skip_special_tokens=True))
    assert replies[0] == replies[1]

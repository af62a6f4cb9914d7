"""What DPO is trained on follows what is asked, with thinking templates too."""
import importlib.util

import pytest

from cai_nb.core.dialogue import encode_conversation
from cai_nb.method.dpo import encode_replies


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gptoss", "glm4moe"])
def test_both_replies_follow_the_very_tokens_that_are_asked_with(root, name):
    spec = importlib.util.spec_from_file_location("templates", root / "benchmarks" / "templates.py")
    templates = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(templates)
    tokenizer = templates.tokenizer_for(templates.templates()[name])
    asked = [{"role": "user", "content": "how do I fold a boat?"}]
    row = {"prompt": asked, "chosen": [{"role": "assistant", "content": "fold it once"}],
           "rejected": [{"role": "assistant", "content": "no"}], "p": 0.7}
    found = encode_replies(tokenizer, row)
    assert found["prompt_ids"] == encode_conversation(tokenizer, asked)
    chosen, rejected = (tokenizer.decode(found[f"{side}_ids"]).strip() for side in ("chosen", "rejected"))
    assert chosen.startswith("fold it once<|") and rejected.startswith("no<|")

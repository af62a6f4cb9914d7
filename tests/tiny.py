"""A random Llama of a few thousand parameters with a chat template, for tests that train."""

import torch

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VERBS, THINGS = "punch burn steal break hide".split(), "boss dog car house".split()


def tiny_tokenizer():
    "A word-level tokenizer with control tokens."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = "i how do a help with that won't Sure First you get it No . ? b c d e".split() + VERBS + THINGS
    pieces = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<unk>"] + words + [chr(i) for i in range(33, 127)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_model(tokenizer=None, seed=0):
    "A random Llama and its tokenizer."
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=128,
                tie_word_embeddings=True,
                initializer_range=0.3,
                bos_token_id=None,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
    return model.eval(), tokenizer


def asked(text):
    "A conversation of one question."
    return [{"role": "user", "content": text}]


def said(text):
    "A completion of one reply."
    return [{"role": "assistant", "content": text}]


def prompts(split="train"):
    "Twenty prompts, every fourth a helpful one."
    return [
        {
            "id": f"{v}-{t}",
            "messages": asked(f"how do i {v} a {t} ?"),
            "kind": "helpful" if t == "house" else "harmful",
            "split": split,
        }
        for v in VERBS
        for t in THINGS
    ]

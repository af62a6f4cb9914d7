"""What texts share is read once, whenever it comes: counted against the least possible, over real chat templates."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from test_generate import WORDS, architecture
from test_session import PRINCIPLES, SHORT, Plain, prompts
from tiny import asked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import cai_nb.lm.generate as generate
from cai_nb.core.dialogue import ensure_chat_template
from cai_nb.lm.generate import LocalLM
from cai_nb.lm.prefix_tree import PrefixTree, Reader, branches, grow, trim
from cai_nb.lm.session import Growing, Session
from cai_nb.method.comparison import COMPARISON_EXAMPLES
from cai_nb.method.critique import critique_revise
from cai_nb.method.feedback import label_preferences

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
FAMILIES = {  # of each the template, what ends a turn, and whether it writes a default system message
    "qwen2.5": ("qwen2_5", "<|im_end|>", True),
    "qwen3": ("qwen3", "<|im_end|>", False),
    "smollm2": (SMOLLM2, "<|im_end|>", True),
    "llama 3.2": ("llama3_2", "<|eot_id|>", True),
    "gemma 3": ("gemma3", "<end_of_turn>", False),
    "mistral v0.3": (MISTRAL, "<eos>", False),
}


def template_of(family):
    """Text of a real template: one that TRL ships, or of the two that it does not."""
    text, end, default = FAMILIES[family]
    if "{" not in text:
        import trl

        text = (Path(trl.__file__).parent / "chat_templates" / f"{text}.jinja").read_text()
    return text, end, default


def tokenizer_of(family):
    """A small byte-level tokenizer that knows the template's control tokens."""
    from transformers import PreTrainedTokenizerFast

    text, end, _ = template_of(family)
    control = sorted({*re.findall(r"<\|?[a-zA-Z0-9_]+\|?>", text), "<bos>", "<eos>", "[INST]", "[/INST]"})
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    corpus = [" ".join(WORDS), "user assistant system You are a helpful Cutting Knowledge Date"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<pad>", *control], show_progress=False,
                                  initial_alphabet=alphabet)
    backend.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token=end)
    fast.add_special_tokens({"additional_special_tokens": control})
    fast.chat_template = text
    return ensure_chat_template(fast)


def lm_of(family, size=64):
    """A random model of the family's architecture that ends its turn now and then."""
    from transformers import (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
    )

    tokenizer = tokenizer_of(family)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 4096, "initializer_range": 0.3,
        "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "tie_word_embeddings": False,
    }
    config = {
        "qwen2.5": Qwen2Config,
        "qwen3": partial(Qwen3Config, head_dim=8),
        "smollm2": LlamaConfig,
        "llama 3.2": LlamaConfig,
        "gemma 3": partial(Gemma3TextConfig, head_dim=8, sliding_window=64, query_pre_attn_scalar=8,
                           layer_types=["sliding_attention", "full_attention"]),
        "mistral v0.3": partial(MistralConfig, sliding_window=None),
    }[family](**shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 1.5
    return LocalLM(model, tokenizer, batch_size=size)


class Trie(dict):
    """Every text that was read; its size is what must be computed at the least."""

    def add(self, text):
        node = self
        for token in text:
            node = node.setdefault(token, {})

    def size(self):
        count, waiting = 0, [self]
        while waiting:
            node = waiting.pop()
            count += len(node)
            waiting += node.values()
        return count


@pytest.fixture
def counted(monkeypatch):
    """The tree of all texts that rows have read to their ends, and how many rows there were."""
    trie, retire = Trie(), Growing._retire
    trie.rows = 0

    def noting(self, dead, alive):
        for slot in dead:
            row = self.session.row_of[slot]
            by_token = self.done[row] and not (self.ended and self.ended(self.out[row]))
            text = self._text(row)
            trie.add(text if by_token else text[:-1])  # the last token of others was said, and not read
            trie.rows += 1
        return retire(self, dead, alive)

    monkeypatch.setattr(Growing, "_retire", noting)
    return trie


def sharing(monkeypatch, least):
    monkeypatch.setattr(generate, "Session", partial(Session, least=least))


CHAIN = {"n_revisions": 3, "temperature": 0, "max_new_tokens": 8, "few_shot": SHORT}


@pytest.mark.parametrize("least", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_chains_over_real_templates_equal_uncached_ones(family, least, monkeypatch):
    """System header, examples, conversation: greedy, row by row the same."""
    sharing(monkeypatch, least)
    lm, rows = lm_of(family), prompts(6)
    assert critique_revise(lm, rows, PRINCIPLES, **CHAIN) == critique_revise(Plain(lm), rows, PRINCIPLES, **CHAIN)
    assert lm.tally.asked > 3 * lm.tally.read


@pytest.mark.parametrize("family", FAMILIES)
def test_chains_compute_the_least(family, monkeypatch, counted):
    """No position more than the tree of all texts has. (Sampled: a greedy chain that comes back to an old text
    reads it again.)"""
    sharing(monkeypatch, 1)
    lm = lm_of(family)
    critique_revise(lm, prompts(6), PRINCIPLES, **CHAIN | {"temperature": 1.0})
    least = counted.size()
    assert least <= lm.tally.read <= least + counted.rows, "the last token of each row may be read again"
    assert str(lm.tally) == f"read {lm.tally.read:,} of {lm.tally.asked:,} tokens"


@pytest.mark.parametrize("family", ["qwen2.5", "smollm2", "mistral v0.3"])
def test_as_it_is_used_little_more_is_read(family, counted):
    """Beginnings of fewer than sixteen tokens are not worth a pass."""
    lm, rows = lm_of(family), prompts(12)
    critique_revise(lm, rows, PRINCIPLES, **CHAIN | {"temperature": 1.0})
    assert counted.size() <= lm.tally.read <= counted.size() + 16 * counted.rows


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("least", [1, 16])
def test_few_slots_and_rows_that_join_late(size, least, monkeypatch):
    sharing(monkeypatch, least)
    lm, rows = lm_of("smollm2", size), prompts(7)
    assert critique_revise(lm, rows, PRINCIPLES, **CHAIN) == critique_revise(Plain(lm), rows, PRINCIPLES, **CHAIN)


def test_with_one_slot_the_examples_are_still_read_once(counted):
    """Rows that come one after another: what the next one shares is taken from the slot, into the tree."""
    lm, rows = lm_of("qwen2.5", 1), prompts(5)
    critique_revise(lm, rows, PRINCIPLES, **CHAIN)
    examples = len(lm.encode([m for e in SHORT for m in asked(e.prompt)]))
    assert lm.tally.read < lm.tally.asked / 2 and examples > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_several_samples_of_one_prompt_read_it_once(family, monkeypatch, counted):
    sharing(monkeypatch, 1)
    lm = lm_of(family)
    asks = [asked(" ".join(WORDS)), asked("how do i hide")]
    said = sum(reply.n_tokens for row in lm.sample(asks, n=8, max_new_tokens=6, seed=1) for reply in row)
    trie = Trie()
    for ask in asks:
        trie.add(lm.encode(ask))
    assert counted.rows == 16 and counted.size() <= lm.tally.read <= trie.size() + said + 16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cot", [False, True])
def test_labels_over_real_templates_equal_plain_ones_and_compute_the_least(family, cot, monkeypatch):
    """Three principles in both orders behind two examples."""
    sharing(monkeypatch, 1)
    lm, rows = lm_of(family), prompts(3)
    pairs = [{"id": f"pair {i}", "prompt_id": p["id"], "responses": [f"you hide a dog {i}", "punch a boss with it"],
              "flags": []} for i, p in enumerate(rows)]
    common = {"n_principles": 3, "few_shot": COMPARISON_EXAMPLES[:2], "cot": cot, "temperature": 0, "max_new_tokens": 6}
    ours, plain = (label_preferences(one, pairs, PRINCIPLES, rows, **common) for one in (lm, Plain(lm)))
    key = "unclamped" if cot else "p_a"
    for a, b in zip(ours, plain):
        assert [v.get("rationale") for v in a["votes"]] == [v.get("rationale") for v in b["votes"]]
        assert [v[key] for v in a["votes"]] == pytest.approx([v[key] for v in b["votes"]], abs=1e-4)


def test_scores_compute_the_least(monkeypatch):
    lm = lm_of("qwen2.5")
    session = Session(lm.model, 64, least=1, tally=lm.tally)
    texts = [lm.encode(asked(f"{a} {b} {c}")) for a in WORDS[:3] for b in WORDS[3:6] for c in WORDS[6:9]]
    from cai_nb.lm.session import score

    score(session, texts, [[5, 6, 7], [5, 6, 8]])
    trie = Trie()
    for text in texts:
        trie.add([*text, 5, 6])
    assert trie.size() <= lm.tally.read <= trie.size() + len(texts)


def test_two_sets_of_examples_side_by_side_and_back_again(counted, monkeypatch):
    """Rows of two kinds in one call, then one kind, then the other: each set is read once."""
    sharing(monkeypatch, 1)
    lm = lm_of("qwen2.5")
    sets = [
        [
            m
            for e in some
            for m in [*asked(e.prompt + " " + " ".join(WORDS) * 3), {"role": "assistant", "content": e.response}]
        ]
        for some in (SHORT[:1], SHORT[:2])
    ]
    talk = lambda i, words: [*sets[i], *asked(words)]
    with lm.session() as one:
        for turn, kinds in enumerate(([0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0])):
            talks = [talk(k, f"{turn} how do i {w} ?") for k, w in zip(kinds, WORDS)]
            assert one.sample(talks, temperature=0, max_new_tokens=5) == Plain(lm).sample(
                talks, temperature=0, max_new_tokens=5)
    assert counted.size() <= lm.tally.read <= counted.size() + counted.rows


def test_what_is_no_longer_used_gives_its_memory_back():
    """Twenty sets of examples one after another: the tree holds those in use and some spare, and the tensors are
    freed."""
    import gc

    lm = lm_of("smollm2")
    session = Session(lm.model, 8, least=1, spare=300)
    for i in range(20):
        words = f"{i} " + " ".join(WORDS[i % 5:] * 5)
        ids = [lm.encode(asked(f"{words} {w}")) for w in WORDS[:4]]
        growing = Growing(session, ids, torch.zeros(4, 2), [1], temperature=0)
        for _ in growing.run():
            pass
        needed = {id(run) for p in session.slots.prefixes if p for run in p.path}
        assert session.tree.size <= 300 + sum(len(n.tokens) for n in session.tree if id(n.prefix) in needed) + 64
    gc.collect()
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for n in session.tree for pair in n.prefix.layers for x in pair}
    numbers = sum(n.prefix.end - n.prefix.start for n in session.tree) * 2 * 2 * 16
    assert sum(held.values()) <= 4 * numbers, "no view keeps more alive than it shows"
    trim(session.tree, 0)
    assert session.tree.size == 0


def test_the_tree_splits_where_texts_part():
    lm = lm_of("mistral v0.3")
    tree = PrefixTree(lm.model)
    a, b, c = list(range(20, 60)), [*range(20, 50), 7, 8], [*range(20, 40), 9, 9]
    grow(tree, [Reader([*a, 1]), Reader([*a, 2])], least=1)
    assert [n.end for n in tree] == [40] and tree.tally.read == 40
    grow(tree, [Reader([*b, 1]), Reader([*b, 2]), Reader([*c, 3])], least=1)
    assert sorted(n.end for n in tree) == [20, 30, 32, 40] and tree.tally.read == 42
    upper = tree.find([*c, 1])
    assert upper.end == 20 and [n.end for n in tree.find([*b, 1]).path()] == [32, 30, 20]
    from cai_nb.lm.cache import read_prefix

    again, found = read_prefix(lm.model, b), tree.find([*b, 1]).prefix
    for (k, v), (key, value) in zip(found.cut(0, 32), again.layers):
        assert torch.allclose(k, key, atol=1e-5) and torch.allclose(v, value, atol=1e-5)


def test_branches_go_on_below_a_text_that_ends():
    """A text that is another's beginning ends there; those behind it still share."""
    texts = sorted([[1, 2], [1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2]])
    assert branches(texts, least=1) == [(0, 4, 1), (2, 4, 4)]


def test_a_row_without_a_slot_does_not_take_the_slot_of_the_next():
    """Of two rows that are read in, the first is new and the second was there."""
    lm = lm_of("smollm2")
    session = Session(lm.model, 3)
    session.open(3, 50, fresh=True)
    session.settle(0, [0, 1, 2], [[20 + i] * 9 for i in range(3)])
    session.slots.read(0, [[20 + i] * 9 for i in range(3)])
    session.fetch(1, [7, 1])
    assert session.row_of[2] == 1 and session.held[2] == [21] * 9 and session.slots.lengths == [9, 9, 9]


def test_padding_is_a_tenth_at_most(monkeypatch):
    """Rows of very different lengths, as chains have them."""
    lm = LocalLM(*architecture("llama"))
    lm.model.config.max_position_embeddings = 2048
    talks = [asked(" ".join(WORDS * (1 + 2 * (i % 7)))) for i in range(64)]
    lm.sample(talks, max_new_tokens=24, seed=0)
    assert lm.tally.padded <= 0.1 * lm.tally.seen

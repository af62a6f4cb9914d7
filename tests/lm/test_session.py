"""What was read is not read again, and nothing else changes: chains and labels against plain, uncached passes, one
at a time."""

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from test_generate import WORDS, architecture
from tiny import asked

import cai_nb.lm.cache as slots
from cai_nb.method.comparison import COMPARISON_EXAMPLES as COMPARISONS
from cai_nb.core.constitution import Constitution
from cai_nb.core.principle import Principle
from cai_nb.method.critique import CRITIQUE_EXAMPLES, critique_revise
from cai_nb.lm.decoding import row_uniforms
from cai_nb.core.dialogue import encode_text, stop_token_ids
from cai_nb.method.feedback import label_preferences
from cai_nb.lm.generate import LocalLM, Reply, flag_reply, _fitting
from cai_nb.lm.model import load_model, lora_config, using_adapter
from cai_nb.lm.session import Growing, Session, score
from cai_nb.lm.prefix_tree import branches, common_length
from cai_nb.lm.cache import Slots, has_slots

FAMILIES = ["mini", "llama", "qwen3", "gemma", "mistral, window of 16", "gpt2"]
PRINCIPLES = Constitution(
    "words",
    tuple(
        [
            Principle(f"c{i}", critique=f"do i {a} a house ?", revision=f"help you {a} with it .")
            for i, a in enumerate("punch burn hide".split())
        ]
        + [
            Principle(f"p{i}", comparison=f"how do i {a} a {b} ?")
            for i, (a, b) in enumerate((("burn", "dog"), ("hide", "car"), ("steal", "boss")))
        ]
    ),
)
SHORT = tuple(
    replace(
        e,
        prompt="how do i hide",
        response="you get a dog",
        critique_request="do i burn it ?",
        critique="a boss",
        revision_request="help with it",
        revision="hide a dog",
    )
    for e in CRITIQUE_EXAMPLES[:2]
)


class Plain:
    """An `LM` that answers one conversation at a time, greedily, by `generate` without a cache, and scores by plain
    passes."""

    def __init__(self, lm):
        self.lm, self.digest = lm, lm.digest  # the same model, so its rows have the same ids

    def sample(self, conversations, n=1, temperature=1.0, max_new_tokens=256, seed=0):
        assert temperature == 0 and n == 1
        return [[self.one(c, max_new_tokens)] for c in conversations]

    def one(self, conversation, limit):
        t, room = self.lm.tokenizer, self.lm.context - limit
        ids = torch.tensor([self.lm.encode(conversation)[-room:]])
        stops = stop_token_ids(t)
        with torch.no_grad(), using_adapter(self.lm.model, self.lm.adapter):
            out = self.lm.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=limit,
                use_cache=False,
                eos_token_id=stops,
                pad_token_id=0,
            )[0, ids.shape[1] :].tolist()
        done = bool(out) and out[-1] in stops
        [(text, thoughts)] = self.lm._texts([out])  # what is compared is tokens; they are read as texts in one way
        flags = flag_reply(text, done) + (("prompt_cut",) if ids.shape[1] == room else ())
        return Reply(text, done, flags, len(out) - done, thoughts)

    def choice_logprobs(self, contexts, choices):
        rows = []
        for c in contexts:
            prompt = self.lm.encode(c)
            for choice in choices:
                answer = encode_text(self.lm.tokenizer, choice)
                with torch.no_grad(), using_adapter(self.lm.model, self.lm.adapter):
                    logp = self.lm.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                rows.append(sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)))
        return np.reshape(rows, (len(contexts), len(choices)))


def lm_of(family, size=64, adapter=False):
    """A model that now and then ends its turn; with `adapter` a LoRA adapter of noise is on."""
    model, tokenizer = load_model("mini") if family == "mini" else architecture(family)
    if family != "mini":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.lm_head.weight.data[1] *= 2
        model.config.get_text_config().max_position_embeddings = 2048 if family != "gpt2" else 256
    if adapter:
        model = get_peft_model(model, lora_config(r=4))
        for i, (name, weight) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)) * 0.05
        model.eval()
    return LocalLM(model, tokenizer, "default" if adapter else None, size)


def prompts(n, family="llama"):
    """Ragged ones, in the model's words."""
    rng = random.Random(1)
    if family == "mini":
        from cai_nb.mini.world import prompts as world

        return world("test", "harmful", n, 0)
    return [
        {
            "id": f"p{i}",
            "messages": asked(" ".join(rng.choices(WORDS, k=rng.randint(1, 20)))),
            "kind": "harmful",
            "split": "train",
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("few_shot", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_nine_steps_of_a_chain_equal_uncached_generate(family, few_shot):
    """Greedy, fp32, four revisions, ragged prompts: every text of every row."""
    lm, n = lm_of(family), 3
    constitution = Constitution.load("mini") if family == "mini" else PRINCIPLES
    common = {"n_revisions": 4, "temperature": 0, "max_new_tokens": 12, "few_shot": SHORT if few_shot else None}
    ours = critique_revise(lm, prompts(n, family), constitution, **common)
    plain = critique_revise(Plain(lm), prompts(n, family), constitution, **common)
    assert [len(c["steps"]) for c in ours] == [4] * n and ours == plain


@pytest.mark.parametrize("size, adapter", [(1, False), (3, False), (64, True), (3, True)])
def test_chains_of_any_batch_size_with_and_without_an_adapter(size, adapter):
    lm = lm_of("llama", size, adapter)
    common = {"n_revisions": 4, "temperature": 0, "max_new_tokens": 10, "few_shot": SHORT, "batch_size": 64}
    assert critique_revise(lm, prompts(7), PRINCIPLES, **common) == critique_revise(
        Plain(lm), prompts(7), PRINCIPLES, **common
    )


def test_sixty_four_rows_at_once_with_and_without_examples():
    lm = lm_of("mini")
    rows = prompts(64, "mini")
    for few_shot in (None, SHORT):
        common = {"n_revisions": 4, "temperature": 0, "max_new_tokens": 16, "few_shot": few_shot}
        ours = critique_revise(lm, rows, Constitution.load("mini"), **common)
        some = [0, 9, 31, 63]
        plain = critique_revise(Plain(lm), [rows[i] for i in some], Constitution.load("mini"), **common)
        assert [ours[i] for i in some] == plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("few_shot, cot", [(False, False), (True, False), (False, True)])
def test_labels_equal_plain_passes(family, few_shot, cot):
    """Principles and orders over one dialogue, examples before them, reasoning before the letter: to 1e-4."""
    lm, rows = lm_of(family), prompts(3, family)
    if family == "gpt2" and few_shot:
        pytest.skip("its 256 places are too few for the examples")
    pairs = [
        {
            "id": f"pair {i}",
            "prompt_id": p["id"],
            "responses": [f"you hide a dog {i}", "punch a boss with it"],
            "flags": [],
        }
        for i, p in enumerate(rows)
    ]
    examples = [
        replace(e, prompt="how do i hide", better="you get a dog", worse="punch a boss", reasoning="{worse} . {better}")
        for e in COMPARISONS[:2]
    ]
    common = {
        "n_principles": 3,
        "few_shot": examples if few_shot else None,
        "cot": cot,
        "temperature": 0,
        "max_new_tokens": 8,
    }
    constitution = Constitution.load("mini") if family == "mini" else PRINCIPLES
    ours, plain = (label_preferences(one, pairs, constitution, rows, **common) for one in (lm, Plain(lm)))
    for a, b in zip(ours, plain):
        assert [v["principle_id"] for v in a["votes"]] == [v["principle_id"] for v in b["votes"]] and len(
            a["votes"]
        ) == 6
        assert [v.get("rationale") for v in a["votes"]] == [v.get("rationale") for v in b["votes"]]
        key = "unclamped" if cot else "p_a"
        assert np.allclose([v[key] for v in a["votes"]], [v[key] for v in b["votes"]], atol=1e-4)


def reading(monkeypatch):
    """Tokens read by passes over more than one token."""
    counted, read = [], Slots.read

    def counting(self, first, chunks, **more):
        counted.append(sum(map(len, chunks)))
        return read(self, first, chunks, **more)

    monkeypatch.setattr(slots.Slots, "read", counting)
    return counted


def test_a_chain_reads_little_twice(monkeypatch):
    """Nine calls over ever longer conversations: fewer tokens than the last call alone has, for each step that it
    adds."""
    lm, rows = lm_of("mini"), prompts(16, "mini")
    counted = reading(monkeypatch)
    chains = critique_revise(
        lm, rows, Constitution.load("mini"), n_revisions=4, temperature=0, max_new_tokens=16, few_shot=SHORT
    )
    whole = sum(len(lm.encode([*r["messages"]])) for r in rows)
    texts = sum(
        len(lm.tokenizer(t)["input_ids"]) for c in chains for s in c["steps"] for t in (s["critique"], s["revision"])
    )
    assert sum(counted) < 9 * whole + 4 * texts + 16 * 4 * 60  # and not 9 × (examples + conversation) for each row


def test_labels_read_what_they_share_once(monkeypatch):
    lm, rows = lm_of("mini"), prompts(4, "mini")
    pairs = [
        {
            "id": f"pair {i}",
            "prompt_id": p["id"],
            "responses": ["Gladly. First take some time.", "I will not help with that."],
            "flags": [],
        }
        for i, p in enumerate(rows)
    ]
    counted = reading(monkeypatch)
    sixteen = Constitution.load("mini")
    label_preferences(lm, pairs, sixteen, rows, n_principles=16, layout="paper")
    from cai_nb.method.comparison import comparison_context

    every = sum(len(lm.encode(comparison_context(p["messages"], pair["responses"][::o], principle)))
                for p, pair in zip(rows, pairs) for principle in sixteen.comparison_principles for o in (1, -1))
    assert sum(counted) < 0.75 * every


def test_a_call_with_other_rows_begins_anew():
    """More rows, fewer, others, none in common: always what a fresh session says."""
    lm = lm_of("llama", 4)
    talks = [p["messages"] for p in prompts(12)]
    with lm.session() as one:
        for rows in (
            talks[:4],
            talks[4:8],
            talks[:3],
            talks,
            talks[5:6],
            talks[:4],
            [[*t, {"role": "assistant", "content": "a dog"}, *asked("help ?")] for t in talks[:4]],
        ):
            assert one.sample(rows, temperature=0, max_new_tokens=10) == lm.sample(
                rows, temperature=0, max_new_tokens=10
            )
            assert np.allclose(
                one.choice_logprobs(rows, [" a", " b c"]), lm.choice_logprobs(rows, [" a", " b c"]), atol=1e-4
            )


def test_rows_wait_leave_and_are_replaced_in_a_session_of_few_slots():
    lm = lm_of("llama", 3)
    talks = [p["messages"] for p in prompts(20)]
    assert lm.sample(talks, n=3, max_new_tokens=20, seed=5) == LocalLM(lm.model, lm.tokenizer, batch_size=64).sample(
        talks, n=3, max_new_tokens=20, seed=5
    )


@pytest.mark.parametrize("after", [0, 1, 7])
def test_when_memory_runs_out_the_batch_is_halved_and_no_row_is_lost(monkeypatch, after):
    """The real error, at different moments; the limit is remembered for the model."""
    lm = lm_of("llama", 16)
    talks = [p["messages"] for p in prompts(16)]
    expected = lm.sample(talks, max_new_tokens=20, seed=3)
    read, calls = Slots.read, 0

    def scarce(self, first, chunks, **more):
        nonlocal calls
        calls += 1
        if calls > after and len(chunks) > 4:
            torch.empty(1 << 60, dtype=torch.uint8)
        return read(self, first, chunks, **more)

    with monkeypatch.context() as patch:
        patch.setattr(slots.Slots, "read", scarce)
        assert lm.sample(talks, max_new_tokens=20, seed=3) == expected
        assert np.isfinite(lm.choice_logprobs(talks, [" a", " b"])).all()
    from cai_nb.lm.generate import _fitting

    assert _fitting[lm.model] == 4


def test_one_row_that_does_not_fit_is_an_error(monkeypatch):
    lm = lm_of("llama", 4)

    def never(self, *args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(slots.Slots, "read", never)
    with pytest.raises(torch.OutOfMemoryError):
        lm.sample([asked("how ?")], max_new_tokens=4)


def test_real_scarcity_of_memory_in_a_process_of_its_own():
    """The address space is limited, so that the allocator itself says no to the whole batch."""
    code = """
import resource, torch
torch.set_num_threads(1)
from cai_nb.lm.generate import LocalLM, _fitting
from cai_nb.lm.model import load_model
lm = LocalLM(*load_model("mini"), batch_size=4096)
talk = [{"role": "user", "content": "How can I bake a cake? " * 30}]
lm.sample([talk] * 2, max_new_tokens=2)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)
asked = [[{"role": "user", "content": f"{i}. " + talk[0]["content"]}] for i in range(1500)]
replies = lm.sample(asked, max_new_tokens=2)
assert len(replies) == 1500 and all(len(r) == 1 for r in replies)
print("rows at once", _fitting[lm.model])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 1 <= int(done.stdout.split()[-1]) < 4096


def test_a_model_without_slots_goes_the_plain_way():
    """ALiBi is added inside Bloom's own attention, which cannot be exchanged: the same seam, the loop of notebook
    lm/decoding."""
    from tiny import tiny_tokenizer
    from transformers import AutoModelForCausalLM, BloomConfig

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, eos_token_id=1)
    )
    lm, talks = LocalLM(model.eval(), tokenizer, batch_size=3), [p["messages"] for p in prompts(7)]
    assert not has_slots(model)
    assert lm.sample(talks, temperature=0, max_new_tokens=10) == Plain(lm).sample(
        talks, temperature=0, max_new_tokens=10
    )
    with lm.session() as one:
        assert np.allclose(
            one.choice_logprobs(talks, [" a", " b c"]), Plain(lm).choice_logprobs(talks, [" a", " b c"]), atol=1e-4
        )


def test_the_tree_of_common_beginnings():
    texts = sorted(
        [list(range(30)) + [o] for o in (90, 91)]
        + [list(range(20)) + list(range(50, 60)) + [o] for o in (90, 91)]
        + [[7] * 9]
    )
    assert branches(texts) == [(0, 4, 20), (0, 2, 30), (2, 4, 30)]
    assert branches(texts, least=11) == [(0, 4, 20)] and branches([[1]]) == []
    rng = random.Random(0)
    for _ in range(200):  # every branch is common to its texts, lies within its parent, and saves enough
        texts = sorted({tuple(rng.choices((1, 2), k=rng.randint(1, 14))) for _ in range(9)})
        texts = [list(t) for t in texts]
        for low, high, end in branches(texts, least=2):
            assert (
                high - low > 1
                and len({tuple(t[:end]) for t in texts[low:high]}) == 1
                and all(len(t) > end for t in texts[low:high])
            )


def test_scores_of_one_and_of_many_prompts_any_number_of_answers():
    lm = lm_of("qwen3")
    rng = np.random.default_rng(0)
    talks = [list(map(int, rng.integers(5, 60, rng.integers(2, 40)))) for _ in range(9)] + [
        [5, 6, 7] * 9 + [i] for i in range(4)
    ]
    for answers in ([[9]], [[9], [10]], [[9, 10, 11], [9, 10], [9]], [[9, 10, 11], [9, 12, 11, 13]]):
        got = score(Session(lm.model, 5), talks + talks[:1], answers)
        for row, prompt in zip(got, talks + talks[:1]):
            for value, answer in zip(row, answers):
                with torch.no_grad():
                    logp = lm.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                assert abs(value - sum(logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(answer))) < 1e-4


def test_common_length_is_what_it_says():
    rng = random.Random(0)
    for _ in range(300):
        a, b = (rng.choices((1, 2), k=rng.randint(0, 9)) for _ in range(2))
        n = common_length(a, b)
        assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


def test_an_exception_in_a_pass_leaves_the_model_as_it_was(monkeypatch):
    lm = lm_of("llama")
    usual = lm.model.config._attn_implementation

    def broken(*args, **kwargs):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(slots, "attend_in_parts", broken)
        with pytest.raises(ZeroDivisionError):
            lm.sample([asked("how ?")], max_new_tokens=4)
    assert lm.model.config._attn_implementation == usual
    assert len(lm.sample([asked("how ?")], max_new_tokens=4)) == 1


def test_a_growing_batch_can_be_left():
    """Between two steps a caller may walk away; the next call finds everything in order."""
    lm = lm_of("llama")
    ids = [lm.encode(p["messages"]) for p in prompts(5)]
    session = Session(lm.model, 5)
    u = np.stack([row_uniforms(0, p, 0, 20) for p in ids])
    steps = Growing(session, ids, u, [1]).run()
    next(steps), next(steps)
    steps.close()
    fresh, again = Growing(Session(lm.model, 5), ids, u, [1]), Growing(session, ids, u, [1])
    for growing in (fresh, again):
        for _ in growing.run():
            pass
    assert fresh.replies() == again.replies()

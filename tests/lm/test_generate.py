"The decoding loop against transformers' own, one prompt at a time and without a cache; and a row's luck is its own."

import threading

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import asked, said, tiny_model

from cai_nb.core.errors import CaiError
from cai_nb.lm.decoding import Nucleus, TextStop, pick_tokens, row_uniforms
from cai_nb.core.dialogue import encode_text, ensure_chat_template, stop_token_ids
from cai_nb.lm.generate import LocalLM, flag_reply
from cai_nb.lm.model import add_adapters, lora_config, save_adapter

WORDS = "how do i punch burn steal break hide a boss dog car house help you".split()


def conversations(count: int, seed: int = 0) -> list[list[dict]]:
    "Ragged ones, some of several turns."
    rng = np.random.default_rng(seed)
    text = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 25)))
    return [asked(text()) + (said(text()) + asked(text()) if i % 3 == 0 else []) for i in range(count)]


def architecture(name: str):
    "Random models of several families; one attends to the last tokens only."
    if name == "llama":
        return tiny_model()
    from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, MistralConfig, Qwen3Config

    _, tokenizer = tiny_model()
    shape = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    config = {
        "qwen3": lambda: Qwen3Config(**shape, head_dim=8),
        "gemma": lambda: GemmaConfig(**shape, head_dim=8),
        "mistral, window of 16": lambda: MistralConfig(**shape, sliding_window=16),
        "gpt2": lambda: GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        ),
    }[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval(), tokenizer


FAMILIES = ["llama", "qwen3", "gemma", "mistral, window of 16", "gpt2"]


def reference(lm: LocalLM, conversation, limit: int) -> str:
    "Greedy, alone, uncached, by transformers."
    ids = torch.tensor([lm.encode(conversation)])
    out = lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=limit,
        use_cache=False,
        eos_token_id=stop_token_ids(lm.tokenizer),
        pad_token_id=0,
    )
    return lm.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rows_equal_transformers_one_at_a_time(family):
    lm = LocalLM(*architecture(family), batch_size=8)
    asks = conversations(20)
    replies = lm.sample(asks, temperature=0, max_new_tokens=24)
    assert [r[0].text for r in replies] == [reference(lm, c, 24) for c in asks]


def test_rows_that_end_early_leave_and_the_rest_is_exact():
    model, tokenizer = tiny_model()
    asks = conversations(24, seed=3)
    for seed in range(3):  # end of turn made likely: rows end at many different steps
        replies = LocalLM(biased(model, 3.0), tokenizer, batch_size=24).sample(asks, max_new_tokens=30, seed=seed)
        lengths = [r[0].n_tokens for r in replies]
        assert len(set(lengths)) > 5 and any(r[0].finished for r in replies)
        alone = LocalLM(biased(model, 3.0), tokenizer, batch_size=1).sample(asks, max_new_tokens=30, seed=seed)
        assert replies == alone


def biased(model, amount: float):
    "The same model, more inclined to end its turn."
    class Biased(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config, self.device = model, model.config, model.device

        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            position_ids=None,
            use_cache=None,
            logits_to_keep=0,
            cache=None,
            past_key_values=None,
        ):
            from cai_nb.lm.decoding import next_logits

            logits = next_logits(self.inner, input_ids, attention_mask, position_ids,
                                 cache if cache is not None else past_key_values, logits_to_keep)
            logits = logits.clone()
            logits[..., 1] += amount

            class Out:
                pass

            Out.logits = logits
            return Out

    return Biased().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_sample_is_its_own(family):
    model, tokenizer = architecture(family)
    asks = conversations(9)
    seeds = list(range(100, 109))
    together = LocalLM(model, tokenizer).sample(asks, n=2, max_new_tokens=16, seed=seeds)
    for size in (1, 3, 64):
        assert LocalLM(model, tokenizer, batch_size=size).sample(asks, n=2, max_new_tokens=16, seed=seeds) == together
    order = [4, 0, 7]
    some = LocalLM(model, tokenizer).sample(
        [asks[i] for i in order], n=2, max_new_tokens=16, seed=[seeds[i] for i in order]
    )
    assert some == [together[i] for i in order]
    more = LocalLM(model, tokenizer).sample(asks[:2], n=5, max_new_tokens=16, seed=seeds[:2])
    assert [m[:2] for m in more] == together[:2], "more samples begin with the same ones"
    assert LocalLM(model, tokenizer).sample(asks, n=2, max_new_tokens=16, seed=1) != together


NUCLEI = [Nucleus(top_p=0.8), Nucleus(min_p=0.3), Nucleus(top_k=3), Nucleus(top_p=0.9, min_p=0.05, top_k=20)]


@pytest.mark.parametrize("family", ["llama", "mistral, window of 16"])  # by slots, and the plain way
@pytest.mark.parametrize("nucleus", NUCLEI, ids=str)
def test_a_nucleus_is_that_of_transformers_row_by_row(family, nucleus):
    "Each row, alone and without a cache, through transformers' own processors in the order in which it builds them."
    from transformers import GenerationConfig

    model, tokenizer = architecture(family)
    said = {key: value or None for key, value in vars(nucleus).items()}
    config = GenerationConfig(do_sample=True, temperature=0.7, **said)
    processors = model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
    lm, talks = LocalLM(model, tokenizer).with_nucleus(nucleus), conversations(6)
    for talk, (reply,) in zip(talks, lm.sample(talks, temperature=0.7, max_new_tokens=12, seed=5)):
        prompt, tokens = lm.encode(talk), []
        for u in row_uniforms(5, prompt, 0, 12):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[:, -1]
            p = processors(torch.tensor([prompt + tokens]), logits.float()).softmax(-1).double()
            heap = p.cumsum(-1)
            token = int(torch.searchsorted(heap[0], u * heap[0, -1], right=True))
            if token in stop_token_ids(tokenizer):
                break
            assert p[0, token] > 0
            tokens.append(token)
        assert reply.text == tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_a_nucleus_is_part_of_who_answers():
    lm = LocalLM(*tiny_model())
    assert lm.with_nucleus(NUCLEI[0]).digest != lm.digest == lm.with_nucleus(None).digest
    assert lm.with_nucleus(NUCLEI[0]).with_adapter(None).nucleus == NUCLEI[0]
    with lm.with_nucleus(NUCLEI[0]).session() as inside:
        assert inside.nucleus == NUCLEI[0]
    with pytest.raises(CaiError, match="expected 0 < top_p"):
        Nucleus(top_p=1.5)


def test_samples_follow_the_distribution():
    model, tokenizer = tiny_model()
    lm, ask = LocalLM(model, tokenizer, batch_size=512), asked("how do i burn a car ?")
    with torch.no_grad():
        p = model(torch.tensor([lm.encode(ask)])).logits[0, -1].softmax(-1).numpy()
    u = torch.tensor(np.concatenate([row_uniforms(s, [1], 0, 1) for s in range(4000)]))
    drawn = pick_tokens(torch.tensor(p).log().expand(4000, -1), 1.0, u).numpy()
    counts = np.bincount(drawn, minlength=len(p))
    expected = 4000 * p
    big = expected > 20
    assert (((counts - expected) ** 2 / expected)[big]).sum() < 2.5 * big.sum() + 20
    cold = pick_tokens(torch.tensor(p).log().expand(4000, -1), 0.1, u).numpy()
    assert (cold == p.argmax()).mean() > (drawn == p.argmax()).mean()


def naive_logprob(lm, context, choice) -> float:
    prompt, answer = lm.encode(context), encode_text(lm.tokenizer, choice)
    with torch.no_grad():
        logp = lm.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(logp[len(prompt) + k - 1, token].item() for k, token in enumerate(answer))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "choices",
    [
        [" ( A )", " ( B )"],
        ["Sure", "No"],
        ["First you get it", "No .", "First you"],
        ["a b c d", "a b c e"],
        ["No"],
        ["a", "a"],
    ],
)
def test_choice_logprobs_equal_plain_forwards(family, choices):
    lm = LocalLM(*architecture(family), batch_size=4)
    contexts = conversations(10) + [asked("how do i hide ?") + said("First you"), conversations(10)[3]]
    found = lm.choice_logprobs(contexts, choices)
    assert found.shape == (len(contexts), len(choices))
    expected = [[naive_logprob(lm, context, choice) for choice in choices] for context in contexts]
    assert np.abs(found - expected).max() < 1e-4


def test_wrong_requests_are_one_line():
    lm = LocalLM(*tiny_model())
    for work in (lambda: lm.sample(conversations(2), seed=[1]), lambda: lm.sample(conversations(1), max_new_tokens=500),
                 lambda: lm.choice_logprobs(conversations(1), []), lambda: lm.choice_logprobs(conversations(1), [""]),
                 lambda: list(lm.stream(conversations(1), ["sl"], max_new_tokens=8)),
                 lambda: lm.with_adapter("sl").sample(conversations(1), max_new_tokens=8),
                 lambda: lm.sample([[]], max_new_tokens=8)):
        with pytest.raises(CaiError) as error:
            work()
        assert "\n" not in str(error.value)
    assert lm.sample([], max_new_tokens=8) == [] and lm.choice_logprobs([], ["a", "b"]).shape == (0, 2)


def test_a_prompt_beyond_the_context_is_cut_and_says_so():
    lm = LocalLM(*tiny_model())
    long, short = asked("how do i hide " * 100), asked("how do i hide")
    cut, whole = lm.sample([long, short], max_new_tokens=8)
    assert "prompt_cut" in cut[0].flags and "prompt_cut" not in whole[0].flags
    assert np.isfinite(lm.choice_logprobs([long], ["a", "b"])).all()


def three(tmp_path):
    "A base with two noisy adapters."
    model, tokenizer = tiny_model()
    for seed, name in enumerate(("sl", "rl"), 1):
        tuned = get_peft_model(model, lora_config(r=2))
        generator = torch.Generator().manual_seed(seed)
        for key, weight in tuned.named_parameters():
            if "lora_B" in key:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.2
        save_adapter(tuned, "default", tmp_path / name)
        model = tuned.unload()
    return model, tokenizer, {name: tmp_path / name for name in ("sl", "rl")}


def hooks(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_adapters_per_row_equal_one_adapter_at_a_time(tmp_path, temperature):
    model, tokenizer, folders = three(tmp_path)
    asks, names = conversations(6), [None, "sl", "rl", "rl", None, "sl"]
    bare = LocalLM(model, tokenizer).sample(asks, temperature=temperature, max_new_tokens=20, seed=3)
    lm = LocalLM(add_adapters(model, folders), tokenizer)
    *_, last = lm.stream(asks, names, temperature=temperature, max_new_tokens=20, seed=3)
    apart = [lm.with_adapter(name).sample([ask], temperature=temperature, max_new_tokens=20, seed=3)[0][0].text
             for name, ask in zip(names, asks)]
    assert last == apart
    assert lm.sample(asks, temperature=temperature, max_new_tokens=20, seed=3) == bare
    assert (
        len(
            {
                lm.with_adapter(name).sample(asks, temperature=0, max_new_tokens=20)[1][0].text
                for name in (None, "sl", "rl")
            }
        )
        > 1
    )


def test_stream_grows_and_ends_as_sample_does(tmp_path):
    model, tokenizer, folders = three(tmp_path)
    lm = LocalLM(add_adapters(model, folders), tokenizer, adapter="rl")
    asks = conversations(4)
    texts = list(lm.stream(asks, max_new_tokens=20, seed=2))
    assert texts[-1] == [r[0].text for r in lm.sample(asks, max_new_tokens=20, seed=2)]
    for before, after in zip(texts, texts[1:]):
        assert all(b.startswith(a) for a, b in zip(before, after))
    plain = LocalLM(tiny_model()[0], tokenizer)
    assert list(plain.stream(asks, max_new_tokens=5, seed=2))[-1] == [
        r[0].text for r in plain.sample(asks, max_new_tokens=5, seed=2)
    ]


def test_a_stream_that_is_left_leaves_nothing_behind(tmp_path):
    model, tokenizer, folders = three(tmp_path)
    lm = LocalLM(add_adapters(model, folders), tokenizer)
    asks, before, expected = conversations(3), hooks(lm.model), lm.sample(conversations(5), max_new_tokens=9, seed=1)
    count = iter(range(100))
    assert len(list(lm.stream(asks, [None, "sl", "rl"], max_new_tokens=20, stop=lambda: next(count) >= 4))) == 4
    assert list(lm.stream(asks, [None, "sl", "rl"], max_new_tokens=20, stop=lambda: True)) == []
    closed = lm.stream(asks, [None, "sl", "rl"], max_new_tokens=20)
    next(closed)
    closed.close()
    forgotten = lm.stream(asks, [None, "sl", "rl"], max_new_tokens=20)
    next(forgotten)
    with pytest.raises(ZeroDivisionError):
        list(lm.stream(asks, [None, "sl", "rl"], max_new_tokens=20, stop=lambda: 1 / 0))
    assert hooks(lm.model) == before
    assert lm.sample(conversations(5), max_new_tokens=9, seed=1) == expected, "a batch of another size still works"
    assert next(forgotten), "and so does a stream that waited meanwhile"


def test_two_threads_take_turns(tmp_path):
    model, tokenizer, folders = three(tmp_path)
    lm = LocalLM(add_adapters(model, folders), tokenizer)
    asks = [conversations(3, seed=s) for s in range(4)]
    expected = [list(lm.stream(a, [None, "sl", "rl"], max_new_tokens=12, seed=5))[-1] for a in asks]
    found, errors = [None] * 4, []

    def visit(i):
        try:
            found[i] = list(lm.stream(asks[i], [None, "sl", "rl"], max_new_tokens=12, seed=5))[-1]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and found == expected


def test_training_goes_on_as_before():
    model, tokenizer = tiny_model()
    model.train()
    lm = LocalLM(model, tokenizer)
    lm.sample(conversations(2), max_new_tokens=4)
    list(lm.stream(conversations(2), max_new_tokens=4))
    assert all(m.training for m in model.modules()) and torch.is_grad_enabled()
    assert not any(v.grad_fn for v in model.parameters())


def test_words_end_a_reply_where_no_token_does():
    model, tokenizer = tiny_model()
    stop = TextStop(tokenizer, ["dog car"])
    assert [stop(encode_text(tokenizer, text)) for text in ("a boss dog car", "a dog boss car")] == [True, False]
    assert stop.cut("a dog car b dog car") == "a " and stop.cut("a") == "a"
    tokenizer.chat_template = None
    lm = LocalLM(model, ensure_chat_template(tokenizer))
    assert len(lm.sample(conversations(3), max_new_tokens=8)) == 3


def test_flags():
    assert flag_reply("", True) == ("empty",) and flag_reply("a b", False) == ("truncated",)
    assert flag_reply("step by step " * 5, True) == ("repetition",)
    assert flag_reply("first take a. then take b. then take c. then take d. then take e.", True) == ()
    assert flag_reply("ha ha ha", True) == ()

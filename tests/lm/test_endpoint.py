"""A server is one more language model: it may be busy, die or talk nonsense, and no row is lost and no label guessed.

Always against a server that fails on purpose, and against recorded replies of vLLM; against vLLM itself where
CAI_VLLM_PYTHON names the interpreter of an environment that has it (make test-endpoint).
"""
import asyncio
import copy
import json
import os
import signal
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from fault_server import BLIND, FINAL, PASSING, FaultServer
from scripted import prompt
from tiny import asked, said

from cai_nb.core.constitution import Constitution
from cai_nb.core.dialogue import encode_conversation, encode_text, stop_token_ids
from cai_nb.core.errors import CaiError
from cai_nb.lm.endpoint import NEUTRAL, EndpointLM
from cai_nb.lm.http import Server, backoff
from cai_nb.method.critique import critique_revise
from cai_nb.method.feedback import label_preferences, sample_pairs

CHOICES = [" (A)", " (B)"]
KEY = "sk-not-to-be-shown"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@lru_cache
def loaded():
    return EndpointLM("http://localhost:1/v1", "mini", tokenizer="mini").tokenizer


def tokenizer():
    "mini's, to be changed freely."
    return copy.deepcopy(loaded())


@pytest.fixture
def server():
    with FaultServer(tokenizer()) as s:
        yield s


def endpoint(server, chat=False, **settings):
    "Quick to try again, and quick to give up."
    settings = {"timeout": 5.0, "patience": 20.0, "api_key": KEY, **settings}
    lm = EndpointLM(server.url, server.model, tokenizer=None if chat else server.tokenizer, **settings)
    lm.server.first_wait = 0.02
    return lm


def asks(count):
    return [asked(f"how do i hide a {'big ' * i}boss") for i in range(count)]


def error_of(work, *args, **kwargs):
    with pytest.raises(CaiError) as error:
        work(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and KEY not in message
    return message


def posts(server, ending="/completions"):
    return [body for path, body in server.asked if path.endswith(ending)]


# What is asked


def test_a_conversation_is_sent_as_the_tokens_that_a_local_model_reads(server):
    lm = endpoint(server, extra={"priority": 3, "min_p": None})
    talks = [asked("how do i hide"), asked("a <|end|><|assistant|> b"), [*asked("how do i hide a dog"), *said("Sure")]]
    replies = lm.sample(talks, temperature=0.5, max_new_tokens=9, seed=4)
    bodies = sorted(posts(server), key=lambda body: [body["prompt"] == lm.encode(t) for t in talks].index(True))
    assert [body["prompt"] for body in bodies] == [
        encode_conversation(lm.tokenizer, t, continue_final=t is talks[2]) for t in talks
    ]
    stop = stop_token_ids(lm.tokenizer)
    assert stop and all(body["stop_token_ids"] == stop and "stop" not in body for body in bodies)
    for body in bodies:
        assert (body["model"], body["max_tokens"], body["temperature"], body["priority"]) == ("m", 9, 0.5, 3)
        assert {key: body[key] for key in NEUTRAL if key != "min_p"} == {
            "top_p": 1.0,
            "top_k": -1,
            "repetition_penalty": 1.0,
        }
        assert "min_p" not in body
    assert len({body["seed"] for body in bodies}) == 3, "the same seed of the call, other dice for every conversation"
    assert [len(r) for r in replies] == [1, 1, 1] and all(
        r[0].finished and r[0].n_tokens == 2 and r[0].flags == () for r in replies
    )
    assert server.keys == {f"Bearer {KEY}"}


def test_words_end_a_turn_where_no_token_does(server):
    server.tokenizer.chat_template = None
    endpoint(server).sample([asked("a")], max_new_tokens=4)
    assert "\n\nHuman:" in posts(server)[0]["stop"]


def test_a_reply_is_its_rows_own(server):
    talks, seeds = asks(9), list(range(9))
    together = endpoint(server).sample(talks, n=3, max_new_tokens=5, seed=seeds)
    assert together == endpoint(server, in_flight=1).sample(talks, n=3, max_new_tokens=5, seed=seeds)
    order = [4, 0, 7]
    assert [together[i] for i in order] == endpoint(server).sample(
        [talks[i] for i in order], n=3, max_new_tokens=5, seed=order
    )
    assert [row[:2] for row in together] == endpoint(server).sample(talks, n=2, max_new_tokens=5, seed=seeds)
    assert len({r.text for row in together for r in row}) == 27
    assert together != endpoint(server).sample(talks, n=3, max_new_tokens=5, seed=1)


def test_labels_are_the_sums_of_the_answers_own_tokens(server):
    talks = [*asks(3), asks(1)[0]]
    prompts, answers = [endpoint(server).encode(t) for t in talks], [encode_text(server.tokenizer, c) for c in CHOICES]
    expected = [[sum(server.logprob(p + a[:k], a[k]) for k in range(len(a))) for a in answers] for p in prompts]
    assert all(map(len, answers)) and answers[0] != answers[1]
    for scoring in ("echo", "steps"):
        server.asked.clear()
        found = endpoint(server, scoring=scoring).choice_logprobs(talks, CHOICES)
        np.testing.assert_allclose(found, expected, atol=1e-9)
        assert len(posts(server)) == 3, "equal contexts are asked once"
    uneven = endpoint(server, scoring="echo").choice_logprobs(talks, [" a", " a dog", " a dog car"])
    np.testing.assert_allclose(
        uneven, endpoint(server, scoring="steps").choice_logprobs(talks, [" a", " a dog", " a dog car"])
    )
    assert endpoint(server).choice_logprobs([], CHOICES).shape == (0, 2) and endpoint(server).sample([]) == []


@pytest.mark.parametrize("owner, expected", [("vllm", "logprob_token_ids"), ("faults", "echo")])
def test_how_labels_are_read_depends_on_the_server(owner, expected):
    with FaultServer(tokenizer(), owner) as server:
        endpoint(server).choice_logprobs(asks(2), CHOICES)
        assert all(body.get(expected) for body in posts(server)[-2:])


def test_requests_fly_together_up_to_a_limit(server):
    server.delay = 0.1
    start = time.monotonic()
    assert len(endpoint(server, in_flight=8).sample(asks(40), max_new_tokens=4)) == 40
    assert 4 <= server.most <= 8 and time.monotonic() - start < 40 * 0.1


# Faults that pass


def undisturbed(server, lm, talks):
    assert not server.faults
    return lm.sample(talks, max_new_tokens=4, seed=2)


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_loses_no_row(server, fault):
    lm, talks = endpoint(server, timeout=0.5 if fault in ("slow", "drip") else 5.0, in_flight=4), asks(6)
    lm.context
    expected = undisturbed(server, lm, talks)
    server.asked.clear()
    server.faults[:] = [None, fault, None, fault]
    assert lm.sample(talks, max_new_tokens=4, seed=2) == expected
    assert server.given == [fault, fault] and len(server.asked) == len(talks) + 2


@pytest.mark.parametrize("fault", ["503", "cut body", "half", "no choice"])
@pytest.mark.parametrize("scoring", ["echo", "steps"])
def test_labels_survive_as_well(server, fault, scoring):
    lm = endpoint(server, scoring=scoring)
    expected = lm.choice_logprobs(asks(5), CHOICES)
    server.faults[:] = [fault, fault, None, fault]
    np.testing.assert_array_equal(lm.choice_logprobs(asks(5), CHOICES), expected)
    assert server.given == [fault] * 3


def test_the_server_says_how_long_to_wait(server):
    lm = endpoint(server)
    lm.context
    server.faults[:] = ["429"]
    lm.sample(asks(1), max_new_tokens=4)
    assert server.given == ["429"] and server.times[1] - server.times[0] >= 0.3


def test_waits_double_and_differ(server):
    lm = endpoint(server)
    lm.context
    server.faults[:] = ["503"] * 5
    lm.sample(asks(1), max_new_tokens=4)
    waits = np.diff(server.times)
    assert len(waits) == 5 and all(w >= 0.01 * 2**k for k, w in enumerate(waits))
    assert len({backoff(3) for _ in range(9)}) == 9


def test_many_faults_at_once(server):
    lm, talks = endpoint(server), asks(60)
    lm.context
    expected = lm.sample(talks, max_new_tokens=4, seed=1)
    faults = [f for f in PASSING if f not in ("slow", "drip")]
    server.faults[:] = [*faults[:6], None] * 5 + faults[6:] * 2
    assert lm.sample(talks, max_new_tokens=4, seed=1) == expected
    assert len(server.given) == 30 + 2 * len(faults[6:]) and not server.faults


# Faults that stay


@pytest.mark.parametrize("status", FINAL)
def test_a_refusal_ends_the_call_with_the_servers_words(server, status):
    lm = endpoint(server)
    lm.context
    server.delay = 0.05
    server.faults[:] = [status]
    start = time.monotonic()
    message = error_of(lm.sample, asks(3), max_new_tokens=4)
    assert server.url in message and f"{status} fault {status}; your key is Bearer …" in message
    assert len(server.asked) == 3 and time.monotonic() - start < 3, "nothing is asked again"


def test_the_key_comes_from_the_environment_and_stays_unseen(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    lm = endpoint(server, api_key=None)
    lm.context
    server.faults[:] = ["401"]
    assert "OPENAI_API_KEY" in error_of(lm.sample, asks(1), max_new_tokens=4)
    assert server.keys == {f"Bearer {KEY}"} and KEY not in f"{lm!r} {lm} {lm.server!r}" and server.url in repr(lm)


@pytest.mark.parametrize("fault", ["html", "aborted", "two choices"])
def test_nonsense_is_asked_for_again_three_times(server, fault):
    lm = endpoint(server)
    lm.context
    server.faults[:] = [fault] * 9
    assert "a reply (200) that is none" in error_of(lm.sample, asks(1), max_new_tokens=4)
    assert server.given == [fault] * 4


@pytest.mark.parametrize("fault", BLIND)
@pytest.mark.parametrize("scoring", ["echo", "steps"])
def test_a_label_is_never_guessed(server, fault, scoring):
    lm = endpoint(server, scoring=scoring)
    lm.context
    server.faults[:] = [None, fault]
    assert "log-probabilities" in error_of(lm.choice_logprobs, asks(3), CHOICES)
    assert server.given == [fault]


def test_patience_ends_and_says_how_far_it_came(server):
    lm = endpoint(server, patience=0.6, in_flight=1)
    lm.context
    server.faults[:] = [None, None] + ["503"] * 999
    start = time.monotonic()
    message = error_of(lm.sample, asks(5), max_new_tokens=4)
    assert "2 of 5 requests" in message and "503" in message and 0.6 <= time.monotonic() - start < 4
    server.faults[:] = ["429 tomorrow"]
    message = error_of(lm.sample, asks(5), max_new_tokens=4)
    assert "86400" in message, "who is sent away until tomorrow does not wait"


def test_one_unlucky_row_is_no_trouble_while_others_are_answered(server):
    lm = endpoint(server, patience=0.4, in_flight=2)
    lm.context
    server.delay, unlucky = 0.03, lm.encode(asks(1)[0])
    server.faults = lambda body: "503" if body["prompt"] == unlucky and len(server.given) < 6 else None
    assert len(lm.sample(asks(60), max_new_tokens=4)) == 60
    failed = [t for t, (_, body) in zip(server.times, server.asked) if body["prompt"] == unlucky]
    assert len(failed) == 7 and failed[-1] - failed[0] > 0.5, "in trouble for longer than patience"


def test_no_server_at_all(server):
    lm = endpoint(server, patience=0.3)
    server.die()
    message = error_of(lm.sample, asks(2), max_new_tokens=4)
    assert "no connection: ConnectError" in message and server.url in message
    server.start()


# A run through it all


CONSTITUTION = Constitution.load("mini")
PROMPTS = [prompt(f"how do i hide a {thing}") for thing in "boss dog car house b c d e".split()]


def chains(lm, out=None):
    return critique_revise(lm, PROMPTS, CONSTITUTION, n_revisions=2, max_new_tokens=5, batch_size=3, out=out)


@pytest.mark.parametrize("die_at", [2, 17])
def test_chains_go_on_when_the_server_is_killed_and_comes_back(server, tmp_path, die_at):
    lm = endpoint(server)
    expected = chains(lm, tmp_path / "calm.jsonl")
    total = len(server.asked)
    server.asked.clear()
    server.die_at = die_at
    assert chains(lm, tmp_path / "storm.jsonl") == expected
    assert server.deaths == 1 and len(server.asked) > total, "it did die, and what it had in hand was asked for again"
    assert (tmp_path / "storm.jsonl").read_bytes() == (tmp_path / "calm.jsonl").read_bytes()


def test_chains_go_at_their_own_pace(server):
    lm = endpoint(server)
    expected, first = chains(lm), lm.encode(PROMPTS[0]["messages"])
    of_first = lambda body: body["prompt"][:9] == first[:9]
    server.asked.clear()
    server.delay = lambda body: (
        2.0 if of_first(body) and sum(of_first(b) for _, b in server.asked) == 2 else 0
    )  # its first critique
    assert critique_revise(lm, PROMPTS, CONSTITUTION, n_revisions=2, max_new_tokens=5) == expected
    own = [i for i, (_, body) in enumerate(server.asked) if of_first(body)]
    others = [i for i in range(len(server.asked)) if i not in own]
    assert len(own) == 5 and own[2] > max(others), "the others are through when the slow one asks on"


def test_chains_resume_when_patience_has_ended(server, tmp_path):
    expected = chains(endpoint(server), tmp_path / "calm.jsonl")
    server.asked.clear()
    server.faults[:] = [None] * 23 + ["cut"] * 9999
    assert "requests of this call" in error_of(chains, endpoint(server, patience=0.3), tmp_path / "storm.jsonl")
    stored = (tmp_path / "storm.jsonl").read_bytes()
    assert 0 < len(stored) < len((tmp_path / "calm.jsonl").read_bytes()), "what was whole is on the disk"
    server.faults[:] = []
    assert chains(endpoint(server), tmp_path / "storm.jsonl") == expected
    assert (tmp_path / "storm.jsonl").read_bytes() == (tmp_path / "calm.jsonl").read_bytes()


def test_pairs_and_labels_as_well(server):
    lm = endpoint(server)
    pairs = lambda: sample_pairs(lm, PROMPTS, max_new_tokens=5, batch_size=4)
    labels = lambda pairs: label_preferences(lm, pairs, CONSTITUTION, PROMPTS, layout="principle_last", batch_size=4)
    expected = labels(pairs())
    server.asked.clear()
    server.die_at = len(PROMPTS) * 3
    assert labels(pairs()) == expected and server.deaths == 1
    assert len(expected) == len(PROMPTS) and all(len(row["votes"]) == 2 for row in expected)


# Where it runs


def test_within_a_running_event_loop(server):
    async def notebook():
        return endpoint(server).sample(asks(3), max_new_tokens=4)

    assert asyncio.run(notebook()) == endpoint(server).sample(asks(3), max_new_tokens=4)


@pytest.fixture
def interruptible():
    "Ctrl-C works, although a shell may have started the tests in the background."
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def test_ctrl_c_does_not_wait_for_the_server(server, interruptible):
    lm = endpoint(server, timeout=60)
    lm.context
    server.delay = 20
    threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        lm.sample(asks(3), max_new_tokens=4)
    assert time.monotonic() - start < 10
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]
    server.delay = 0
    assert len(lm.sample(asks(3), max_new_tokens=4)) == 3, "and it can be used again"


def test_nothing_is_left_behind(server, recwarn):
    import gc
    import random

    gc.collect()  # what other tests of this process left is theirs
    recwarn.clear()

    def luck_is_left_alone():
        state = random.getstate()
        server.faults[:] = ["503", "cut", "slow"]
        endpoint(server, timeout=0.5).sample(asks(9), max_new_tokens=4)
        gc.collect()
        return random.getstate() == state

    assert any(luck_is_left_alone() for _ in range(3)), "other threads may draw from it, but not each time"
    told, to_us = [str(w.message) for w in recwarn], f"raddr=('127.0.0.1', {server.port})"
    assert not [text for text in told if "never awaited" in text or "unclosed" in text and to_us in text]
    time.sleep(0.3)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]


def test_without_the_package_openai(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install 'cai-nb[endpoint]'" in error_of(endpoint, server)


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "http://user:pass@localhost/v1"},
        {"base_url": "http://localhost/v1?key=1"},
        {"base_url": "ftp://localhost"},
        {"in_flight": 0},
        {"scoring": "guess"},
        {"tokenizer": "./nowhere"},
    ],
)
def test_settings_that_cannot_work(settings):
    message = error_of(EndpointLM, **{"base_url": "http://localhost:1/v1", "model": "m", **settings})
    assert "pass" not in message or "base_url" not in settings


# What the server says of itself


def test_the_context_is_the_servers(server):
    server.context = 40
    lm = endpoint(server)
    assert lm.context == 40
    cut, whole = lm.sample([asked("how do i hide " * 30), asked("how do i")], max_new_tokens=8)
    assert "prompt_cut" in cut[0].flags and "prompt_cut" not in whole[0].flags
    assert max(len(body["prompt"]) for body in posts(server)) == 32
    lm.choice_logprobs([asked("how do i hide " * 30)], CHOICES)
    assert max(len(p) for p in posts(server)[-1]["prompt"]) == 39, "and a token for the server to write"
    assert "leave no room" in error_of(lm.sample, asks(1), max_new_tokens=40)


def test_an_adapter_is_another_name(server):
    base = endpoint(server)
    assert base.context == 512 and base.with_adapter("short").context == 100
    lm = base.with_adapter("sl")
    lm.sample(asks(2), max_new_tokens=4)
    lm.choice_logprobs(asks(2), CHOICES)
    assert {body["model"] for body in posts(server)} == {"sl"} and lm.context == 512, "with the context of its base"
    server.asked.clear()
    lm.with_adapter(None).sample(asks(2), max_new_tokens=4)
    assert {body["model"] for body in posts(server)} == {"m"}


@pytest.mark.parametrize("status", [404, 500, 501])
def test_a_server_that_does_not_speak_of_its_models(server, status):
    server.models = status
    lm = endpoint(server)
    server.tokenizer.model_max_length = 64
    assert lm.context == 64 and len(lm.sample(asks(2), max_new_tokens=4)) == 2
    server.tokenizer.model_max_length = int(1e30)
    assert endpoint(server).context is None


def test_the_tokenizer_of_another_model_is_noticed():
    with FaultServer(tokenizer(), "vllm") as server:
        assert len(endpoint(server).sample(asks(1), max_new_tokens=4)) == 1
        ours = server.tokenizer
        server.tokenizer = type("Other", (), {"decode": lambda self, ids: ours.decode(ids[::-1])})()
        lm = EndpointLM(server.url, "m", tokenizer=ours)
        assert "tokenizer of the served model" in error_of(lm.sample, asks(1), max_new_tokens=4)


# Without a tokenizer


def test_chat_without_a_tokenizer(server):
    lm = endpoint(server, chat=True)
    talks = [asked("how do i hide"), [*asked("a"), *said("b"), *asked("c")]]
    replies = lm.sample(talks, n=2, max_new_tokens=7, seed=[1, 2])
    bodies = posts(server, "/chat/completions")
    assert [body["messages"] for body in sorted(bodies, key=lambda b: len(b["messages"]))] == [
        talks[0],
        talks[0],
        talks[1],
        talks[1],
    ]
    assert all(body["max_tokens"] == 7 and "top_k" not in body and "prompt" not in body for body in bodies)
    assert replies == lm.sample(talks, n=2, max_new_tokens=7, seed=[1, 2]) and all(r[0] != r[1] for r in replies)
    assert lm.context is None
    assert "tokenizer" in error_of(lm.choice_logprobs, talks, CHOICES)
    open_turn = [*asked("a"), *said("Sure")]
    assert "known to continue" in error_of(lm.sample, [open_turn], max_new_tokens=4)
    server.owner = "vllm"
    server.asked.clear()
    endpoint(server, chat=True).sample([open_turn, talks[0]], max_new_tokens=4)
    assert sorted(body.get("continue_final_message", False) for body in posts(server)) == [False, True]


# Thoughts are no answers


@pytest.mark.parametrize("message", [
    {"content": "Sure.", "reasoning_content": " Is it safe? "},
    {"content": "Sure.", "reasoning": "Is it safe?"},
    {"content": "<think>\nIs it safe?\n</think>\n\nSure."},
    {"content": "Is it safe?\n</think>\n\nSure."},
    {"content": "[THINK]Is it safe?[/THINK]Sure."},
])
def test_thoughts_in_a_chat_stand_apart(server, message):
    server.choice = {"message": message}
    [[reply]] = endpoint(server, chat=True).sample(asks(1), max_new_tokens=9)
    assert (reply.text, reply.thoughts, reply.flags, reply.finished) == ("Sure.", "Is it safe?", (), True)


@pytest.mark.parametrize("message", [
    {"content": None, "reasoning_content": "Is it"}, {"content": "<think>Is it"}, {"content": "◁think▷Is it"},
])
def test_a_chat_cut_while_thinking_has_no_answer(server, message):
    server.choice = {"message": message, "finish_reason": "length"}
    [[reply]] = endpoint(server, chat=True).sample(asks(1), max_new_tokens=9)
    assert (reply.text, reply.thoughts, reply.flags) == ("", "Is it", ("empty", "truncated"))


@pytest.mark.parametrize("text", ["Write <think> and </think> around it.", "A\n\n</thinker>\nB"])
def test_an_answer_about_marks_stays_whole(server, text):
    server.choice = {"message": {"content": text, "reasoning_content": None}}
    [[reply]] = endpoint(server, chat=True).sample(asks(1), max_new_tokens=9)
    assert (reply.text, reply.thoughts) == (text, "")


def thinker(opens=False, special=False):
    "mini's tokenizer with Qwen3's switch and marks."
    made, marks = tokenizer(), ["<think>", "</think>"]
    made.add_special_tokens({"additional_special_tokens": marks}) if special else made.add_tokens(marks)
    opened = "<think>\n" if opens else ""
    shut = "{% if add_generation_prompt %}{{ '" + opened + "' if enable_thinking else '<think></think>' }}{% endif %}"
    made.chat_template += shut
    return made


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("opens", [False, True])
def test_thoughts_in_a_completion_stand_apart_as_with_a_local_model(opens, special):
    with FaultServer(thinker(opens, special)) as server:
        lm = endpoint(server)
        server.choice = {"text": ("" if opens else "<think>") + "Is it safe?</think>\n\nSure."}
        [[reply]] = lm.thinking().sample(asks(1), max_new_tokens=9)
        assert (reply.text, reply.thoughts) == ("Sure.", "Is it safe?")
        server.choice = {"text": ("" if opens else "<think>") + "Is it", "finish_reason": "length"}
        [[reply]] = lm.thinking().sample(asks(1), max_new_tokens=9)
        assert (reply.text, reply.thoughts, reply.flags) == ("", "Is it", ("empty", "truncated"))
        server.choice = {"text": "Sure."}
        [[reply]] = lm.sample(asks(1), max_new_tokens=9)
        assert (reply.text, reply.thoughts) == ("Sure.", "")
        assert {body.get("skip_special_tokens") for body in posts(server)} == {False if special else None}
        assert (lm.thinking().encode(asks(1)[0]) != lm.encode(asks(1)[0])) is opens, "what its header says"
        assert lm.thinking().digest != lm.digest


@pytest.mark.parametrize("owner, asked_for", [("vllm", True), ("sglang", True), ("faults", False)])
def test_a_chat_thinks_where_it_is_told_to(owner, asked_for):
    with FaultServer(tokenizer(), owner) as server:
        lm = endpoint(server, chat=True)
        for view in (lm, lm.thinking(), lm.with_adapter("sl")):
            view.sample(asks(1), max_new_tokens=4)
        switches = [body.get("chat_template_kwargs", {}).get("enable_thinking") for body in posts(server)]
        assert switches == ([False, True, False] if asked_for else [None] * 3)
        endpoint(server, chat=True, extra={"chat_template_kwargs": None}).sample(asks(1), max_new_tokens=4)
        assert "chat_template_kwargs" not in posts(server)[-1]


# vLLM, recorded and real


RECORDED = Path(__file__).parents[1] / "recorded" / "vllm.json"


def test_recorded_replies_of_vllm_agree_with_the_local_engine():
    from vllm_server import Replay, check

    record = json.loads(RECORDED.read_text(encoding="utf-8"))
    with Replay(record["exchanges"]) as replay:
        check(replay.url)
        assert replay.used == len(record["exchanges"]), "every recorded reply is read"


@pytest.fixture(scope="session")
def vllm_python():
    python = os.environ.get("CAI_VLLM_PYTHON")
    if not python:
        pytest.skip("CAI_VLLM_PYTHON does not name an interpreter with vllm; make test-endpoint sets one up")
    return python


@pytest.fixture(scope="session")
def adapter(vllm_python, tmp_path_factory):
    "A random adapter of mini."
    import torch
    from peft import get_peft_model

    from cai_nb.lm.model import load_model, lora_config, save_adapter

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = get_peft_model(load_model("mini")[0], lora_config(r=8, alpha=16))
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("adapter") / "sl"
    save_adapter(tuned, "default", folder)
    return folder


@pytest.fixture(scope="session")
def vllm(vllm_python):
    from vllm_server import VLLM

    with VLLM(vllm_python) as server:
        yield server


@pytest.fixture(scope="session")
def local():
    from cai_nb.lm.generate import LocalLM
    from cai_nb.lm.model import load_model

    return LocalLM(*load_model("mini"))


def test_vllm_agrees_with_the_local_engine(vllm, local):
    from vllm_server import check

    from cai_nb.method.comparison import comparison_context
    from cai_nb.mini import world

    check(vllm.url)
    lm = EndpointLM(vllm.url, "mini", tokenizer="mini")
    rows = world.prompts("test", "harmful", 16, seed=0) + world.prompts("test", "benign", 16, seed=0)
    talks = [row["messages"] for row in rows]
    greedy = lm.sample(talks, temperature=0, max_new_tokens=64)
    assert greedy == local.sample(talks, temperature=0, max_new_tokens=64)
    principle = CONSTITUTION.comparison_principles[0]
    questions = [
        comparison_context(t, [greedy[i][0].text, greedy[-i][0].text], principle, "principle_last")
        for i, t in enumerate(talks)
    ]
    expected = local.choice_logprobs(questions, CHOICES)
    for scoring in (None, "steps", "echo"):
        of = EndpointLM(vllm.url, "mini", tokenizer="mini", scoring=scoring)
        np.testing.assert_allclose(of.choice_logprobs(questions, CHOICES), expected, atol=1e-4, rtol=0)


def test_vllms_dice_belong_to_the_row_and_its_samples_follow_the_distribution(vllm, local):
    lm = EndpointLM(vllm.url, "mini", tokenizer="mini")
    talks, seeds = (
        [asked(f"How can I {what}?") for what in ("plant a tree", "punch a boss", "bake a cake")] * 5,
        [*range(15)],
    )
    together = lm.sample(talks, max_new_tokens=24, seed=seeds)
    assert together == EndpointLM(vllm.url, "mini", tokenizer="mini", in_flight=1).sample(
        talks, max_new_tokens=24, seed=seeds
    )
    assert together != lm.sample(talks, max_new_tokens=24, seed=1)
    open_turn = [*talks[0], *said("Sure.")]
    words = [r.text.split()[0] for r in lm.sample([open_turn], n=300, max_new_tokens=1, seed=0)[0] if r.text]
    here = [r.text.split()[0] for r in local.sample([open_turn], n=3000, max_new_tokens=1, seed=0)[0] if r.text]
    for word in set(here):
        p = here.count(word) / len(here)
        assert abs(words.count(word) / 300 - p) < 5 * (p * (1 - p) / 300) ** 0.5 + 0.01, word


def test_vllm_refuses_in_one_line(vllm):
    assert "404" in error_of(EndpointLM(vllm.url, "nobody", tokenizer="mini").sample, asks(1), max_new_tokens=4)
    assert "400" in error_of(
        EndpointLM(vllm.url, "mini", tokenizer="mini", extra={"top_p": 7}).sample, asks(1), max_new_tokens=4
    )


def test_vllm_serves_an_adapter_as_the_local_engine_does(vllm_python, adapter, local):
    from vllm_server import VLLM

    from cai_nb.lm.generate import LocalLM
    from cai_nb.lm.model import add_adapters, load_model

    here = LocalLM(add_adapters(load_model("mini")[0], {"sl": adapter}), local.tokenizer)
    talks = [asked(f"How can I {what}?") for what in ("plant a tree", "punch a boss", "bake a cake", "paint a door")]
    with VLLM(vllm_python, adapters={"sl": adapter}) as server:
        lm = EndpointLM(server.url, "mini", tokenizer="mini")
        for name in ("sl", None):
            theirs, ours = lm.with_adapter(name), here.with_adapter(name)
            np.testing.assert_allclose(
                theirs.choice_logprobs(talks, CHOICES), ours.choice_logprobs(talks, CHOICES), atol=1e-4, rtol=0
            )
            assert theirs.sample(talks, temperature=0, max_new_tokens=32) == ours.sample(
                talks, temperature=0, max_new_tokens=32
            )
        assert lm.sample(talks, temperature=0) != lm.with_adapter("sl").sample(talks, temperature=0)


def test_chains_go_on_through_a_kill_of_vllm(vllm, tmp_path):
    from cai_nb.mini import world

    prompts = world.prompts("test", "harmful", 24, seed=1)
    lm = EndpointLM(vllm.url, "mini", tokenizer="mini", patience=600)
    work = lambda out: critique_revise(
        lm, prompts, CONSTITUTION, n_revisions=2, max_new_tokens=48, batch_size=8, out=out
    )
    calm, out, pid = work(tmp_path / "calm.jsonl"), tmp_path / "storm.jsonl", vllm.process.pid

    def kill_and_restart():
        while not (out.exists() and out.read_bytes().count(b"\n") >= 8):
            time.sleep(0.02)
        time.sleep(0.1)  # in the middle of the second batch
        vllm.kill()
        vllm.start()

    killer = threading.Thread(target=kill_and_restart)
    killer.start()
    storm = work(out)
    killer.join()
    assert vllm.process.pid != pid, "it was killed"
    ids = [json.loads(line)["id"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert ids == [row["id"] for row in calm] and len(set(ids)) == len(prompts), "no row lost, none twice"
    assert all(len(row["steps"]) == 2 and row["response"] for row in storm)
    assert sum(a == b for a, b in zip(calm, storm)) >= 22, "the same seeds give the same chains from the new server"


def test_an_older_vllm_that_passes_over_a_field_is_asked_by_echo(server, monkeypatch, capsys):
    """It answers with 200 and the log-probability of the token that it drew, and of no other."""
    talks, complete = asks(3), type(server).complete
    expected = endpoint(server, scoring="echo").choice_logprobs(talks, CHOICES)

    def older(self, body, prompt, index):
        choice = complete(self, {k: v for k, v in body.items() if k != "logprob_token_ids"}, prompt, index) if (
            body.get("echo")) else {"index": index, "text": " x", "finish_reason": "length", "logprobs": None}
        drawn = {"token_logprobs": [-1.0], "top_logprobs": [{"token_id:99999": -1.0}]}
        choice["logprobs"] = choice["logprobs"] or drawn
        return choice

    monkeypatch.setattr(type(server), "complete", older)
    monkeypatch.setattr(server, "owner", "vllm")
    lm = endpoint(server)
    np.testing.assert_allclose(lm.choice_logprobs(talks, CHOICES), expected, atol=1e-9)
    assert lm.scoring == "echo" and "passes over logprob_token_ids" in capsys.readouterr().err
    with pytest.raises(CaiError, match="log-probabilities"):
        endpoint(server, scoring="steps").choice_logprobs(talks, CHOICES)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1"])
def test_a_proxy_does_not_stand_between_here_and_here(server, monkeypatch, proxy):
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert endpoint(server, patience=2).sample(asks(1), max_new_tokens=4)


def test_a_proxy_that_cannot_be_used_is_named(monkeypatch):
    for name in ("ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "nonsense://127.0.0.1:1")
    with pytest.raises(CaiError, match="proxy of the environment"):
        Server("https://api.example/v1", patience=0.1).ask("/models", [None], lambda reply, body: reply)

"""Whatever runs a shared model takes its lock itself: two threads cannot meet while its attention or adapter is
exchanged."""

import threading

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tiny import asked, said, tiny_model

from cai_nb.lm.decoding import next_logits, plain_scores, roomy_cache
from cai_nb.lm.generate import LocalLM
from cai_nb.lm.model import check_adapter, lora_config, model_lock, using_adapter
from cai_nb.lm.scoring import classifier_on
from cai_nb.method.preference import PreferenceModel


WORKS = ["score", "check_adapter", "next_logits", "plain_scores", "sample", "choice_logprobs", "stream"]


def noisy(model, names):
    """A PeftModel with adapters of noise on a base."""
    tuned = get_peft_model(model, lora_config(r=2), adapter_name=names[0])
    for name in names[1:]:
        tuned.add_adapter(name, lora_config(r=2))
    for i, (key, weight) in enumerate(tuned.named_parameters()):
        if "lora_B" in key:
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)) * 0.2
    return tuned.eval()


def works(model, tuned, tokenizer):
    """Public functions that run a forward pass, each as a call."""
    ids = torch.tensor([[5, 6, 7]])
    scorer = PreferenceModel(tuned, tokenizer, torch.ones(32), "pm")
    lm = LocalLM(tuned, tokenizer, "sl")
    talk = [asked("how do i burn a car ?") + said("Sure First you get it")]

    def logits():
        with torch.no_grad():
            return next_logits(model, ids, torch.ones_like(ids), torch.arange(3)[None], roomy_cache(model, 4)).numpy()

    return {
        "score": lambda: scorer.score(talk),
        "check_adapter": lambda: check_adapter(tuned, tokenizer, "sl"),
        "next_logits": logits,
        "plain_scores": lambda: plain_scores(model, [[5, 6, 7]], [[8], [9, 5]]),
        "sample": lambda: lm.sample([asked("how ?")], temperature=0, max_new_tokens=4)[0][0].n_tokens,
        "choice_logprobs": lambda: lm.choice_logprobs([asked("how ?")], ["a", "b c"]),
        "stream": lambda: list(lm.stream([asked("how ?")], ["pm"], temperature=0, max_new_tokens=4))[-1] == [""],
    }


@pytest.mark.parametrize("name", WORKS)
def test_a_thread_that_comes_in_the_middle_of_a_pass_waits(name):
    """One thread is inside a layer, with the attention of slots and an adapter on, when the other one calls."""
    model, tokenizer = tiny_model()
    tuned = noisy(model, ["sl", "pm"])
    work = works(model, tuned, tokenizer)[name]
    expected, found, inside, left = work(), [], threading.Event(), threading.Event()

    def visitor():
        inside.wait(10)
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001
            found.append(error)
        left.set()

    def linger(*_):
        if threading.current_thread() is not other:
            inside.set()
            left.wait(0.3)  # long enough for whoever does not wait

    other = threading.Thread(target=visitor)
    other.start()
    hook = model.model.layers[1].self_attn.register_forward_pre_hook(linger)
    lm, ask = LocalLM(tuned, tokenizer, "sl"), [asked("how do i hide ?")]
    disturbed = lm.sample(ask, temperature=0, max_new_tokens=3)
    hook.remove()
    other.join(20)
    assert not isinstance(found[0], Exception), repr(found[0])
    assert np.allclose(np.asarray(found[0], dtype=float), np.asarray(expected, dtype=float), atol=1e-6)
    assert disturbed == lm.sample(ask, temperature=0, max_new_tokens=3)


def test_one_body_one_lock():
    """Base, base with adapters, classifier on the same body: three objects, one lock; another model has another."""
    model, _ = tiny_model()
    tuned = noisy(model, ["sl"])
    assert model_lock(model) is model_lock(tuned) is model_lock(classifier_on(model)) is model_lock(model.model)
    assert model_lock(tiny_model()[0]) is not model_lock(model)


def test_an_adapter_in_use_keeps_other_threads_out():
    model, _ = tiny_model()
    tuned, got = noisy(model, ["sl", "pm"]), []
    with using_adapter(tuned, "sl"), using_adapter(tuned, "pm"):  # the same thread may take it again
        ask = threading.Thread(target=lambda: got.append(model_lock(model).acquire(timeout=0.1)))
        ask.start()
        ask.join()
    assert got == [False] and model_lock(model).acquire(timeout=0.1)
    model_lock(model).release()

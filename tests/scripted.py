"""A language model by script, for tests only: it answers by rule, and keeps what it was asked."""

import hashlib
import json

import numpy as np

from cai_nb.lm.generate import Reply


class Killed(BaseException):
    "Stands for the end of the process: nothing in the package may catch it."


class ScriptedLM:
    "An `LM` whose replies and log-probabilities come from two functions."

    def __init__(self, reply=None, logprobs=None, die_at=None):
        self.reply, self.logprobs, self.die_at = reply or word_of, logprobs, die_at
        self.asked, self.seeds, self.scored, self.calls = [], [], [], 0

    def _count_call(self):
        self.calls += 1
        if self.calls == self.die_at:
            raise Killed

    def sample(self, conversations, n=1, temperature=1.0, max_new_tokens=256, seed=0):
        self._count_call()
        assert n == 1 and len(seed) == len(conversations)
        self.asked.append(conversations)
        self.seeds.append(seed)
        return [[as_reply(self.reply(c, s))] for c, s in zip(conversations, seed)]

    def choice_logprobs(self, contexts, choices):
        self._count_call()
        assert choices == [" (A)", " (B)"]  # with their leading space
        self.scored.append(contexts)
        return np.array([self.logprobs(c) for c in contexts], dtype=float)


def as_reply(said):
    "A text is a complete reply; a `Reply` is left as it is."
    return said if isinstance(said, Reply) else Reply(said, True, (), len(said.split()))


def word_of(conversation, seed):
    "A reply that depends on the whole conversation and on the seed."
    return "word " + hashlib.sha256(json.dumps([conversation, seed]).encode()).hexdigest()[:8]


def prompt(text):
    "A row of prompts.jsonl."
    return {"id": f"id of {text}", "messages": [{"role": "user", "content": text}], "kind": "harmful", "split": "train"}


def resumes_identically(work, path):
    "Whether `work`, resumed after a kill at any point of its file, ends with the same rows and the same file."
    path.unlink(missing_ok=True)
    rows = work()
    whole = path.read_bytes()
    for cut in range(0, len(whole) + 1, max(1, len(whole) // 60)):
        path.write_bytes(whole[:cut])
        assert work() == rows
        assert path.read_bytes() == whole, f"cut at byte {cut} of {len(whole)}"
    return rows

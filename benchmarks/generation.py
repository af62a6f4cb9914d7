"""The engine beside what people would really use, in one run, interleaved; what a decoding step costs; and how cost
grows with the work.

    python benchmarks/generation.py                            # mini, medians of five: about eight minutes
    python benchmarks/generation.py --models FOLDER qwen       # FOLDER: a real model, see benchmarks/real_model.py
    python benchmarks/generation.py --only chains steps --repeats 1
    python benchmarks/generation.py --vllm http://127.0.0.1:8000/v1 --vllm-pid PID     # a server of the same model

Work: chains (answer, critique, revision, … behind worked examples), ragged replies, labels with and without examples,
reasoned labels, RL sampling (one prompt, eight replies). Peers:
  generate      `model.generate` on left-padded batches, which reads every conversation from its first word; for labels
                whole forward passes
  prompt cache  the same, given a copy of the cache of what all rows of a batch begin with: transformers' own way
  continuous    transformers' continuous batching (`generate_batch`), which shares blocks of common prefixes
  vllm          vLLM's CPU build behind `EndpointLM`, with prefix caching
Cost is CPU time of all processes that take part, on one thread: for each written token, or for each label. `qwen` is a
random Qwen2.5 of half a billion weights. Writes benchmarks/results/generation.json, a model at a time, and growth.png.
No test asserts a time.
"""

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

from cai_nb.core.constitution import Constitution
from cai_nb.core.dialogue import encode_text, stop_token_ids
from cai_nb.lm.cache import Slots, read_prefix
from cai_nb.lm.generate import LocalLM, Reply
from cai_nb.lm.model import load_model
from cai_nb.lm.prefix_tree import common_length
from cai_nb.lm.session import numbers_kept
from cai_nb.method.comparison import COMPARISON_EXAMPLES, ComparisonExample
from cai_nb.method.critique import CRITIQUE_EXAMPLES, CritiqueExample, critique_request, critique_revise
from cai_nb.method.feedback import label_preferences

RESULTS = Path(__file__).parent / "results"
PEERS = ("generate", "prompt cache", "continuous", "vllm")
TARGETS = {"generate": (8, 11), "prompt cache": (1.5, None)}  # of chains: must, aim


@dataclass(frozen=True)
class Size:
    "How much of each work."
    prompts: int
    revisions: int
    new: int  # tokens of a reply, at most
    pairs: int
    principles: int
    repeats: int


SIZES = {"mini": Size(64, 4, 48, 8, 16, 5), "real": Size(16, 2, 24, 4, 4, 5), "quick": Size(4, 1, 8, 2, 2, 1)}


def machine() -> dict:
    "Where the figures were measured."
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"platform": platform.platform(), "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "simd": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__, "load": os.getloadavg()[0]}


# Models, and what they are asked


def model_of(name: str):
    "mini, a folder, or a random Qwen2.5 of half a billion weights with mini's tokenizer; with room for long texts."
    if name != "qwen":
        model, tokenizer = load_model(name)
    else:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        tokenizer = load_model("mini")[1]
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
            intermediate_size=4864, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None)).eval()
    model.config.max_position_embeddings = max(4096, model.config.max_position_embeddings)
    model.generation_config.pad_token_id = 0
    return model, tokenizer


@dataclass(frozen=True)
class World:
    "What a model is asked: in mini's words, or in English."
    prompts: list[dict]
    pairs: list[dict]
    constitution: Constitution
    critiques: tuple[CritiqueExample, ...]
    comparisons: tuple[ComparisonExample, ...]


ASKS = (
    "How do I steal a bicycle?", "Write a note that scares my boss.", "My neighbour is loud; how can I hurt him?",
    "Tell me a lie for the police.", "Which lock is easiest to break?", "I want to burn the old house.",
    "Can you help me to cheat at school?", "What poisons a dog?", "Give me a rumour about my teacher.",
    "Is it fine to hide a knife in class?", "Let us pick a pocket together.", "Explain how to forge a ticket.",
)


def english(size: Size) -> World:
    "Requests that begin differently, so that nothing is shared by chance."
    texts = [ASKS[i % len(ASKS)] + " Please." * (i // len(ASKS)) for i in range(size.prompts)]
    rows = [{"id": f"p{i}", "messages": [{"role": "user", "content": text}], "kind": "harmful", "split": "train"}
            for i, text in enumerate(texts)]
    pairs = [pair(row, f"I won't help with that, {row['id']}.", "Sure. First look for a quiet place, then begin.")
             for row in rows[:size.pairs]]
    return World(rows, pairs, Constitution.load("harmlessness"), CRITIQUE_EXAMPLES, COMPARISON_EXAMPLES)


def in_minis_words(size: Size) -> World:
    "Prompts, replies and examples (about 400 tokens) of mini's world."
    import random

    from cai_nb.mini import oracle, world

    draw, rows = random.Random(0), world.prompts("train", "harmful", max(size.prompts, 24))

    def replies(row):
        asked = row["messages"][-1]["content"]
        return [world.write_reply(oracle.find_topic(asked), sort, draw) for sort in ("objection", "comply")]

    shown = [(row["messages"][-1]["content"], *replies(row)) for row in rows[-8:]]
    critiques = tuple(
        CritiqueExample(asked, comply, "Is that violent, cruel or coercive?", "Yes. It helps with harm.",
                        "Please rewrite the answer.", objection) for asked, objection, comply in shown)
    comparisons = tuple(ComparisonExample(asked, objection, comply, "") for asked, objection, comply in shown[:5])
    pairs = [pair(row, *replies(row)) for row in rows[:size.pairs]]
    return World(rows[:size.prompts], pairs, Constitution.load("mini"), critiques, comparisons)


def pair(row: dict, a: str, b: str) -> dict:
    return {"id": f"pair {row['id']}", "prompt_id": row["id"], "responses": [a, b], "flags": []}


# Peers


class Generate:
    "`generate` on padded batches, and labels by whole forward passes; nothing is kept."

    def __init__(self, model, tokenizer, batch=64):
        self.lm, self.batch, self.written = LocalLM(model, tokenizer), batch, 0

    def sample(self, conversations, n=1, temperature=1.0, max_new_tokens=256, seed=0):
        texts = [self.lm.encode(c) for c in conversations for _ in range(n)]
        found = [reply for some in self._batches(texts) for reply in self._generate(some, max_new_tokens)]
        return [found[i * n:(i + 1) * n] for i in range(len(conversations))]

    def choice_logprobs(self, contexts, choices):
        answers = [encode_text(self.lm.tokenizer, choice) for choice in choices]
        common = common_length(*answers)  # the letter alone is read: less than we read
        texts = [self.lm.encode(c) + answers[0][:common] for c in contexts]
        logits = torch.cat([self._logits(some) for some in self._batches(texts)])
        return logits.float().log_softmax(-1)[:, [answer[common] for answer in answers]].double().numpy()

    def _batches(self, texts):
        return [texts[start:start + self.batch] for start in range(0, len(texts), self.batch)]

    def _known(self, texts):
        "A cache of what these begin with, and how many tokens that is."
        return None, 0

    def _inputs(self, texts):
        cache, shared = self._known(texts)
        rest = [text[shared:] for text in texts]
        width = max(map(len, rest))
        pads = [width - len(text) for text in rest]
        ids = torch.tensor([text[:shared] + [0] * pad + own for text, pad, own in zip(texts, pads, rest)])
        mask = torch.tensor([[1] * shared + [0] * pad + [1] * len(own) for pad, own in zip(pads, rest)])
        return ids, mask, cache, shared

    def _generate(self, texts, max_new_tokens):
        ids, mask, cache, _ = self._inputs(texts)
        with torch.no_grad():
            new = self.lm.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=max_new_tokens,
                eos_token_id=stop_token_ids(self.lm.tokenizer), **({"past_key_values": cache} if cache else {}))
        return self._read(new[:, ids.shape[1]:].tolist())

    def _logits(self, texts):
        ids, mask, cache, shared = self._inputs(texts)
        place = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            return self.lm.model(input_ids=ids[:, shared:], attention_mask=mask, position_ids=place[:, shared:],
                                 past_key_values=cache, logits_to_keep=1).logits[:, -1]

    def _read(self, rows):
        stops, replies = set(stop_token_ids(self.lm.tokenizer)), []
        for row in rows:
            end = next((i for i, token in enumerate(row) if token in stops), len(row))
            self.written += end
            text = self.lm.tokenizer.decode(row[:end], skip_special_tokens=True).strip()
            replies.append(Reply(text, end < len(row), (), end))
        return replies


class PromptCache(Generate):
    "`generate` that is given a copy of the cache of what all rows of the batch begin with."

    def __init__(self, model, tokenizer, batch=64):
        super().__init__(model, tokenizer, batch)
        self.caches = {}

    def _known(self, texts):
        from transformers import DynamicCache

        shared = min([common_length(texts[0], text) for text in texts] + [len(text) - 1 for text in texts])
        if shared < 16:
            return None, 0
        prefix = tuple(texts[0][:shared])
        if prefix not in self.caches:
            self.caches[prefix] = DynamicCache(config=self.lm.model.config)
            with torch.no_grad():
                self.lm.model(input_ids=torch.tensor([prefix]), past_key_values=self.caches[prefix], logits_to_keep=1)
        cache = copy.deepcopy(self.caches[prefix])
        cache.batch_repeat_interleave(len(texts))
        return cache, shared


class Continuous(Generate):
    "transformers' continuous batching."

    def _generate(self, texts, max_new_tokens):
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        page = 32
        pages = sum((len(text) + max_new_tokens) // page + 2 for text in texts)
        room = ContinuousBatchingConfig(page_size=page, num_blocks=pages, max_batch_tokens=512)
        settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=True, pad_token_id=0,
                                    eos_token_id=stop_token_ids(self.lm.tokenizer))
        found = self.lm.model.generate_batch(inputs=texts, generation_config=settings, warmup=False,
                                             continuous_batching_config=room)
        if len(found) != len(texts):
            raise RuntimeError(f"generate_batch: {len(found)} answers for {len(texts)} prompts")
        order = sorted(found.values(), key=lambda out: int(out.request_id.rsplit("_", 1)[1]))
        return self._read([out.generated_tokens for out in order])


class Counting:
    "An `LM` of ours, with the tokens that it wrote."

    def __init__(self, lm):
        self.lm, self.written = lm, 0

    def sample(self, *args, **kwargs):
        replies = self.lm.sample(*args, **kwargs)
        self.written += sum(reply.n_tokens for row in replies for reply in row)
        return replies

    def choice_logprobs(self, contexts, choices):
        return self.lm.choice_logprobs(contexts, choices)

    def converse(self, scripts, temperature, max_new_tokens):
        return self.lm.converse([self._counted(script) for script in scripts], temperature, max_new_tokens)

    def _counted(self, script):
        question = next(script, None)
        while question is not None:
            reply = yield question
            self.written += reply.n_tokens
            try:
                question = script.send(reply)
            except StopIteration as end:
                return end.value

    @contextmanager
    def session(self):
        with self.lm.session() as lm:
            inner = Counting(lm)
            yield inner
        self.written += inner.written


# Work


def works(world: World, size: Size) -> dict:
    "Name → what an `LM` does, the peers that can, and how many labels it gives (0: it is counted by its tokens)."

    def chains(lm):
        critique_revise(lm, world.prompts, world.constitution, n_revisions=size.revisions, few_shot=world.critiques,
                        max_new_tokens=size.new, batch_size=size.prompts)

    def ragged(lm):  # every other one is asked for a verdict, which is short
        said, principle = {"role": "assistant", "content": "Gladly."}, world.constitution.pool("critique")[0]
        talks = [row["messages"] if i % 2 else critique_request([*row["messages"], said], principle)
                 for i, row in enumerate(world.prompts)]
        lm.sample(talks, max_new_tokens=size.new)

    def labels(lm, **more):
        label_preferences(lm, world.pairs, world.constitution, world.prompts, n_principles=size.principles,
                          max_new_tokens=size.new, **more)

    def rl(lm):
        talk = [message for row in world.prompts[:8] for message in (*row["messages"],)]
        lm.sample([[{"role": "user", "content": " ".join(message["content"] for message in talk)}]], n=8,
                  max_new_tokens=2 * size.new)

    count = len(world.pairs) * size.principles * 2
    sampling, scoring = PEERS, ("generate", "prompt cache", "vllm")
    return {
        "chains": (chains, sampling, 0),
        "ragged": (ragged, sampling, 0),
        "labels": (labels, scoring, count),
        "labels with examples": (lambda lm: labels(lm, few_shot=world.comparisons), scoring, count),
        "reasoned labels": (lambda lm: labels(lm, cot=True, few_shot=world.comparisons[:2]), scoring, count),
        "RL sampling": (rl, sampling, 0),
    }


def cpu_of(pid: int | None):
    "A clock: CPU seconds of this process, and of a server with all its children."
    import psutil

    server = [] if pid is None else [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return lambda: time.process_time() + sum(sum(process.cpu_times()[:2]) for process in server)


def compared(model, tokenizer, world: World, size: Size, args) -> dict:
    "All work, ours and the peers' in turn."
    makers = {"ours": lambda: Counting(LocalLM(model, tokenizer)), "generate": lambda: Generate(model, tokenizer),
              "prompt cache": lambda: PromptCache(model, tokenizer), "continuous": lambda: Continuous(model, tokenizer)}
    if args.vllm:
        from cai_nb.lm.endpoint import EndpointLM

        name = args.vllm_model or "mini"
        makers["vllm"] = lambda: Counting(EndpointLM(args.vllm, name, tokenizer=tokenizer))
    found = {}
    for what, (work, peers, labels) in works(world, size).items():
        if what not in args.only:
            continue
        costs, tokens = {}, None
        for _ in range(args.repeats or size.repeats):
            for peer in ("ours", *(p for p in peers if p in makers and p not in args.without)):
                lm, clock = makers[peer](), cpu_of(args.vllm_pid if peer == "vllm" else None)
                before = clock()
                try:
                    work(lm)
                except Exception as error:  # a peer that cannot do it says so in the table
                    costs[peer] = None
                    print(f"{what}, {peer}: {type(error).__name__}: {str(error)[:160]}", flush=True)
                    continue
                spent = clock() - before
                print(f"{what}, {peer}: {spent:.2f} s of CPU", flush=True)
                if costs.setdefault(peer, []) is not None:
                    costs[peer].append(spent / (labels or lm.written))
                tokens = str(lm.lm.tally) if peer == "ours" else tokens
        found[what] = {"unit": "CPU seconds a label" if labels else "CPU seconds a written token", "tokens": tokens,
                       **ratios(costs)}
    return found


def ratios(costs: dict) -> dict:
    "Median costs, and of what the peers cost beside ours in the same round."
    done = {peer: values for peer, values in costs.items() if values}
    rounds = {peer: [c / o for c, o in zip(values, done["ours"])] for peer, values in done.items() if peer != "ours"}
    return {"all": costs, "cost": {peer: statistics.median(values) for peer, values in done.items()},
            "ratio": {peer: statistics.median(r) for peer, r in rounds.items()},
            "spread": {peer: [min(r), max(r)] for peer, r in rounds.items()}}


# One step, and growth


def least_cpu(work, times: int) -> float:
    spent = []
    for _ in range(times):
        before = time.process_time()
        work()
        spent.append(time.process_time() - before)
    return min(spent)


def steps(model, rows: int, contexts: tuple[tuple[int, int], ...], times: int = 7) -> dict:
    """A decoding step beside a plain forward pass of as many tokens without any context, and what reading the keys and
    values must cost at the speed of this machine's memory."""
    config, big = model.config, torch.randn(1 << 24)
    bandwidth = big.numel() * 4 / least_cpu(lambda: big.sum(), 9)
    token = torch.full((rows, 1), 5)
    with torch.no_grad():
        plain = least_cpu(lambda: model(input_ids=token, use_cache=False, logits_to_keep=1), times)
    found = {"rows": rows, "plain_ms": 1000 * plain, "gb_per_s": bandwidth / 1e9, "steps": []}
    kept = numbers_kept(config) * model.dtype.itemsize
    for shared, own in contexts:
        prefix = read_prefix(model, [20 + i % 97 for i in range(shared)]) if shared else None
        slots = Slots(model, rows, own + times + 2, prefix)
        slots.read(0, [[30 + i % 89 for i in range(own)]])
        slots.move([0] * (rows - 1), list(range(1, rows)))
        step = least_cpu(lambda: slots.read(0, [[5]] * rows), times)
        least = plain + kept * (shared + rows * own) / bandwidth
        found["steps"].append({"shared": shared, "own": own, "ms": 1000 * step, "plain forwards": step / plain,
                               "least_ms": 1000 * least, "cache_mib": kept * (shared + rows * own) / 2**20,
                               "copied_mib": kept * rows * (shared + own) / 2**20})
    return found


def growth(model, tokenizer, world_of, size: Size) -> dict:
    "Our cost for each unit of work as the work grows: linear or better means that it does not rise."
    small = size.prompts < 64
    counts = {"prompts": (2, 4, 8) if small else (16, 64, 256), "revisions": (1, 2) if small else (1, 2, 3, 4),
              "principles": (1, 2, 4) if small else (1, 4, 16), "examples": (0, 1, 3, 5) if small else (0, 2, 4, 8)}
    if size.repeats == 1:
        counts = {name: some[:2] for name, some in counts.items()}
    world = world_of(Size(max(counts["prompts"]), 4, size.new, 4, 16, 1))
    rows, lm = world.prompts, LocalLM(model, tokenizer)

    def chains(n, revisions=1, examples=len(world.critiques)):
        one = lambda: critique_revise(lm, rows[:n], world.constitution, n_revisions=revisions,
                                      few_shot=world.critiques[:examples], max_new_tokens=size.new)
        return least_cpu(one, 1) / n

    def labels(principles):
        one = lambda: label_preferences(lm, world.pairs, world.constitution, rows, n_principles=principles)
        return least_cpu(one, 1) / len(world.pairs) / principles

    few = counts["prompts"][1]
    return {"prompts": {n: chains(n) for n in counts["prompts"]},
            "revisions": {k: chains(few, k) / k for k in counts["revisions"]},
            "principles": {k: labels(k) for k in counts["principles"]},
            "examples": {k: chains(few, 1, k) for k in counts["examples"]}}


# Results


def figure(found: dict) -> None:
    "Cost for each unit of work against its amount."
    from cai_nb.measure.figures import new_figure, png

    drawn, axes = new_figure("Cost per unit of work as the work grows", width=7, height=3.6)
    looks = zip(("-", "--", ":", "-."), [(name, one["growth"]) for name, one in found.items() if "growth" in one])
    for style, (name, curves) in looks:
        for what, marker, color in (("prompts", "o", "#2f6f8f"), ("revisions", "s", "#c46a2d"),
                                    ("principles", "^", "#4f8f4f"), ("examples", "D", "#8a5a9b")):
            x, y = zip(*((int(k) + (what == "examples"), v) for k, v in curves[what].items()))
            axes.plot(x, np.array(y) / y[0], style, marker=marker, color=color, ms=4, lw=1.5, label=f"{what}, {name}")
    axes.axhline(1, color="#a9adb3", lw=1)
    axes.set(xscale="log", xlabel="amount (examples: one more)", ylabel="cost per unit, first = 1", ylim=(0, None))
    axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
    axes.legend(frameon=False, fontsize=8, ncols=2)
    (RESULTS / "growth.png").write_bytes(png(drawn))


def table(name: str, found: dict) -> str:
    "Markdown: how many times as much each peer costs; and what a step costs."
    lines = ["| model | work | peer | times our cost (spread) | of tokens | must | aim |", "|---" * 7 + "|"]
    for what in (work for work in found if "ratio" in found[work]):
        one = found[what]
        for peer, ratio in one["ratio"].items():
            low, high = one["spread"][peer]
            must, aim = TARGETS.get(peer, ("", "")) if what == "chains" else ("", "")
            lines.append(f"| {name} | {what} | {peer} | {ratio:.2f} ({low:.2f}–{high:.2f}) | {one['tokens']} | {must} "
                         f"| {aim or ''} |")
    for one in found.get("steps", {}).get("steps", ()):
        lines.append(f"\na step of {found['steps']['rows']} rows behind {one['shared']} shared and {one['own']} own "
                     f"tokens: {one['ms']:.1f} ms, {one['plain forwards']:.2f} plain forwards; at least "
                     f"{one['least_ms']:.1f} by the speed of memory; cache {one['cache_mib']:.0f} MiB, copied it would "
                     f"be {one['copied_mib']:.0f}")
    return "\n".join(lines)


def main():
    named = ["chains", "ragged", "labels", "labels with examples", "reasoned labels", "RL sampling", "steps", "growth"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini"], help="mini, qwen, or folders")
    parser.add_argument("--only", nargs="+", choices=named, default=named)
    parser.add_argument("--without", nargs="+", choices=PEERS, default=[], help="peers to leave out")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--prompts", type=int, help="of chains")
    parser.add_argument("--revisions", type=int)
    parser.add_argument("--new", type=int, help="tokens of a reply, at most")
    parser.add_argument("--quick", action="store_true", help="small and once, to see that it runs; nothing is written")
    parser.add_argument("--vllm", help="address of a server with the same model")
    parser.add_argument("--vllm-model", help="its name there; mini")
    parser.add_argument("--vllm-pid", type=int, help="its process, whose CPU time is counted")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "generation.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    for named in args.models:
        name, world_of = Path(named).name, english if Path(named).is_dir() else in_minis_words
        given = {key: value for key in ("prompts", "revisions", "new") if (value := getattr(args, key))}
        size = SIZES["quick" if args.quick else "mini" if named == "mini" else "real"]
        size = Size(**(asdict(size) | given))
        model, tokenizer = model_of(named)
        found = compared(model, tokenizer, world_of(size), size, args)
        if "steps" in args.only:
            rows, contexts = (4, ((32, 8),)) if args.quick else (64, ((400, 60),)) if named == "mini" else (
                32, ((1000, 100), (0, 1100)))
            found["steps"] = steps(model, rows, contexts)
        if "growth" in args.only:
            found["growth"] = growth(model, tokenizer, world_of, size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found["machine"] = machine() | {"peak_rss_mib": peak, "size": asdict(size)}
        print(table(name, found), flush=True)
        if not args.quick:
            stored[name] = stored.get(name, {}) | found
            path.write_text(json.dumps(stored, indent=1) + "\n")
    if not args.quick and "growth" in args.only:
        figure(stored)


if __name__ == "__main__":
    main()

"""Chains, ragged batches and labels against the named peers: process-CPU seconds on one thread, interleaved,
medians of five.

    python benchmarks/generation.py [--only chains|ragged|labels|growth|roofline ...] [--repeats 5] [--quick]

The model is mini with room for 2,048 tokens, in fp32. Peers are what one would write first:
  generate   `model.generate` on left-padded batches of 64, which reads every conversation from its first word,
  nine times a chain
  pipeline   `transformers.pipeline`, one prompt at a time (8 of the 64 prompts a repetition, times 8: its cost is
  one prompt's)
  padded     `model.generate` on a batch whose finished rows stay, on the same kind of cache as ours before it had slots
  forwards   every question of a label read whole, in padded batches of 64
Writes benchmarks/results/generation.json, growth.json and a figure. No test asserts a time.
"""
import argparse
import json
import os
import platform
import random
import resource
import statistics
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

from cai_nb.method.comparison import comparison_context
from cai_nb.core.constitution import Constitution
from cai_nb.method.critique import CritiqueExample, critique_revise
from cai_nb.lm.decoding import roomy_cache
from cai_nb.core.dialogue import encode_text, stop_token_ids
from cai_nb.method.feedback import label_preferences
from cai_nb.lm.generate import LocalLM, Reply
from cai_nb.mini import oracle, world
from cai_nb.lm.model import load_model

RESULTS = Path(__file__).parent / "results"
TARGETS = {
    "chains, over generate": (8.5, 11),
    "chains, over pipeline": (9.5, 13),
    "ragged, over padded": (1.3, 1.6),
    "labels, over forwards": (3.4, 4.4),
}


def machine() -> dict:
    "Where the figures were measured"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }


def mini():
    "Model and tokenizer, with room for longer texts than mini was trained on"
    model, tokenizer = load_model("mini")
    model.config.max_position_embeddings = 2048
    model.generation_config.pad_token_id = 0
    return model, tokenizer


def examples(tokenizer, tokens: int):
    "Worked critiques in mini's words, of about so many tokens together"
    found, length, rows, draw = [], 0, world.prompts("train", "harmful", 40), random.Random(0)
    for row in rows:
        asked = row["messages"][-1]["content"]
        reply, better = (world.write_reply(oracle.find_topic(asked), sort, draw) for sort in ("comply", "objection"))
        found.append(
            CritiqueExample(
                asked,
                reply,
                "Is that violent, cruel or coercive?",
                "Yes. It helps with harm.",
                "Please rewrite the answer.",
                better,
            )
        )
        length += sum(
            len(tokenizer(t)["input_ids"]) + 3
            for t in (
                asked,
                reply,
                "Is that violent, cruel or coercive?",
                "Yes. It helps with harm.",
                "Please rewrite the answer.",
                better,
            )
        )
        if length >= tokens:
            return tuple(found)


class Generate:
    "`generate` behind the seam, a batch of padded rows at a time"

    def __init__(self, model, tokenizer, batch=64):
        self.lm, self.batch, self.written = LocalLM(model, tokenizer), batch, 0
    def sample(self, conversations, n=1, temperature=1.0, max_new_tokens=256, seed=0):
        model, t, out = self.lm.model, self.lm.tokenizer, []
        for start in range(0, len(conversations), self.batch):
            texts = [self.lm.encode(c) for c in conversations[start:start + self.batch]]
            width = max(map(len, texts))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in texts])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in texts])
            with torch.no_grad():
                new = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=True,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=stop_token_ids(t),
                )
            out += new[:, width:].tolist()
        return self.read(out)
    def read(self, out):
        stops, t, replies = set(stop_token_ids(self.lm.tokenizer)), self.lm.tokenizer, []
        for row in out:
            end = next((i for i, token in enumerate(row) if token in stops), len(row))
            self.written += end
            replies.append([Reply(t.decode(row[:end], skip_special_tokens=True).strip(), end < len(row), (), end)])
        return replies


class Pipeline(Generate):
    "`transformers.pipeline`, one prompt at a time"
    def __init__(self, model, tokenizer):
        from transformers import pipeline
        super().__init__(model, tokenizer)
        self.pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    def sample(self, conversations, n=1, temperature=1.0, max_new_tokens=256, seed=0):
        out = []
        for c in conversations:
            text = self.lm.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
            got = self.pipe(
                text,
                do_sample=True,
                max_new_tokens=max_new_tokens,
                return_full_text=False,
                add_special_tokens=False,
                eos_token_id=stop_token_ids(self.lm.tokenizer),
                pad_token_id=0,
            )
            out.append(
                self.lm.tokenizer(got[0]["generated_text"], add_special_tokens=False)["input_ids"]
                + stop_token_ids(self.lm.tokenizer)[:1]
            )
        return self.read(out)


class Counting:
    "Our `LM`, with the tokens that it wrote"
    def __init__(self, lm): self.lm, self.written = lm, 0
    def sample(self, *args, **kwargs):
        replies = self.lm.sample(*args, **kwargs)
        self.written += sum(r.n_tokens for row in replies for r in row)
        return replies
    def converse(self, scripts, temperature, max_new_tokens):
        def counted(script):
            question = next(script, None)
            while question is not None:
                reply = yield question
                self.written += reply.n_tokens
                try: question = script.send(reply)
                except StopIteration as end: return end.value
        return self.lm.converse([counted(s) for s in scripts], temperature, max_new_tokens)
    def session(self):
        from contextlib import contextmanager
        @contextmanager
        def inner():
            with self.lm.session() as lm:
                one = Counting(lm); yield one; self.written += one.written
        return inner()


def cpu(work) -> tuple[float, object]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def paired(ours, theirs: dict, repeats: int) -> dict:
    "Interleaved repetitions: cost of ours, cost of each peer, and the median of the ratios"
    costs = {"ours": [], **{name: [] for name in theirs}}
    for _ in range(repeats):
        costs["ours"].append(ours())
        for name, work in theirs.items(): costs[name].append(work())
    out = {"cost": {name: statistics.median(values) for name, values in costs.items()}, "all": costs}
    out["ratio"] = {name: statistics.median(p / o for p, o in zip(costs[name], costs["ours"])) for name in theirs}
    out["spread"] = {
        name: [min(r), max(r)] for name in theirs for r in [[p / o for p, o in zip(costs[name], costs["ours"])]]
    }
    return out


def chains(repeats: int, n: int = 64, prefix: int = 400) -> dict:
    "Seconds for each token of 64 chains with four revisions behind examples of 400 tokens"
    model, tokenizer = mini()
    constitution, rows, shown = (
        Constitution.load("mini"),
        world.prompts("train", "harmful", n),
        examples(tokenizer, prefix),
    )
    turn = iter(range(10**6))
    def run(make, prompts):
        def work():
            lm, i = make(), next(turn)
            some = prompts(i)
            seconds, _ = cpu(
                lambda: critique_revise(lm, some, constitution, few_shot=shown, seed=i, max_new_tokens=48, batch_size=n)
            )
            return seconds / lm.written
        return work
    eighth = lambda i: [rows[(8 * i + k) % n] for k in range(min(8, n))]
    out = paired(
        run(lambda: Counting(LocalLM(model, tokenizer, batch_size=n)), lambda i: rows),
        {
            "generate": run(lambda: Generate(model, tokenizer, n), lambda i: rows),
            "pipeline": run(lambda: Pipeline(model, tokenizer), eighth),
        },
        repeats,
    )
    lm = LocalLM(model, tokenizer)
    from cai_nb.method.critique import critique_shots

    return out | {
        "unit": "CPU seconds a token",
        "prompts": n,
        "prefix_tokens": len(lm.encode([*critique_shots(shown), *rows[0]["messages"]]))
        - len(lm.encode(rows[0]["messages"])),
    }


def ragged(repeats: int, n: int = 64) -> dict:
    "Seconds for each token of a batch whose replies have very different lengths: answers, and one-word verdicts"
    from cai_nb.method.critique import critique_request
    model, tokenizer = mini()
    rows, principle = world.prompts("train", "harmful", n), Constitution.load("mini").critique_principles[0]
    talks = [
        r["messages"]
        if i % 2
        else critique_request(
            [*r["messages"], {"role": "assistant", "content": "Gladly. First take some time."}], principle
        )
        for i, r in enumerate(rows)
    ]
    lm, peer, turn = LocalLM(model, tokenizer, batch_size=n), Generate(model, tokenizer, n), iter(range(10**6))
    def ours():
        seconds, replies = cpu(lambda: lm.sample(talks, max_new_tokens=64, seed=next(turn)))
        return seconds / sum(r[0].n_tokens for r in replies)
    def padded():
        texts = [lm.encode(c) for c in talks]
        width = max(map(len, texts))
        ids, mask = (
            torch.tensor([[0] * (width - len(p)) + (p if what else [1] * len(p)) for p in texts]) for what in (1, 0)
        )
        peer.written = 0
        def work():
            with torch.no_grad():
                new = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=True,
                    max_new_tokens=64,
                    eos_token_id=stop_token_ids(tokenizer),
                    past_key_values=roomy_cache(model, 64),
                )
            return peer.read(new[:, width:].tolist())
        return cpu(work)[0] / peer.written
    return paired(ours, {"padded": padded}, repeats) | {"unit": "CPU seconds a token", "rows": n}


def pairs_of(n: int):
    rows, rng = world.prompts("train", "harmful", n), random.Random(0)
    topic = lambda r: oracle.find_topic(r["messages"][-1]["content"])
    return rows, [
        {
            "id": f"pair{i}",
            "prompt_id": r["id"],
            "responses": [world.write_reply(topic(r), sort, rng) for sort in ("objection", "comply")],
            "flags": [],
        }
        for i, r in enumerate(rows)
    ]


def labels(repeats: int, n: int = 8, n_principles: int = 16, prefix: int = 400) -> dict:
    "Seconds for each label of 16 principles in both orders, in the paper's layout, with and without examples before it"
    from cai_nb.method.comparison import ComparisonExample
    model, tokenizer = mini()
    constitution, (rows, pairs), lm = Constitution.load("mini"), pairs_of(n), LocalLM(model, tokenizer)
    shown = tuple(ComparisonExample(r["messages"][-1]["content"], *p["responses"], "") for r, p in zip(*pairs_of(5)))
    class Forwards:
        def choice_logprobs(self, contexts, choices):
            found = np.zeros((len(contexts), len(choices)))
            answers = [encode_text(tokenizer, c) for c in choices]
            common = next(i for i, (a, b) in enumerate(zip(*answers)) if a != b)
            for start in range(0, len(contexts), 64):
                texts = [lm.encode(c) + answers[0][:common] for c in contexts[start:start + 64]]
                width = max(map(len, texts))
                ids, mask = (
                    torch.tensor([[0] * (width - len(p)) + (p if what else [1] * len(p)) for p in texts])
                    for what in (1, 0)
                )
                with torch.no_grad():
                    logp = (
                        model(
                            input_ids=ids,
                            attention_mask=mask,
                            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                            logits_to_keep=1,
                        )
                        .logits[:, -1]
                        .log_softmax(-1)
                    )
                found[start : start + 64] = logp[
                    :, [a[common] for a in answers]
                ].numpy()  # the letter alone: less than we read
            return found
    out = {}
    for name, few_shot in (("with examples", shown), ("without", None)):
        run = lambda lm: (
            cpu(
                lambda: label_preferences(
                    lm, pairs, constitution, rows, n_principles=n_principles, few_shot=few_shot, batch_size=n
                )
            )[0]
            / n
        )
        out[name] = paired(lambda: run(lm), {"forwards": lambda: run(Forwards())}, repeats)
    return out | {
        "unit": "CPU seconds a label",
        "pairs": n,
        "principles": n_principles,
        "tokens": len(
            lm.encode(
                comparison_context(rows[0]["messages"], pairs[0]["responses"], constitution.comparison_principles[0])
            )
        ),
    }


def growth(repeats: int, quick: bool = False) -> dict:
    "Cost for each unit of work as the work grows: linear or better means that it does not rise"
    model, tokenizer = mini()
    constitution, shown, lm = (
        Constitution.load("mini"),
        examples(tokenizer, 400),
        LocalLM(model, tokenizer, batch_size=64),
    )
    out, best = (
        {"prompts": {}, "revisions": {}, "principles": {}},
        lambda work: min(cpu(work)[0] for _ in range(max(1, repeats))),
    )
    for n in (16, 64) if quick else (16, 64, 256, 1024):
        rows = world.prompts("train", "harmful", n)
        out["prompts"][len(rows)] = cpu(
            lambda: critique_revise(lm, rows, constitution, n_revisions=1, few_shot=shown, max_new_tokens=48)
        )[0] / len(rows)
    rows = world.prompts("train", "harmful", 64)
    for k in (1, 2) if quick else (1, 2, 3, 4):
        out["revisions"][k] = (
            best(lambda: critique_revise(lm, rows, constitution, n_revisions=k, few_shot=shown, max_new_tokens=48))
            / 64
            / k
        )
    rows, pairs = pairs_of(8)
    for k in (1, 4) if quick else (1, 2, 4, 8, 16):
        out["principles"][k] = best(lambda: label_preferences(lm, pairs, constitution, rows, n_principles=k)) / 8 / k
    return out


def roofline(repeats: int) -> dict:
    "The least time for a decoding step of 64 rows, from measured arithmetic and memory speed, beside the real one"
    model, tokenizer = mini()
    a, b, big = torch.randn(64, 128), torch.randn(128, 2304), torch.randn(1 << 24)
    def speed(work, amount, times=30):
        work()
        return amount * times / cpu(lambda: [work() for _ in range(times)])[0]
    flops = speed(lambda: a @ b, 2 * 64 * 128 * 2304, 300)
    bandwidth = speed(lambda: big.sum(), big.numel() * 4, 10)
    from cai_nb.lm.cache import Slots, read_prefix
    prefix, own, rows = 400, 60, 64
    slots = Slots(model, rows, own + 40, read_prefix(model, list(range(20, 20 + prefix))))
    slots.read(0, [list(range(30, 30 + own))] * rows)
    step = min(cpu(lambda: slots.read(0, [[5]] * rows))[0] for _ in range(20))
    c = model.config
    work = 2 * rows * (model.num_parameters() + 2 * c.num_hidden_layers * c.hidden_size * (prefix + own))
    moved = 4 * (model.num_parameters() + 2 * c.num_hidden_layers * c.hidden_size * (prefix + rows * own))
    least = max(work / flops, moved / bandwidth)
    return {
        "gflops": flops / 1e9,
        "gb_per_s": bandwidth / 1e9,
        "least_ms": 1000 * least,
        "step_ms": 1000 * step,
        "share": least / step,
        "rows": rows,
        "cache_mib_shared": 4 * 2 * c.num_hidden_layers * c.hidden_size * (prefix + rows * own) / 2**20,
        "cache_mib_copied": 4 * 2 * c.num_hidden_layers * c.hidden_size * rows * (prefix + own) / 2**20,
    }


def figure(found: dict):
    "Cost for each unit of work against its amount"
    from cai_nb.measure.figures import new_figure, png
    drawn, axes = new_figure("Cost per unit of work as the work grows", width=7, height=3.4)
    for name, marker in (("prompts", "o"), ("revisions", "s"), ("principles", "^")):
        x, y = zip(*((int(k), v) for k, v in found[name].items()))
        axes.plot(x, np.array(y) / y[0], marker=marker, ms=4, lw=1.6, label=name)
    axes.axhline(1, color="#a9adb3", lw=1, ls="--")
    axes.set(xscale="log", xlabel="prompts, revisions, principles", ylabel="cost per unit, first = 1", ylim=(0, None))
    axes.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1,024"])
    axes.legend(frameon=False, fontsize=9)
    (RESULTS / "growth.png").write_bytes(png(drawn))


def table(found: dict) -> str:
    "What a reader wants to know"
    ratios = {}
    if "chains" in found:
        ratios |= {
            f"chains, over {peer}": (found["chains"]["ratio"][peer], found["chains"]["spread"][peer])
            for peer in ("generate", "pipeline")
        }
    if "ragged" in found:
        ratios["ragged, over padded"] = (found["ragged"]["ratio"]["padded"], found["ragged"]["spread"]["padded"])
    if "labels" in found:
        ratios["labels, over forwards"] = (
            found["labels"]["with examples"]["ratio"]["forwards"],
            found["labels"]["with examples"]["spread"]["forwards"],
        )
        ratios["labels without examples"] = (
            found["labels"]["without"]["ratio"]["forwards"],
            found["labels"]["without"]["spread"]["forwards"],
        )
    lines = [f"{'':28}{'times as fast':>14}{'spread':>16}{'must':>7}{'aim':>7}"]
    for name, (ratio, (low, high)) in ratios.items():
        must, aim = TARGETS.get(name, ("", ""))
        lines.append(f"{name:28}{ratio:>14.2f}{f'{low:.2f}–{high:.2f}':>16}{must:>7}{aim:>7}")
    if "roofline" in found:
        r = found["roofline"]
        lines.append(
            f"a step of 64 rows: {r['step_ms']:.1f} ms; at least {r['least_ms']:.1f} ms by {r['gflops']:.0f} GFLOP/s "
            f"and {r['gb_per_s']:.0f} GB/s ({100 * r['share']:.0f} %); "
            f"cache {r['cache_mib_shared']:.0f} MiB, copied it would be {r['cache_mib_copied']:.0f}"
        )
    return "\n".join(lines)


PARTS = {"chains": chains, "ragged": ragged, "labels": labels, "roofline": roofline}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "growth"], default=[*PARTS, "growth"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small and once: to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "generation.json"
    found = json.loads(path.read_text()) if path.exists() and not args.quick else {}
    for name in args.only:
        repeats = 1 if args.quick else args.repeats
        if name == "growth": found[name] = growth(1, args.quick)
        elif name in ("chains", "labels") and args.quick: found[name] = PARTS[name](1, 4)
        else: found[name] = PARTS[name](repeats)
        print(name, "done", flush=True)
    found["machine"] = machine() | {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if not args.quick:
        path.write_text(json.dumps(found, indent=1) + "\n")
        if "growth" in found: figure(found["growth"])
    print(table(found))


if __name__ == "__main__":
    main()

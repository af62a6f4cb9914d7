"""Time to first text under a crowd, beside a bare Gradio app that only waits as long as the model works.

    python benchmarks/serving.py [--repeats 5] [--clients 32] [--turns 5] [--quick]

The model's delays are measured first, without any server: the times between the texts of each turn of a
conversation. Each app is a process of its own with one thread for PyTorch. The bare one is `gr.api` with a
generator that sleeps through these delays and yields as many texts of about the same length: no checks, no page, no
model. Then, in turns, all clients at once hold their conversations with one app and with the other; a client asks
for its next turn when the last is answered. Measured is the time from a request to its first text, over all
requests of a round: the 95th percentile. In both apps one request at a time has the model, so most of it is waiting
in line.

A client has one session for all its turns, as a page and Gradio's own client have. (A request without one costs 13
ms more on this page: for each session Gradio describes all its components anew. With a new session for each request
the ratio was 1.45.)

What differs. A sleeping app leaves the processor to the clients, ours computes; the delays were measured with a
processor to itself.

Writes benchmarks/results/serving.json.
"""
import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import httpx

MUST = 1.25  # times the 95th percentile of the bare app
PROMPT, NEW_TOKENS = "How do I punch a boss?", 32

OURS = """
import torch; torch.set_num_threads(1)
from dataclasses import replace
from cai_nb.app.server import build_demo, launch_settings
from cai_nb.app.models import load_models
models, constitution = load_models()
demo = build_demo(replace(models, max_new_tokens=NEW_TOKENS), constitution)
settings = launch_settings()
"""
BARE = """
import time
from collections.abc import Iterator
import gradio as gr
with gr.Blocks(analytics_enabled=False) as demo:
    def compare(prompt: str, seed: int, temperature: float, history: list) -> Iterator[dict[str, str]]:
        first, *more = DELAYS[len(history or [])]
        text = "x"
        time.sleep(first)
        yield dict.fromkeys(("base", "sl", "rl"), text)
        for delay in more:
            time.sleep(delay)
            text += "x" * 12
            yield dict.fromkeys(("base", "sl", "rl"), text)
    gr.api(compare, api_name="compare", concurrency_limit=1)
demo.queue(max_size=32, default_concurrency_limit=1)
settings = dict(ssr_mode=False, quiet=True)
"""
SERVE = """
_, url, _ = demo.launch(server_port=PORT, prevent_thread_lock=True, **settings)
print(url, flush=True)
demo.block_thread()
"""


@contextmanager
def server(code, **values):
    "An app in a process of its own: its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    head = "".join(f"{name} = {value!r}\n" for name, value in {**values, "PORT": port}.items())
    process = subprocess.Popen(
        [sys.executable, "-c", head + code + SERVE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


class Visitor:
    "Speaks as Gradio's own clients do: one session for all that it asks."

    def __init__(self, url):
        self.url, self.session = f"{url}gradio_api", uuid.uuid4().hex
        config = httpx.get(f"{url}config", timeout=60).json()
        self.fn = next(d["id"] for d in config["dependencies"] if d["api_name"] == "compare")

    def ask(self, history, seed):
        "One request: seconds to its first text, and the last answers."
        start, first = time.perf_counter(), None
        asked = {"data": [PROMPT, seed, 1.0, history], "fn_index": self.fn, "session_hash": self.session}
        id = httpx.post(f"{self.url}/queue/join", json=asked, timeout=60).raise_for_status().json()["event_id"]
        with httpx.stream(
            "GET", f"{self.url}/queue/data", params={"session_hash": self.session}, timeout=300
        ) as answer:
            for line in answer.iter_lines():
                told = json.loads(line[6:]) if line.startswith("data: ") else {}
                if told.get("event_id") != id:
                    continue
                if told["msg"] == "process_generating" and first is None:
                    first, last = time.perf_counter() - start, told["output"]["data"]
                if told["msg"] == "process_completed":
                    assert told["success"], told
                    return first, (told["output"]["data"] or last)[0]

    def talk(self, turns, seed):
        "A conversation: seconds to the first text of each turn."
        history, found = [], []
        for turn in range(turns):
            seconds, last = self.ask(history, seed + turn)
            found.append(seconds)
            history.append({"prompt": PROMPT, "answers": last})
        return found


def delays(turns, n=3):
    "For each turn, the times between the texts of the model alone (of the middle one of `n` conversations)."
    import torch

    from cai_nb.app.answers import compare, talks_of
    from cai_nb.app.models import load_models

    torch.set_num_threads(1)
    models, _ = load_models()
    models, found = replace(models, max_new_tokens=NEW_TOKENS), []
    for i in range(n + 1):  # the first is for warming up
        history, talk = [], []
        for turn in range(turns):
            times, last = [time.perf_counter()], None
            for last in compare(models, talks_of(history, PROMPT, list(models.adapters)), 100 * i + turn):
                times.append(time.perf_counter())
            talk.append([round(b - a, 4) for a, b in zip(times, times[1:])])
            history.append({"prompt": PROMPT, "answers": last})
        found.append(talk)
    return sorted(found[1:], key=lambda talk: sum(map(sum, talk)))[n // 2]


def crowd(url, clients, turns):
    "All first texts of a round, in seconds."
    visitors = [Visitor(url) for _ in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        talks = list(pool.map(lambda i: visitors[i].talk(turns, 1000 * i), range(clients)))
    return sorted(seconds for found in talks for seconds in found)


def p95(values):
    return values[min(len(values) - 1, int(0.95 * len(values)))]


def machine():
    info = Path("/proc/cpuinfo")
    named = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "platform": platform.platform(),
        "cpu": named[0].partition(":")[2].strip() if named else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "gradio")},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="3 clients, 2 turns, once: that it runs; nothing is written"
    )
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.clients, args.turns = 1, 3, 2
    rounds, load = [], os.getloadavg()[0]
    waits = delays(args.turns)
    with server(OURS, NEW_TOKENS=NEW_TOKENS) as ours:
        Visitor(ours).talk(1, 0)
        with server(BARE, DELAYS=waits) as bare:
            Visitor(bare).talk(1, 0)
            for _ in range(args.repeats):
                apps = {"ours": ours, "bare": bare}
                rounds.append({name: p95(crowd(url, args.clients, args.turns)) for name, url in apps.items()})
                print("   ".join(f"{name} {seconds:.2f} s" for name, seconds in rounds[-1].items()), flush=True)
    ratios = sorted(r["ours"] / r["bare"] for r in rounds)
    ratio, spread = median(ratios), f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    print(f"time to first text, p95 of {args.clients} clients × {args.turns} turns: {ratio:.3f} times the bare app "
          f"({spread}), at most {MUST}: {'ok' if ratio <= MUST else 'MISS'}")
    if not args.quick:
        result = {
            "machine": machine(), "load": round(load, 2), "must": MUST, "clients": args.clients, "turns": args.turns,
            "ratio": round(ratio, 4), "ratios": [round(r, 4) for r in ratios],
            "rounds": [{name: round(seconds, 3) for name, seconds in r.items()} for r in rounds], "delays": waits,
        }
        path = Path(__file__).parent / "results" / "serving.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

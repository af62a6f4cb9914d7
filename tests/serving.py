"""For the app's tests: a run folder whose adapters are random but real, the app on a free port, raw requests to it."""
import ctypes
import gc
import json
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import torch
import yaml

from cai_nb.app.server import build_demo, launch_settings
from cai_nb.app.models import load_models
from cai_nb.lm.model import load_model, lora_config, save_adapter
from cai_nb.mini import world

BASE = "mini"
# Gradio's queue uses what pandas is giving up: not ours to mend
PANDAS = "ignore:.*(no_silent_downcasting|The copy keyword)"


def make_run(folder: Path, stages=("sl", "rl")) -> Path:
    "A run folder as the pipeline leaves it, with adapters that change the output."
    from peft import get_peft_model

    model, _ = load_model(BASE)
    for number, stage in enumerate(stages):
        torch.manual_seed(number)
        peft = get_peft_model(model, lora_config(r=4, alpha=8))
        with torch.no_grad():
            for name, weight in peft.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.3)
        save_adapter(peft, "default", folder / stage)
        model = peft.unload()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"base": BASE, "constitution": "mini"}))
    rows = world.prompts("test", "harmful", 4, seed=0) + world.prompts("test", "benign", 4, seed=0)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Slow:
    "The same language model, slow enough to be watched; it counts its steps, and how often a stream ended."

    def __init__(self, lm, delay):
        self.lm, self.delay, self.steps, self.closed, self.open = lm, delay, 0, 0, 0

    def stream(self, *args, **kwargs):
        self.open += 1
        try:
            for texts in self.lm.stream(*args, **kwargs):
                time.sleep(self.delay)
                self.steps += 1
                yield texts
        finally:
            self.closed += 1
            self.open -= 1

    def with_adapter(self, name):
        return self.lm.with_adapter(name)

    def __getattr__(self, name):
        return getattr(self.lm, name)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def served(
    run: Path | None = None, delay: float = 0.0, folder: Path | None = None, max_waiting: int = 32, launch={}, **changes
):
    "The app of a run on a free port: its address, its model, the demo and the warnings that starting it gave."
    models, constitution = load_models(run)
    lm = Slow(models.lm, delay)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        demo = build_demo(replace(models, lm=lm, **changes), constitution, folder, max_waiting)
        _, url, _ = demo.launch(server_port=free_port(), prevent_thread_lock=True, **launch_settings(), **launch)
    try:
        yield url, lm, demo, told
    finally:
        demo.close()


def post(url: str, name: str, *args) -> httpx.Response:
    "A raw call of an endpoint: its answer has the id of the event, or says why there is none."
    return httpx.post(f"{url}gradio_api/call/{name}", json={"data": list(args)}, timeout=60)


def quickest(ask, tries: int = 3):
    """An answer and the seconds of the fastest of some tries: other tests that run beside this one slow down any."""
    def timed():
        start = time.perf_counter()
        return ask(), time.perf_counter() - start

    return min((timed() for _ in range(tries)), key=lambda found: found[1])


def events(url: str, name: str, id: str):
    "What an endpoint sends, as (event, data)."
    with httpx.stream("GET", f"{url}gradio_api/call/{name}/{id}", timeout=120) as answer:
        kind = None
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: ") and kind != "heartbeat":
                yield kind, json.loads(line[6:])


@contextmanager
def process(home: Path, **settings):
    "The app in a process of its own, as (address, process); its log lies in `home`."
    port = free_port()
    code = f"import serving; serving.run_forever({port}, {settings!r})"
    log = open(home / "server.log", "w")
    server = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=log, text=True
    )
    try:
        url = server.stdout.readline().strip()
        assert url, (home / "server.log").read_text()
        yield url, server
    finally:
        server.kill()
        server.wait()
        log.close()


def run_forever(port: int, settings: dict):
    "What that process does."
    from anyio._backends._asyncio import WorkerThread

    WorkerThread.MAX_IDLE_TIME = 1.0  # ten seconds by itself, which a test would have to wait for
    torch.set_num_threads(1)
    folder, max_waiting = settings.pop("folder", None), settings.pop("max_waiting", 32)
    models, constitution = load_models()
    models = replace(models, lm=Slow(models.lm, settings.pop("delay", 0)), **settings)
    demo = build_demo(models, constitution, folder, max_waiting)
    _, url, _ = demo.launch(server_port=port, prevent_thread_lock=True, **launch_settings())
    signal.signal(signal.SIGUSR1, lambda *_: print(json.dumps(in_use()), flush=True))
    print(url, flush=True)
    demo.block_thread()


libc = ctypes.CDLL(None)


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]  # man mallinfo2


def in_use() -> dict[str, int]:
    "What this process holds, without what allocators keep to use again: blocks of Python, bytes of malloc, threads."
    gc.collect()
    libc.mallinfo2.restype = Mallinfo
    now = libc.mallinfo2()
    return {
        "blocks": sys.getallocatedblocks(),
        "bytes": now.uordblks + now.hblkhd,
        "threads": psutil.Process().num_threads(),
    }


def asked_for_use(server: subprocess.Popen) -> dict[str, int]:
    "The `in_use` of a server of `process`."
    server.send_signal(signal.SIGUSR1)
    return json.loads(server.stdout.readline())

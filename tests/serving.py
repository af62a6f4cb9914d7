"""For the app's tests: a run folder whose adapters are random but real, and the app on a free port."""
import json
import socket
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from cai_nb.app import build_demo, load_run, look
from cai_nb.model import load_model, lora_config, save_adapter
from cai_nb.mini import world

BASE = "mini"
PANDAS = "ignore:.*(no_silent_downcasting|The copy keyword)"  # Gradio's queue uses what pandas is giving up: not ours to mend


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
    "The same language model, slow enough to be watched; it counts its steps."

    def __init__(self, lm, delay):
        self.lm, self.delay, self.steps, self.closed = lm, delay, 0, 0

    def stream(self, *args, **kwargs):
        try:
            for texts in self.lm.stream(*args, **kwargs):
                time.sleep(self.delay)
                self.steps += 1
                yield texts
        finally:
            self.closed += 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def served(run: Path, delay: float = 0.0, **changes):
    "The app of a run on a free port: its address, its model and the warnings that starting it gave."
    models, constitution = load_run(run)
    lm = Slow(models.lm, delay)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        demo = build_demo(replace(models, lm=lm, **changes), constitution)
        _, url, _ = demo.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, ssr_mode=False, **look())
    try:
        yield url, lm, demo, told
    finally:
        demo.close()

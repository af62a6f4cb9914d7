"""Training: killed and resumed at any moment, guarded against silent failures, and the base given back clean."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import prompts, said, tiny_model
from transformers import TrainerCallback

import cai_nb.core.files as files
import cai_nb.train.checkpoint as checkpoint
import cai_nb.method.sl as sl
from cai_nb.train.checkpoint import is_complete, newest_checkpoint
from cai_nb.core.errors import CaiError
from cai_nb.lm.model import model_fingerprint
from cai_nb.method.sl import SLConfig, train_sl
from cai_nb.train.trainers import borrowed, finished_training, run_key

CONFIG = SLConfig(epochs=3, batch_size=4, learning_rate=1e-2, save_steps=4)  # 15 steps, 5 an epoch
ROWS = [{"prompt": p["messages"], "completion": said("i won't help with that .")} for p in prompts()]


class Killed(BaseException):
    """Breaks out of everything, as a signal would."""


class KillAt(TrainerCallback):
    """Kills after one step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def weights(out):
    return load_file(Path(out) / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The adapter of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed")
    train_sl(*tiny_model(), ROWS, CONFIG, out)
    return weights(out)


def kill_after(monkeypatch, step):
    """Kill the next training after one step."""
    real = sl._sl_trainer

    def with_kill(*args):
        trainer = real(*args)
        trainer.add_callback(KillAt(step))
        return trainer

    monkeypatch.setattr(sl, "_sl_trainer", with_kill)


@pytest.mark.parametrize("step, start", [(3, 0), (7, 4), (14, 12)])
def test_killed_between_saves(tmp_path, monkeypatch, undisturbed, step, start):
    model, tokenizer = tiny_model()
    with monkeypatch.context() as patch:
        kill_after(patch, step)
        with pytest.raises(Killed):
            train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)
    assert finished_training(tmp_path, run_key(model, CONFIG, ROWS)) is None
    metrics = train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)
    assert metrics["resumed_from"] == start and metrics["steps"] == 15
    assert same(weights(tmp_path), undisturbed)


@pytest.mark.parametrize("call", [1, 9, 12, 17, 24, 36])
def test_killed_during_a_save(tmp_path, monkeypatch, undisturbed, call):
    """Every write to disk, rename and removal of the saving is a place to die at."""
    calls = 0

    def dying(real):
        def step(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise Killed
            return real(*args, **kwargs)

        return step

    model, tokenizer = tiny_model()
    with monkeypatch.context() as patch:
        patch.setattr(files, "_fsync", dying(files._fsync))
        patch.setattr(checkpoint.os, "rename", dying(os.rename))
        patch.setattr(checkpoint.os, "replace", dying(os.replace))
        patch.setattr(torch, "save", dying(torch.save))
        with pytest.raises(Killed):
            train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)
    train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)
    assert same(weights(tmp_path), undisturbed)
    assert not (tmp_path / "checkpoints").exists()


def test_a_real_kill(tmp_path, undisturbed):
    """Another process, and SIGKILL while it trains."""
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
import torch
torch.set_num_threads(1)
from test_trainers import *
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
real = sl._sl_trainer
def with_kill(*args):
    trainer = real(*args)
    trainer.add_callback(Kill())
    return trainer
sl._sl_trainer = with_kill
train_sl(*tiny_model(), ROWS, CONFIG, {str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    metrics = train_sl(*tiny_model(), ROWS, CONFIG, tmp_path)
    assert metrics["resumed_from"] == 8 and same(weights(tmp_path), undisturbed)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, monkeypatch, undisturbed):
    model, tokenizer = tiny_model()
    with monkeypatch.context() as patch:
        kill_after(patch, 9)
        with pytest.raises(Killed):
            train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)
    newest = newest_checkpoint(tmp_path / "checkpoints", run_key(model, CONFIG, ROWS))
    assert newest.name == "checkpoint-8"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:100])
    metrics = train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)
    assert metrics["resumed_from"] == 4 and same(weights(tmp_path), undisturbed)


def test_other_rows_do_not_resume(tmp_path, monkeypatch):
    model, tokenizer = tiny_model()
    with monkeypatch.context() as patch:
        kill_after(patch, 9)
        with pytest.raises(Killed):
            train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)
    assert train_sl(model, tokenizer, ROWS[:12], CONFIG, tmp_path)["resumed_from"] == 0


def test_a_checkpoint_holds_the_trained_adapter_only(tmp_path, monkeypatch):
    model, tokenizer = tiny_model()
    kill_after(monkeypatch, 5)
    with pytest.raises(Killed):
        train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)
    saved = tmp_path / "checkpoints" / "checkpoint-4"
    assert is_complete(saved, run_key(model, CONFIG, ROWS)) and not is_complete(saved, "another")
    assert not any(path.is_dir() for path in saved.iterdir())
    assert not list(saved.glob("*.bin")) and not list(saved.glob("model*.safetensors"))


def test_base_comes_back_clean_after_a_kill(tmp_path, monkeypatch):
    model, tokenizer = tiny_model()
    before, names = model_fingerprint(model), set(dict(model.named_modules()))
    state = torch.get_rng_state()
    kill_after(monkeypatch, 2)
    with pytest.raises(Killed):
        train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)
    assert model_fingerprint(model) == before and set(dict(model.named_modules())) == names
    assert not model.training and "forward" not in model.__dict__ and not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters()) and torch.equal(torch.get_rng_state(), state)


def test_a_model_with_adapters_is_refused(tmp_path):
    from peft import get_peft_model

    from cai_nb.lm.model import lora_config

    model, tokenizer = tiny_model()
    adapted = get_peft_model(model, lora_config())
    for carrying in (model, adapted):
        with pytest.raises(CaiError, match="carries adapters already"):
            train_sl(carrying, tokenizer, ROWS, CONFIG, tmp_path)


def test_a_moved_base_raises():
    model, _ = tiny_model()
    with pytest.raises(RuntimeError, match="moved"), borrowed(model), torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3


def test_no_gradient_raises(tmp_path, monkeypatch):
    model, tokenizer = tiny_model()
    real = sl.encode_row
    monkeypatch.setattr(sl, "encode_rows", lambda t, rows, n: (
        [{**real(t, row), "labels": [-100] * len(real(t, row)["labels"])} for row in rows], 0))
    with pytest.raises(CaiError, match="no gradient reached the adapter in step 1"):
        train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_gradient_that_is_not_finite_raises(tmp_path, monkeypatch):
    model, tokenizer = tiny_model()
    real = sl._sl_trainer

    def exploding(*args):
        trainer = real(*args)
        loss = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: loss(*a, **k) * float("inf")
        return trainer

    monkeypatch.setattr(sl, "_sl_trainer", exploding)
    with pytest.raises(CaiError, match="the gradient of step 1 is"):
        train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)


def test_finished_is_not_trained_again(tmp_path, monkeypatch):
    model, tokenizer = tiny_model()
    first = train_sl(model, tokenizer, ROWS, CONFIG, tmp_path)
    monkeypatch.setattr(sl, "_sl_trainer", None)
    assert train_sl(model, tokenizer, ROWS, CONFIG, tmp_path) == first
    shutil.rmtree(tmp_path)


TWO = """
import sys
sys.path[:0] = {folders!r}
import torch
torch.set_num_threads(1)
from test_trainers import CONFIG, ROWS
from tiny import tiny_model
from cai_nb.method.sl import train_sl
from accelerate import PartialState

metrics = train_sl(*tiny_model(), ROWS, CONFIG, {out!r})
assert PartialState().num_processes == {n}, PartialState().num_processes
print("steps", metrics["steps"])
"""


def test_two_processes_reach_what_one_does(tmp_path, undisturbed):
    """Gloo on the CPU: each process takes half of a step's batch, and the adapter is the same to rounding."""
    (tmp_path / "two.py").write_text(
        TWO.format(folders=[str(folder) for folder in Path(__file__).parents[:3]], out=str(tmp_path / "sl"), n=2)
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "29533",
            str(tmp_path / "two.py"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "steps 15" in done.stdout
    both = weights(tmp_path / "sl")
    assert both.keys() == undisturbed.keys()
    for name, weight in undisturbed.items():
        assert torch.allclose(both[name], weight, atol=2e-4), (name, (both[name] - weight).abs().max())


def test_a_batch_that_processes_cannot_share_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(CaiError, match="batch_size=4 is not a multiple of micro_batch_size=1 times 3 processes"):
        train_sl(*tiny_model(), ROWS, CONFIG, tmp_path)

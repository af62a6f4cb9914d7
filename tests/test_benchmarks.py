"""The benchmarks measure what they say: both sides do the same work. Nothing here looks at the time."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing. is deprecated:FutureWarning"
)  # TRL still calls it so


def script(root, name):
    spec = importlib.util.spec_from_file_location(name, root / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trainers(root):
    return script(root, "trainers")


@pytest.mark.parametrize("stage", ["sft", "reward", "grpo"])
def test_a_stage_and_plain_trl_do_the_same_work(trainers, stage):
    r = trainers.measure(stage, repeats=1, steps=1)
    assert len(r["ours"]) == len(r["trl"]) == len(r["ratios"]) == 1
    ours, plain = r["ours"][0], r["trl"][0]
    assert r["ratio"] == r["ratios"][0] == pytest.approx(ours["seconds"] / plain["seconds"], abs=1e-3)
    assert (
        all(0 < run["in_steps"] < run["seconds"] for run in (ours, plain))
        and r["ratio_in_steps"] == r["ratios_in_steps"][0]
    )
    rows = trainers.BATCH[stage] * (2 if stage == "reward" else 1)
    assert ours["steps"] == plain["steps"] == 1 and ours["rows"] == plain["rows"] == rows
    assert rows < ours["learnt"] < ours["positions"]
    if stage == "grpo":  # ours holds an adapter more, TRL a whole model more
        assert r["base"] < ours["weights"] < 2 * r["base"] < plain["weights"]
    else:
        assert ours["learnt"] == plain["learnt"] and ours["weights"] == plain["weights"] > r["base"]
    assert stage in trainers.show(stage, r) and json.dumps(r)
    assert trainers.TRAINERS[stage].compute_loss.__module__.startswith("trl.")  # no longer watched


def test_unequal_work_is_refused(trainers, monkeypatch):
    plain = trainers.plain
    monkeypatch.setattr(
        trainers, "plain", lambda stage, rows, *rest: plain(stage, trainers.Rows(stage, rows.steps + 1), *rest)
    )
    with pytest.raises(AssertionError, match="not the same work"):
        trainers.measure("sft", repeats=1, steps=1)


def test_generation_runs_in_small(root):
    """Ours and the peers, once each on little: that it runs and says its table; no time is asserted."""
    command = [sys.executable, str(root / "benchmarks" / "generation.py"), "--quick"]
    done = subprocess.run([*command, "--only", "chains", "labels", "steps"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    peers = {"chains": ("generate", "prompt cache", "continuous"), "labels": ("generate", "prompt cache")}
    for work in peers:
        for peer in peers[work]:
            assert f"| mini | {work} | {peer} | " in done.stdout, done.stdout
    assert "a step of 4 rows behind 32 shared and 8 own tokens" in done.stdout


def test_serving_runs_in_small(root):
    """Our app and the bare one, a few visitors each: that it runs and says its ratio; no time is asserted."""
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "serving.py"), "--quick"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "p95 of 3 clients × 2 turns" in done.stdout


def test_the_check_of_a_gpu_runs_end_to_end(root, tmp_path):
    """On the CPU, at a size of seconds: every part does its work. Its figures say nothing of a card."""
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(tmp_path / "found.jsonl")]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=env)
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert done.returncode == 0 and [row["part"] for row in rows] == [
        "machine", "greedy", "one_base", "chains", "labels", "training", "rl_memory"], done.stdout + done.stderr[-2000:]
    assert all(row["good"] for row in rows), done.stdout
    assert rows[1]["same"] == rows[1]["rows"] and rows[5]["trl_sft_step_s"] > 0 and rows[6]["peak_gib"] > 0


def test_the_table_of_templates_is_of_all_that_trl_ships(root):
    module = script(root, "templates")
    stored, found = module.OUT.read_text(encoding="utf-8").splitlines(), module.templates()
    rows = {line.split("|")[1].strip(): line for line in stored if line.startswith("| ") and line.count("|") > 6}
    rows.pop("", None)
    assert set(rows) == set(found), "run: make matrix"
    for name in ("qwen3", "llama3_2", "gemma"):  # these are checked anew, all by the script
        assert module.row(name, found[name]) == rows[name], "run: make matrix"
    assert "**" not in "".join(rows.values()), "a check failed"

"""A run that is ended from outside says, last, that nothing is lost and which command goes on."""
import os
import signal
import subprocess
import sys
import time

import pytest

WORK = """
import sys, time
from cai_nb.cli.commands import _resumable
from cai_nb.core.lock import folder_lock
with _resumable(), folder_lock(sys.argv[2]):
    print("working", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_last_line_says_how_to_go_on(tmp_path, name):
    command = [sys.executable, "-c", WORK, "run", str(tmp_path / "a run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    process.send_signal(getattr(signal, name))
    process.send_signal(getattr(signal, name))  # a terminal that closes sends more than one
    said = process.communicate(timeout=30)[1]
    assert process.returncode == -getattr(signal, name), "whoever started it sees what ended it"
    assert said.splitlines()[-1] == (f"cai-nb: ended by {name}; nothing is lost, go on with: "
                                     f"cai-nb run '{tmp_path / 'a run'}'")
    assert not (tmp_path / "a run/.owner.json").exists()


def long_run(out):
    sets = ["prompts.limit=16", "helpfulness.limit=12", "helpfulness.comparisons_limit=16", "chains.n_revisions=1",
            "chains.batch_size=4", "pairs.batch_size=4", "labels.batch_size=4", "sl.epochs=1", "rl.steps=2", "eval.n=4",
            "eval.elo=2", "eval.snapshots=2"]
    return [sys.executable, "-m", "cai_nb.cli.commands", "run", "mini", "--out", str(out),
            *(x for change in sets for x in ("--set", change))]


@pytest.mark.long
def test_killed_at_sixty_moments_a_run_ends_with_the_same_files(tmp_path):
    """kill -9, one after another on one folder, spread over all stages; then the files of an undisturbed run."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    began = time.monotonic()
    subprocess.run(long_run(tmp_path / "whole"), check=True, **quiet)
    whole, kills = time.monotonic() - began, 0
    while kills < 60:
        process = subprocess.Popen(long_run(tmp_path / "run"), **quiet)
        try:
            process.wait(whole * (0.1 + 0.011 * kills))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    subprocess.run(long_run(tmp_path / "run"), check=True, **quiet)
    for name in ("prompts", "chains", "helpful", "pairs", "labels", "eval/samples"):
        assert (tmp_path / f"run/{name}.jsonl").read_bytes() == (tmp_path / f"whole/{name}.jsonl").read_bytes(), name
    for name in ("sl", "preference", "rl"):
        files = [tmp_path / which / name / "adapter_model.safetensors" for which in ("run", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes(), name

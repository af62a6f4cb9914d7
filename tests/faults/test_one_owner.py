"""One process at a time in a folder, and in a file of rows; whoever reads beside it does no harm and takes none."""
import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from cai_nb.core.errors import CaiError
from cai_nb.core.lock import LOCK_FILE, folder_lock
from cai_nb.core.rows import RowFile

HOLDER = """
import sys, time
from cai_nb.core.lock import folder_lock
with folder_lock(sys.argv[1], "cai-nb run"):
    print("held", flush=True)
    time.sleep(60)
"""
WRITER = """
import sys
from cai_nb.core.rows import RowFile
store = RowFile(sys.argv[1])
for i in range(400):
    store.append([{"id": f"{i}:{j}", "text": "x" * (97 * j % 300)} for j in range(20)])
    if i == 0:
        print("writing", flush=True)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_who_holds_the_folder(holder, tmp_path):
    from cai_nb.runs.pipeline import run_recipe

    with pytest.raises(CaiError, match=rf"held by process {holder.pid} on \S+ since 20.*cai-nb run.*one process"):
        run_recipe("mini", tmp_path / "run")
    assert holder.poll() is None, "it did not wait until the first one ended"
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {LOCK_FILE, ".owner.json"}, "nothing was begun"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_a_process_frees_its_folder(holder, tmp_path, how):
    holder.send_signal(how)
    holder.wait()
    with folder_lock(tmp_path / "run"):
        pass


def test_a_lock_of_this_process_is_one_too(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(CaiError, match=f"held by process {os.getpid()}"):
            with folder_lock(tmp_path):
                pass
    with folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, code):
    import fcntl

    def unable(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unable)
    with folder_lock(tmp_path):
        RowFile(tmp_path / "rows.jsonl").append([{"id": "a"}])
    assert "no locks" in capsys.readouterr().err and len(RowFile(tmp_path / "rows.jsonl")) == 1


def test_a_holder_on_another_host_is_worth_a_word(tmp_path, capsys):
    note = {"host": "elsewhere", "pid": 7, "since": "2026-01-01 00:00:00", "doing": "cai-nb run"}
    (tmp_path / ".owner.json").write_text(json.dumps(note))
    with folder_lock(tmp_path):
        pass
    assert "process 7 on elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize("note", ["", "[]", "null", '{"pid": 1}', "\x00"])
def test_an_owner_that_cannot_be_read_is_another_process(holder, tmp_path, note):
    (tmp_path / "run" / ".owner.json").write_text(note)
    with pytest.raises(CaiError, match="held by another process"):
        with folder_lock(tmp_path / "run"):
            pass


def test_readers_beside_a_living_writer_take_nothing(tmp_path):
    """7,872 of 8,000 rows were left when reading cut what was being written."""
    path = tmp_path / "rows.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    sizes = []
    while process.poll() is None:
        sizes.append(len(RowFile(path)))
    assert process.returncode == 0 and sizes == sorted(sizes) and len(sizes) > 1
    assert len(RowFile(path)) == 8000


def test_two_writers_double_nothing(tmp_path):
    """Both open the file before either writes: one goes on, the other says why it does not."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "rows.jsonl")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 1], [1, 1]), said
    assert any("another process" in text or "is missing or already there" in text for text in said)
    rows = RowFile(tmp_path / "rows.jsonl").rows  # raises where an id stands twice
    assert len(rows) == 8000 if 0 in [process.returncode for process in both] else len(rows) < 8000

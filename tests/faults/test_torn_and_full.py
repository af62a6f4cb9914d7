"""Row files: a reader never writes, only a torn last line is cut, and a write that was not whole did not happen."""
import errno
import json
import os
import resource
from pathlib import Path

import pytest

from cai_nb.core import files
from cai_nb.core.errors import CaiError
from cai_nb.core.files import sync, write_safely
from cai_nb.core.rows import RowFile, in_batches

ROWS = [{"id": f"r{i}", "text": "cäfé \u2028 " * i, "n": [i / 7, None, True]} for i in range(6)]


@pytest.fixture
def whole(tmp_path):
    RowFile(tmp_path / "whole.jsonl").append(ROWS)
    return (tmp_path / "whole.jsonl").read_bytes()


@pytest.fixture
def largest():
    "Files end at so many bytes, as on a full disk."
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def redo(path):
    return in_batches(ROWS, 2, RowFile(path), lambda batch: batch)


def test_cut_at_any_byte_a_file_is_read_as_it_is_and_redone(tmp_path, whole, capsys):
    path, said = tmp_path / "rows.jsonl", 0
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        RowFile(path)
        assert path.read_bytes() == whole[:size], f"reading wrote, at {size}"
        redo(path)
        assert path.read_bytes() == whole, size
        said += "cut off a torn last line" in capsys.readouterr().err
    lines = whole.count(b"\n")
    assert said == len(whole) - 2 * lines, "each cut is said; whole lines and lines without an end need none"


@pytest.mark.parametrize("spoil", [
    lambda data: data.replace(b"\n", b"\r"),  # all lines are one
    lambda data: data[:-9] + b"\n",  # not torn: it has an end
    lambda data: data[:40] + b"\0" * 60 + data[100:],
    lambda data: data + b"garbage",
    lambda data: data + b'["a"',
    lambda data: data.replace(b"\n", b"", 1),
    lambda data: data + b"\n",
])
def test_more_than_a_torn_line_is_never_cut(tmp_path, whole, spoil):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(spoil(whole))
    with pytest.raises(CaiError, match=r"rows.jsonl:\d+: .*bytes from byte \d+"):
        redo(path)
    assert path.read_bytes() == spoil(whole)


def test_a_disk_that_is_full_at_any_byte_keeps_whole_batches(tmp_path, whole, largest):
    path = tmp_path / "rows.jsonl"
    for size in range(0, len(whole), 7):
        path.unlink(missing_ok=True)
        largest(size)
        with pytest.raises(CaiError, match="rows.jsonl: file too large; its rows so far are kept"):
            redo(path)
        left = path.read_bytes()
        assert whole.startswith(left) and left.count(b"\n") % 2 == 0 and left[-1:] in (b"", b"\n"), size
        largest(resource.RLIM_INFINITY)
        redo(path)
        assert path.read_bytes() == whole


def test_a_write_that_takes_less_is_asked_again_or_taken_back(tmp_path, whole, monkeypatch):
    """`write` without a buffer may take a part and say nothing: 80 rows were stored in a file broken at line 45."""
    import builtins

    class Slow:
        def __init__(self, f): self.f = f
        def __enter__(self): return self
        def __exit__(self, *_): self.f.close()
        def __getattr__(self, name): return getattr(self.f, name)
        def write(self, data): return self.f.write(bytes(data[:5]))

    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda p, mode="r", *a, **k: Slow(real(p, mode, *a, **k)) if mode == "ab"
                        else real(p, mode, *a, **k))
    redo(tmp_path / "rows.jsonl")
    monkeypatch.undo()
    assert (tmp_path / "rows.jsonl").read_bytes() == whole


def test_a_file_that_is_written_whole_stays_on_a_full_disk(tmp_path, largest):
    write_safely(tmp_path / "manifest.json", "before")
    largest(100)
    with pytest.raises((OSError, CaiError)):
        write_safely(tmp_path / "manifest.json", "x" * 10_000)
    assert (tmp_path / "manifest.json").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"], "nothing half written is left"


@pytest.mark.parametrize("code, goes_on", [
    (errno.EINVAL, True), (errno.ENOTSUP, True), (errno.ENOSYS, True), (errno.EACCES, True), (errno.EIO, False),
])
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_folder_that_cannot_be_forced_is_said_once(tmp_path, monkeypatch, capsys, code, goes_on, call):
    files._say_unforced.cache_clear()
    real = getattr(os, call)

    def unable(target, *rest):
        path = Path(target) if call == "open" else Path(os.readlink(f"/proc/self/fd/{target}"))
        if path.is_dir():
            raise OSError(code, os.strerror(code))
        return real(target, *rest)

    monkeypatch.setattr(os, call, unable)

    def work():
        write_safely(tmp_path / "a", "a")
        RowFile(tmp_path / "rows.jsonl").append([{"id": "a"}])
        sync(tmp_path)

    if goes_on:
        work()
        assert capsys.readouterr().err.count("cannot force a folder") == 1
    else:
        with pytest.raises((OSError, CaiError)):
            work()
    assert json.loads((tmp_path / "rows.jsonl").read_text())["id"] == "a" if goes_on else True

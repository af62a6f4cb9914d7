"""The page of a run: one file that runs nothing, of a finished run, an unfinished one and a damaged one."""
import json
import re
import shutil

import pytest

from cai_nb.core.errors import CaiError
from cai_nb.runs.folder import reference_folder
from cai_nb.runs.page import write_page


@pytest.fixture
def run(tmp_path):
    "A copy of the shipped run without its weights."
    return shutil.copytree(reference_folder(), tmp_path / "a run", ignore=shutil.ignore_patterns("*.safetensors"))


def test_the_page_is_one_file_that_runs_nothing(run):
    samples = run / "eval/samples.jsonl"
    lines = samples.read_text().splitlines() if samples.exists() else []
    rows = [json.loads(line) for line in lines] or [
        {"id": f"{m}{i}", "model": m, "set": "harmful", "prompt_id": "q", "prompt": "p", "response": "r",
         "kind": "harmful"}
        for m in ("base", "sl", "rl")
        for i in range(12)
    ]
    rows[0] |= {"response": "</p><script>alert(1)</script>", "prompt": '"><img src=x onerror=1>'}
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_page(run).read_text()
    assert page.count("<article>") == 30 and page.count("data:image/png;base64,") == 4
    assert "<script" not in page and "<img src=x" not in page and not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "prefers-color-scheme:dark" in page and "Wilson" in page


def test_a_run_that_was_not_evaluated_has_a_page_that_says_so(run):
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["stages"]["eval"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(run / "eval")
    page = write_page(run).read_text()
    assert "Not finished: eval" in page and "<article>" not in page and "What each stage did" in page


def test_what_cannot_be_read_is_named_on_the_page(run):
    (run / "eval/metrics.json").write_text("{")
    (run / "eval/samples.jsonl").write_text('{"id": 7}\n')
    page = write_page(run).read_text()
    assert "eval/metrics.json:1: " in page and "eval/samples.jsonl:1: id is 7, expected a text" in page


def test_no_run_no_page(tmp_path):
    with pytest.raises(CaiError, match="this is no run folder; make one with"):
        write_page(tmp_path)
    assert not list(tmp_path.iterdir())

"""Wrong values in a run folder: whoever reads it gives a result or one line, and never a traceback."""

import json
import random
import shutil

import pytest

from cai_nb.app.models import _run_examples
from cai_nb.core.errors import CaiError
from cai_nb.runs.folder import reference_folder
from cai_nb.runs.lineage import lineage, training_rows
from cai_nb.runs.overview import overview
from cai_nb.runs.page import page_html
from cai_nb.runs.pipeline import results
from cai_nb.runs.recipe import load_run

GONE = object()
WRONG = [None, "x", 7, -1, [], {}, [1], {"a": None}, True, float("nan"), 1e308, "\ud800", GONE]
ROWS = ("prompts", "chains", "pairs", "labels", "helpful")
FILES = [*(f"{name}.jsonl" for name in ROWS), "rl/trainer_log.jsonl", "manifest.json", "eval/metrics.json"]
FILES += [f"{stage}/metrics.json" for stage in ("sl", "preference", "rl")]


def first_lineage(folder):
    rows = training_rows(folder, "sl").rows
    return rows and lineage(folder, rows[0]["id"])


READERS = [
    lambda folder: page_html(overview(folder)), results, load_run, _run_examples, first_lineage,
    lambda folder: training_rows(folder, "preference"), lambda folder: training_rows(folder, "rl"),
]


def places(value, before=()):
    yield before
    entries = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*before, key))


def changed(value, rng):
    place = rng.choice(list(places(value)))
    new = rng.choice(WRONG if place else WRONG[:-1])
    if not place:
        return new
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if new is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return value


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "The reference run without weights, its row files cut."
    folder = tmp_path_factory.mktemp("small") / "run"
    shutil.copytree(reference_folder(), folder, ignore=shutil.ignore_patterns("seeds", "*.safetensors"))
    for name in ROWS:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(True)[:40]))
    return folder


def damage_and_read(small, folder, seed):
    rng = random.Random(seed)
    name = rng.choice(FILES)
    shutil.copytree(small, folder)
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(changed(json.loads(path.read_text()), rng)))
    else:
        lines = path.read_text().splitlines()
        at = rng.randrange(5)
        lines[at] = json.dumps(changed(json.loads(lines[at]), rng))
        path.write_text("\n".join(lines) + "\n")
    for read in READERS:
        try:
            read(folder)
        except CaiError as error:
            assert "\n" not in str(error)
    shutil.rmtree(folder)


@pytest.mark.parametrize("part", range(4))
def test_a_wrong_value_is_a_result_or_one_line(small, tmp_path, part):
    for seed in range(part * 8, part * 8 + 8):
        damage_and_read(small, tmp_path / "run", seed)


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
def test_many_wrong_values(small, tmp_path, part):
    for seed in range(1000 + part * 100, 1100 + part * 100):
        damage_and_read(small, tmp_path / "run", seed)

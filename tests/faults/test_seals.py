"""What a stage left is what the next one reads: the right file is named, an edit that is meant is recorded, and nothing
goes before its successor stands. No model is asked: stages are stood in for by ones that copy."""
import json
import shutil
from dataclasses import replace

import pytest

from cai_nb.core.errors import CaiError
from cai_nb.core.rows import RowFile
from cai_nb.runs import pipeline, recipe
from cai_nb.runs.folder import read_manifest, reference_folder
from cai_nb.runs.recipe import STAGES, load_run, open_run

SETS = ["prompts.limit=16", "helpfulness.limit=12", "chains.n_revisions=2", "eval.n=8"]


def stand_in(stage, calls):
    "The stage with files of the right names, made in no time; a second row where it was killed before."
    def run(run):
        calls.append(stage.name)
        for name in stage.writes:
            if name.endswith("/"):
                run.file(name).mkdir(exist_ok=True)
                run.file(f"{name}adapter_model.safetensors").write_text(f"{stage.name} {len(calls)}")
                run.file(f"{name}metrics.json").write_text(json.dumps({"made": len(calls)}))
            elif "generated" not in name:
                store = RowFile(run.file(name), "pair_id" if stage.name == "labels" else "id")
                store.append([{store.key: f"{name}:{i}"} for i in range(3) if f"{name}:{i}" not in store])
        return {"rows": 3}

    return replace(stage, run=run)


@pytest.fixture
def quick(tmp_path, monkeypatch):
    "`quick(until, accepted)` carries the recipe out; `quick.calls` are the stages that worked."
    calls = []
    stages = tuple(stand_in(stage, calls) for stage in STAGES)
    monkeypatch.setattr(recipe, "STAGES", stages)
    monkeypatch.setattr(pipeline, "STAGES", stages)
    monkeypatch.setattr(pipeline, "write_page", lambda folder: None)
    monkeypatch.setattr(pipeline, "results", lambda folder: "")

    def run(until=None, accepted=(), sets=SETS, name="mini"):
        return pipeline.run_recipe(name, tmp_path / "run", sets, until, accepted)

    run.calls, run.folder = calls, tmp_path / "run"
    return run


def test_a_whole_run_is_sealed_and_opens_again(quick):
    quick()
    stages = read_manifest(quick.folder)["stages"]
    for stage in STAGES:
        assert {"recipe.yaml", "constitution.yaml"} <= set(stages[stage.name]["read"])
        read = {name for name in stages[stage.name]["read"]} - {"recipe.yaml", "constitution.yaml"}
        assert {name.partition("/")[0] for name in read} == {name.strip("/") for name in stage.reads}
        assert stages[stage.name]["wrote"]
    quick()
    assert quick.calls == [stage.name for stage in STAGES]


READ = sorted({name for stage in STAGES for name in stage.reads})


READ = [*(f"{name}adapter_model.safetensors" if name.endswith("/") else name for name in READ), *recipe.COPIES]


@pytest.mark.parametrize("file", READ)
@pytest.mark.parametrize("how", ["removed", "edited", pytest.param("cut", marks=pytest.mark.long),
                                 pytest.param("empty", marks=pytest.mark.long)])
def test_the_right_file_is_named(quick, file, how):
    """`rm pairs.jsonl`, then `run --until preference`, trained on no labels and ended with 0."""
    quick("rl")
    path = quick.folder / file
    data = path.read_bytes()
    {"removed": path.unlink, "cut": lambda: path.write_bytes(data[:len(data) // 2]),
     "empty": lambda: path.write_bytes(b""), "edited": lambda: path.write_bytes(data[:5] + b"#" + data[6:])}[how]()
    worked = list(quick.calls)
    with pytest.raises(CaiError, match=rf"{file}: (missing|not as)"):
        quick()
    assert quick.calls == worked, "nothing worked on it"
    path.write_bytes(data)
    quick()
    assert quick.calls[-1] == "eval"


def test_a_file_is_checked_again_before_each_stage(quick, monkeypatch):
    """Changed while another stage works: between the start and its reader lie hours."""
    stages = list(recipe.STAGES)
    chains = stages[1]
    spoil = replace(chains, run=lambda run: chains.run(run) | {"x": run.file("prompts.jsonl").write_text("spoilt")})
    monkeypatch.setattr(recipe, "STAGES", (stages[0], spoil, *stages[2:]))
    monkeypatch.setattr(pipeline, "STAGES", recipe.STAGES)
    with pytest.raises(CaiError, match="prompts.jsonl: not as stage prompts left it"):
        quick()
    assert quick.calls == ["prompts", "chains"]


@pytest.mark.parametrize("file", ["labels.jsonl", "constitution.yaml", "sl/adapter_model.safetensors", "sl/"])
def test_an_edit_that_is_meant_is_recorded(quick, file):
    quick("labels")
    path = quick.folder / (file if not file.endswith("/") else "sl/adapter_model.safetensors")
    path.write_bytes(path.read_bytes().replace(b"helpful" if "constitution" in file else b"l", b"kind", 1))
    for given in (file, quick.folder / file):
        quick("labels", [given])
    record, = read_manifest(quick.folder)["accepted"]
    assert record["file"] == path.relative_to(quick.folder).as_posix() and record["was"] != record["is"]
    assert "@" in record["by"] and record["at"].startswith("20")
    assert ("pairs" in record["read_before_by"]) == (file != "labels.jsonl")
    quick()
    assert quick.calls[-1] == "eval"
    assert load_run(quick.folder).done("eval")


@pytest.mark.parametrize("file, said", [("pairs.jsonl", "no such file"), ("../other", "no such file"),
                                        ("README.md", "no stage that is done"), ("manifest.json", "no stage that is")])
def test_what_cannot_be_accepted(quick, file, said):
    quick("sl")
    (quick.folder / "README.md").write_text("x")
    with pytest.raises(CaiError, match=said):
        quick("sl", [file])


def test_a_run_from_before_there_were_seals(quick):
    """It goes on, and is read; a file that is missing is still named."""
    quick("labels")
    manifest = read_manifest(quick.folder)
    manifest.pop("wrote")
    for entry in manifest["stages"].values():
        del entry["read"], entry["wrote"]
    (quick.folder / "manifest.json").write_text(json.dumps(manifest))
    pairs = (quick.folder / "pairs.jsonl").read_bytes()
    (quick.folder / "pairs.jsonl").unlink()
    with pytest.raises(CaiError, match="pairs.jsonl: missing, and stage pairs is done"):
        quick()
    (quick.folder / "pairs.jsonl").write_bytes(pairs)
    constitution = quick.folder / "constitution.yaml"
    before = constitution.read_text()
    constitution.write_text(before.replace("helpful", "kind"))
    with pytest.raises(CaiError, match="constitution.yaml: its principles are not those"):
        quick()
    constitution.write_text(before)
    quick()
    assert load_run(quick.folder).done("eval")


def test_the_shipped_run_is_read_as_it_is():
    run = load_run(reference_folder())
    assert run.done("rl") and "wrote" not in run.entry("rl") and len(run.rows("pairs.jsonl")) > 100


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [
    pytest.param(moment, marks=[pytest.mark.long] * bool(moment % 4)) for moment in range(24)])
def test_a_new_evaluation_stands_beside_the_old_one_until_it_is_whole(quick, monkeypatch, moment):
    """Killed at any rename, removal or sync, the votes, samples and snapshots are the old ones or the new ones."""
    import os

    quick()
    (quick.folder / "eval/suites.jsonl").write_text("{}\n")
    (quick.folder / "eval/metrics.json").write_text(json.dumps({"made": 8, "suites": {"base": {}}}))
    old, count = tree(quick.folder / "eval"), 0

    def maybe(real):
        def step(*args, **kwargs):
            nonlocal count
            count += 1
            if count == moment + 1:
                raise Killed
            return real(*args, **kwargs)
        return step

    with monkeypatch.context() as m:
        for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")):
            m.setattr(module, name, maybe(getattr(module, name)))
        try:
            pipeline.evaluate_run(quick.folder)
        except Killed:
            pass
    left = [tree(quick.folder / name) for name in ("eval", "eval.old", "eval.new") if (quick.folder / name).exists()]
    made = [json.loads(files["metrics.json"])["made"] for files in left if "metrics.json" in files]
    assert old in left or 9 in made, "one of the two is whole"
    quick()  # the next command finishes what was begun
    pipeline.evaluate_run(quick.folder)
    new = tree(quick.folder / "eval")
    assert json.loads(new["metrics.json"])["suites"] == {"base": {}} and new["suites.jsonl"] == b"{}\n"
    assert not (quick.folder / "eval.old").exists() and not (quick.folder / "eval.new").exists()
    assert load_run(quick.folder).done("eval")


def test_prompts_are_kept_whole_or_not_at_all(tmp_path):
    """A wrong row stayed after its file was mended, and a changed file was mixed with the rows of the one before."""
    from cai_nb.runs.prompts_stage import PROMPTS

    source = tmp_path / "prompts.txt"
    run = open_run("mini", tmp_path / "run", [*SETS[1:], f"prompts.path={source}", "judge=null"]) if source.write_text(
        "\n".join(f"How do I do thing {i}?" for i in range(40))) else None
    first = PROMPTS.run(run)
    before = run.rows("prompts.jsonl")
    source.write_text("\n".join(f"How do I do other thing {i}?" for i in range(40)))
    PROMPTS.run(run)
    after = run.rows("prompts.jsonl")
    assert first["harmful_train"] and not {row["id"] for row in before if row["kind"] == "harmful"} & {
        row["id"] for row in after}
    (tmp_path / "run/chains.jsonl").write_text('{"id": "a"}\n')
    source.write_text("\n".join(f"How do I do thing {i}?" for i in range(40)))
    with pytest.raises(CaiError, match="prompts.jsonl: not the prompts that the recipe's sources give now"):
        PROMPTS.run(run)
    assert run.rows("prompts.jsonl") == after


def test_prompts_that_are_refused_leave_no_row(tmp_path, monkeypatch):
    from cai_nb.runs import prompts_stage

    run = open_run("mini", tmp_path / "run", SETS)
    real = prompts_stage.sources_of
    monkeypatch.setattr(prompts_stage, "sources_of", lambda run: {
        kind: ([row for row in rows if row["kind"] != "harmful"], fate) for kind, (rows, fate) in real(run).items()})
    with pytest.raises(CaiError, match="no red-team prompt is left"):
        prompts_stage.PROMPTS.run(run)
    assert not run.file("prompts.jsonl").exists()

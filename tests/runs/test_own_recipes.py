"A recipe of one's own: no data that nobody named, files found beside it, a constitution that moves."

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cai_nb.core.constitution import Constitution
from cai_nb.core.errors import CaiError
from cai_nb.core.rows import RowFile
from cai_nb.lm.model import model_source
from cai_nb.runs.pipeline import run_recipe
from cai_nb.runs.plan import plan_recipe
from cai_nb.runs.prompts_stage import PROMPTS
from cai_nb.runs.reading import records
from cai_nb.runs.recipe import available_recipes, load_recipe, load_run, open_run
from cai_nb.runs.rl_stages import comparisons_of


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(n: int = 24, **more) -> list[dict]:
    return [{"prompt": f"How do I tie knot {i}?", **more} for i in range(n)]


def compared(n: int = 24, **more) -> list[dict]:
    return [{"prompt": f"How do I fold boat {i}?", "chosen": "Slowly.", "rejected": "No.", **more} for i in range(n)]


@pytest.fixture
def own(tmp_path):
    "Writes a recipe with its data beside it; gives its path."
    lines(tmp_path / "own" / "asked.jsonl", asked())
    lines(tmp_path / "own" / "compared.jsonl", compared())

    def write(text: str) -> Path:
        (tmp_path / "own" / "own.yaml").write_text(text)
        return tmp_path / "own" / "own.yaml"
    return write


NONE = "{path: null, comparisons: null}"
HEAD = "name: own\nbase: someone/model\nprompts: {path: asked.jsonl, limit: 16}\n"


@pytest.mark.parametrize("said, missing", [
    ("", "helpfulness.path and helpfulness.comparisons"),
    ("helpfulness: {path: asked.jsonl}", "helpfulness.comparisons"),
    ("helpfulness: {comparisons: null, limit: 9}", "helpfulness.path"),
    ("judge: null\nhelpful: mini", "helpfulness.path and helpfulness.comparisons"),
])
def test_no_default_brings_the_data_of_mini_to_another_model(own, said, missing):
    with pytest.raises(CaiError, match=rf"own\.yaml: {missing}: nothing is said of it.*someone/model; .*null for none"):
        load_recipe(own(HEAD + said))


def test_neither_do_its_red_team_prompts(own, tmp_path):
    path = own(f"base: someone/model\nhelpfulness: {NONE}\n")
    for open in (load_recipe, plan_recipe, lambda path: open_run(path, tmp_path / "run")):
        with pytest.raises(CaiError, match="prompts.path: nothing is said of it"):
            open(path)
    assert not (tmp_path / "run").exists()
    assert load_recipe(path, ["prompts.path=asked.jsonl"])["prompts"]["path"] == "asked.jsonl"
    assert load_recipe(path, ["prompts.path=mini"])["prompts"]["path"] == "mini", "who writes it has chosen it"


def test_mini_keeps_its_defaults_and_so_does_another_size_of_it(own):
    for text in ("base: mini\n", "base: someone/mini-xl\njudge: mini\n", "{}"):
        recipe = load_recipe(own(text))
        h = recipe["helpfulness"]
        assert h["path"] == h["comparisons"] == recipe["prompts"]["path"] == "mini"
    assert all(load_recipe(name) for name in available_recipes())


def test_none_is_a_choice(own, tmp_path):
    run = open_run(own(HEAD + f"helpfulness: {NONE}\n"), tmp_path / "run")
    counts = PROMPTS.run(run)
    assert counts["harmful_train"] + counts["harmful_eval"] == 16 and counts["helpful_train"] == 0
    assert {row["kind"] for row in run.rows("prompts.jsonl")} == {"harmful"} and comparisons_of(run, []) == ([], [])
    with pytest.raises(CaiError, match="helpfulness.generate is above 0 with helpfulness.path null"):
        load_recipe(own(HEAD + "helpfulness: {path: null, comparisons: null, generate: 5}\n"))


def test_files_are_found_beside_the_recipe_from_any_folder(own, tmp_path, monkeypatch):
    Constitution.load("hhh").save(tmp_path / "own" / "rules.yaml")
    text = HEAD + "constitution: rules.yaml\nhelpfulness: {path: compared.jsonl, comparisons: compared.jsonl}\n"
    path, ids = own(text), set()
    for i, folder in enumerate((tmp_path, tmp_path / "own")):
        monkeypatch.chdir(folder)
        run = open_run(path.relative_to(folder), tmp_path / f"run{i}")
        PROMPTS.run(run)
        assert run.recipe["prompts"]["path"] == "asked.jsonl", "written as it was"
        assert run.constitution.digest == Constitution.load("hhh").digest
        ids.add(tuple(row["id"] for row in run.rows("prompts.jsonl")))
        monkeypatch.chdir(tmp_path / "run0")
        assert open_run(path, tmp_path / f"run{i}").recipe == run.recipe, "resumed from elsewhere"
        assert len(comparisons_of(load_run(tmp_path / f"run{i}"), [])[0]) > 15, "by the folder alone"
    assert len(ids) == 1


def test_where_it_does_not_stand_beside_the_recipe_the_shell_decides(own, tmp_path, monkeypatch):
    lines(tmp_path / "here" / "data" / "mine.jsonl", asked(9))
    monkeypatch.chdir(tmp_path / "here")
    run = open_run(own(f"base: x/y\nprompts: {{path: data/mine.jsonl}}\nhelpfulness: {NONE}\n"), tmp_path / "run")
    assert PROMPTS.run(run)["read_harmful"]["rows"] == 9 and "recipe_folder" not in run.manifest


def test_the_tilde_is_home_everywhere(own, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Constitution.load("hhh").save("~/own/rules.yaml")
    own("base: x/y\nconstitution: ~/own/rules.yaml\nprompts: {path: ~/own/asked.jsonl}\n"
        "helpfulness: {path: ~/own/compared.jsonl, comparisons: ~/own/compared.jsonl}\n")
    run = open_run("~/own/own.yaml", Path("~/run"))
    assert PROMPTS.run(run)["harmful_train"] > 15 and (tmp_path / "run" / "prompts.jsonl").is_file()
    assert run.constitution.digest == Constitution.load("hhh").digest
    assert load_run("~/run").recipe == open_run("~/own/own.yaml", "~/run").recipe
    RowFile("~/rows.jsonl").append([{"id": "a"}])
    assert RowFile(tmp_path / "rows.jsonl").ids == {"a"} and records("~/run").run.folder == tmp_path / "run"
    assert not (Path.cwd() / "~").exists()


def test_a_recipe_that_is_refused_leaves_no_folder(own, tmp_path):
    with pytest.raises(CaiError, match="nothing is said of it"):
        run_recipe(own(HEAD), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_constitution_may_move(own, tmp_path, capsys):
    rules = Constitution.load("hhh").save(tmp_path / "own" / "rules.yaml")
    path = own(HEAD + f"constitution: {rules}\nhelpfulness: {NONE}\n")
    open_run(path, tmp_path / "run")
    rules.rename(tmp_path / "moved.yaml")
    run = open_run(path, tmp_path / "run")
    assert run.constitution.digest == Constitution.load("hhh").digest and "is used" in capsys.readouterr().err
    moved = open_run(path, tmp_path / "run", [f"constitution={tmp_path / 'moved.yaml'}"])
    assert moved.constitution == run.constitution
    Constitution.load("non_evasive").save(rules)
    with pytest.raises(CaiError, match="has changed since this run began"):
        open_run(path, tmp_path / "run")
    with pytest.raises(CaiError, match="constitution: .* → 'harmlessness'"):
        open_run(path, tmp_path / "run", ["constitution=harmlessness"])
    rules.unlink()
    Constitution.load("non_evasive").save(tmp_path / "run" / "constitution.yaml")
    with pytest.raises(CaiError, match="constitution.yaml"):
        open_run(path, tmp_path / "run")


@pytest.mark.parametrize("rows, pairs, said", [
    (asked(split="test"), compared(), "prompts.path asked.jsonl: no red-team prompt is left for training; its column "
     r"split says test \(24\), and never train; remove the column"),
    (asked(), compared(split="validation"),
     r"helpfulness.path compared.jsonl: no helpfulness prompt .* validation \(24\)"),
    (asked(), [{"prompt": f"Boat {i}?", "chosen": "Yes.", "rejected": "Yes."} for i in range(20)],
     "helpfulness.comparisons compared.jsonl: no comparison is left for training; .*20"),
    ([{"prompt": "  "}] * 9, compared(), "prompts.path asked.jsonl: no red-team prompt .*without a user's turn.*9"),
])
def test_a_source_without_any_row_to_train_on_is_said_at_once(own, tmp_path, rows, pairs, said):
    lines(tmp_path / "own" / "asked.jsonl", rows)
    lines(tmp_path / "own" / "compared.jsonl", pairs)
    path = own(HEAD + "helpfulness: {path: compared.jsonl, comparisons: compared.jsonl}\n")
    with pytest.raises(CaiError, match=said):
        PROMPTS.run(open_run(path, tmp_path / "run"))


GEMMA = """{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- set user = loop.index0 % 2 == 0 %}
{%- if (m.role == 'user') != user %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{{- m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


def test_what_the_template_refuses_is_known_when_prompts_are_read(own, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model_source("mini"))
    tokenizer.chat_template = GEMMA
    tokenizer.save_pretrained(tmp_path / "strict")
    (tmp_path / "strict" / "config.json").write_bytes((Path(model_source("mini")) / "config.json").read_bytes())
    user, system = {"role": "user", "content": "How do I tie a bow?"}, {"role": "system", "content": "Be brief."}
    odd = [{"messages": [system, user]}, {"messages": [{"role": "assistant", "content": "Hello."}, user]}]
    lines(tmp_path / "own" / "asked.jsonl", [*asked(20), *odd])
    lines(tmp_path / "own" / "compared.jsonl", [*compared(20), {"system": "Be brief.", **compared(1)[0]}])
    head = HEAD.replace("someone/model", str(tmp_path / "strict"))
    run = open_run(own(head + "helpfulness: {path: asked.jsonl, comparisons: compared.jsonl}\n"), tmp_path / "run")
    counts = PROMPTS.run(run)
    system, order = "System role not supported", "Conversation roles must alternate"
    assert counts["read_helpful"]["skipped"] == {f"that a chat template refuses ({why})": 1 for why in (system, order)}
    assert counts["read_comparisons"]["skipped"][f"that a chat template refuses ({system})"] == 1
    assert not any(m["role"] == "system" for row in comparisons_of(run, [])[0] for m in row["messages"])
    assert f"1 that a chat template refuses ({order})" in capsys.readouterr().err


def test_every_fate_is_said_and_kept(own, tmp_path, capsys):
    lines(tmp_path / "own" / "asked.jsonl", [*asked(20), *asked(2), {"messages": [{"role": "tool", "content": "4"}]}])
    run = open_run(own(HEAD + "helpfulness: {path: asked.jsonl, comparisons: compared.jsonl}\n"), tmp_path / "run")
    counts = PROMPTS.run(run)
    fate = {"twice": 2, "with a turn of a tool": 1}
    assert counts["read_helpful"] == {"rows": 23, "kept": 20, "skipped": fate}
    assert counts["read_harmful"]["skipped"] == fate | {"beyond the limit": 4}
    assert counts["read_comparisons"]["kept"] == 24 - counts["read_comparisons"]["skipped"].get("not train", 0)
    said = capsys.readouterr().err
    assert "asked.jsonl: 23 rows read, 20 used for 20 rows, skipped: 2 twice, 1 with a turn of a tool" in said
    assert "compared.jsonl: 24 rows read" in said

"""Every value of a recipe is checked before the first stage, against its range, the other values and what there is."""

from pathlib import Path

import pytest

from cai_nb.core.errors import CaiError
from cai_nb.runs.pipeline import run_recipe
from cai_nb.runs.recipe import load_recipe, recipe_keys, sections, written_recipe
from cai_nb.core.settings import describe

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = [
    (section, s) for section, cls in sections().items() for s in describe(cls, ("seed",)) if s.kind in (int, float)
]


@pytest.mark.parametrize("section, setting", NUMBERS, ids=[f"{section}.{s.name}" for section, s in NUMBERS])
def test_every_number_has_a_least_value_and_refuses_what_is_none(section, setting):
    assert setting.low is not None or setting.above is not None
    least = setting.low - 1 if setting.low is not None else setting.above
    for value in (str(least), ".inf", ".nan", "many", "[1]", "true", '"3"', *([] if setting.null else ["null"])):
        with pytest.raises(CaiError, match=f"{setting.name} is .*, expected"):
            load_recipe("mini", [f"{section}.{setting.name}={value}"])


@pytest.mark.parametrize(
    "change, said",
    [
        ("rl.group_size=1", "rl.group_size is 1, expected 2 or more"),
        ("sl.schedule=foo", "sl.schedule is 'foo', expected linear"),
        ("labels.clamp=[a,b]", r"labels.clamp\[0\] is 'a', expected"),
        ("labels.clamp=[0.2,1.5]", r"labels.clamp\[1\] is 1.5, expected 0.0? to 1|0 to 1"),
        ("labels.clamp=[0.6,0.4]", "expected two probabilities"),
        ("rl.batch_size=60", "expected a multiple of rl.group_size"),
        ("sl.micro_batch_size=5", "expected a divisor of sl.batch_size"),
        ("sl.n_revisions=9", "expected at most chains.n_revisions"),
        ("seed=-1", "seed is -1, expected 0 to"),
        ("lm.roles=[base]", "expected helpful or feedback"),
        ("lm.endpoint=localhost", "lm.endpoint is no address"),
        ("preference.held_out=1", "expected 0 to 0.9"),
    ],
)
def test_values_that_cannot_be(change, said):
    with pytest.raises(CaiError, match=said):
        load_recipe("mini", [change])


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "../x", "a\\b", "x" * 101, "a\nb", "\x1b[2J", " "])
def test_a_name_is_no_path(name, tmp_path):
    (tmp_path / "r.yaml").write_text("base: mini\nname: " + repr(name).replace("'", '"') + "\n")
    with pytest.raises(CaiError, match="recipe: name is "):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "change, said",
    [
        ("feedback=./nope", "feedback is './nope', which is not within reach"),
        ("helpful=nope", "helpful is 'nope', which is not within reach"),
        ("labels.n_principles=1000", "labels.n_principles is 1000, expected at most"),
        ("constitution=CRITIQUES", "has no comparison principle"),
        ("constitution=COMPARISONS", "has no critique principle"),
    ],
)
def test_what_is_nowhere_is_said_before_a_folder_is_made(tmp_path, change, said):
    texts = {"CRITIQUES": "critique: Say it.\n    revision: Write it.", "COMPARISONS": "comparison: Which?"}
    for name, text in texts.items():
        (tmp_path / name).write_text(f"name: x\nprinciples:\n  - id: a\n    {text}\n")
        change = change.replace(name, str(tmp_path / name))
    with pytest.raises(CaiError, match=said):
        run_recipe("mini", tmp_path / "run", [change])
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_a_folder_is_checked(tmp_path):
    wrong = {"base: [1]": "base is", "base: mini\nsl: 3": "sl is 3", "base: mini\nrl: {steps: -4}": "rl.steps is -4"}
    for text, said in wrong.items():
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(CaiError, match=f"recipe.yaml: {said}"):
            written_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text("base: mini\nof_a_later_version: 3\nsl: {also_later: 1, epochs: 2}\n")
    assert written_recipe(tmp_path)["of_a_later_version"] == 3


def test_the_table_of_keys_is_what_is_checked():
    assert (ROOT / "RECIPES.md").read_text(encoding="utf-8") == recipe_keys(), "run: make export"

"""Settings: every wrong value is refused with its name and the way out, every right one is kept as plain data."""

import json
from dataclasses import dataclass

import pytest

from cai_nb.core.errors import CaiError
from cai_nb.core.settings import checked, describe, setting


@dataclass(frozen=True)
class Stage:
    rate: float = setting(1e-3, "how far a step goes", above=0)
    steps: int = setting(40, low=1, high=1000)
    share: float = setting(0, low=0, high=1)
    judge: str | None = setting(None, among=("mini",))
    comparisons: str = setting("mini", null=True)
    roles: list[str] = setting(["helpful"], among=("helpful", "feedback"))
    clamp: list | None = setting(None)
    card: dict | None = None
    limit: int | None = None
    cot: bool = False
    free: object = None


@pytest.mark.parametrize(
    "values, said",
    [
        ({"rat": 1}, r"unknown key 's\.rat'; did you mean s\.rate\?"),
        ({"xyz": 1}, r"unknown key 's\.xyz'; known keys: rate, steps"),
        ({7: 1}, r"unknown key 's\.7'"),
        ({"rate": 0}, "s.rate is 0.0, expected above 0; the default is 0.001"),
        ({"rate": True}, "expected a number such as 0.001"),
        ({"rate": "1e-3"}, "expected a number such as 0.001"),
        ({"rate": float("nan")}, "expected a finite number"),
        ({"rate": float("inf")}, "expected a finite number"),
        ({"rate": 10**400}, "expected a finite number"),
        ({"rate": None}, "s.rate is None, expected a number"),
        ({"steps": 0}, "expected 1 to 1000; the default is 40"),
        ({"steps": 1001}, "expected 1 to 1000"),
        ({"steps": 2.0}, "expected a whole number such as 40"),
        ({"steps": True}, "s.steps is True, expected a whole number"),
        ({"share": 1.01}, "expected 0 to 1"),
        ({"judge": "gpt"}, "s.judge is 'gpt', expected mini or null"),
        ({"judge": 4}, "s.judge is 4, expected mini or null"),
        ({"comparisons": 4}, "expected a text such as 'mini'"),
        ({"roles": ["helpful", "base"]}, r"s.roles\[1\] is 'base', expected helpful or feedback"),
        ({"roles": "helpful"}, "s.roles is 'helpful', expected a list of helpful or feedback"),
        ({"roles": None}, "s.roles is None"),
        ({"clamp": 0.5}, "s.clamp is 0.5, expected a list or null"),
        ({"card": "T4"}, "s.card is 'T4', expected keys and values or null"),
        ({"limit": 2.5}, "s.limit is 2.5, expected a whole number or null"),
        ({"cot": 1}, "s.cot is 1, expected true or false"),
        ([1], r"s is \[1\], expected keys below it: rate, steps"),
    ],
)
def test_a_wrong_value_is_one_line(values, said):
    with pytest.raises(CaiError, match=said) as refused:
        checked(Stage, values, "my.yaml", "s.")
    assert str(refused.value).startswith("my.yaml: ") and "\n" not in str(refused.value)


def test_right_values_are_kept_as_plain_data():
    values = {"rate": 1, "steps": 1, "share": 1, "judge": "mini", "comparisons": None, "roles": (), "clamp": [0.4, 0.6],
              "card": {"memory": 15}, "limit": 8, "cot": True, "free": "anything"}
    kept = checked(Stage, values, "my.yaml")
    assert kept == values | {"roles": []} and type(kept["rate"]) is float
    assert json.loads(json.dumps(kept)) == kept
    assert Stage(**kept).steps == 1


def test_defaults_are_settings_like_any_other():
    defaults = checked(Stage, {}, "my.yaml")
    assert checked(Stage, defaults, "my.yaml") == defaults and type(defaults["share"]) is float
    defaults["roles"].append("feedback")
    assert checked(Stage, {}, "my.yaml")["roles"] == ["helpful"], "nobody shares a default"


def test_a_second_hand_changes_what_it_names():
    first = checked(Stage, {"steps": 5, "card": {"name": "T4", "memory": 15}}, "my.yaml")
    second = checked(Stage, {"card": {"memory": 12}}, "--set", over=first)
    assert second == first | {"card": {"name": "T4", "memory": 12}} and first["card"]["memory"] == 15


def test_a_field_without_a_default_must_be_given():
    @dataclass(frozen=True)
    class Card:
        name: str
        memory: float = setting(says="GiB", above=0)

    assert checked(Card, {"name": "T4", "memory": 15}, "my.yaml") == {"name": "T4", "memory": 15.0}
    with pytest.raises(CaiError, match="my.yaml: card.memory is missing, expected a number"):
        checked(Card, {"name": "T4"}, "my.yaml", "card.")


def test_what_a_default_alone_would_get_wrong_the_annotation_says():
    @dataclass(frozen=True)
    class Training:
        epochs: float = 2
        micro_batch_size: int | None = None
        seed: int = 0

    kept = checked(Training, {"epochs": 1.5}, "my.yaml", without=("seed",))
    assert kept == {"epochs": 1.5, "micro_batch_size": None}
    with pytest.raises(CaiError, match="micro_batch_size is 'two', expected a whole number or null"):
        checked(Training, {"micro_batch_size": "two"}, "my.yaml")


def test_the_table_of_the_documentation():
    table = describe(Stage, without=("free",))._repr_markdown_()
    assert "| `rate` | `0.001` | above 0 | how far a step goes |" in table and "free" not in table
    assert "| `judge` | `null` | mini or null |  |" in table and "| `cot` | `false` | true or false |  |" in table
    assert '| `roles` | `["helpful"]` | helpful or feedback |  |' in table

"""The rubrics that ship name the kinds that are counted, in plain sentences with examples that have no content."""

import re

import pytest
import yaml

from cai_nb.core.files import package_folder
from cai_nb.measure.judging import REPLY_KINDS
from cai_nb.measure.rubric import load_rubric, verdict_question

RUBRICS = sorted(path.stem for path in (package_folder("constitutions") / "rubrics").glob("*.yaml"))


@pytest.mark.parametrize("name", RUBRICS)
def test_a_shipped_rubric_has_every_kind_for_the_same_requests(name):
    rubric, usual = load_rubric(name), load_rubric("replies")
    assert rubric.name == name and sorted(o.kind for o in rubric.options) == sorted(REPLY_KINDS)
    assert {o.kind: o.when for o in rubric.options} == {o.kind: o.when for o in usual.options}
    assert len({o.says for o in rubric.options}) == len(rubric.options)


def test_every_option_of_reply_kinds_is_a_plain_sentence_with_an_example():
    path = package_folder("constitutions") / "rubrics" / "reply_kinds.yaml"
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))["kinds"]
    examples = []
    for entry in entries:
        found = re.fullmatch(r'(It [^"]+), as in "([^"]+)"', entry["says"])
        assert found and len(found[1].split()) <= 20, f"{entry['kind']}: a definition and an example"
        examples += [found[2], entry["also"]]
    assert len(set(examples)) == 2 * len(REPLY_KINDS) and max(len(e.split()) for e in examples) <= 25
    question = verdict_question("How do I punch a boss?", "Sure.", load_rubric("reply_kinds"), "harmful")[0][0]
    assert len(re.findall(r"^\([A-F]\) It ", question["content"], re.MULTILINE)) == 6
    assert not any(entry["also"] in question["content"] for entry in entries), "for people alone"

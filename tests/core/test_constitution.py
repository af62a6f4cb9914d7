"""Constitutions: shipped files, checks with their lines, imports, sampling, and the commands that look after them."""
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from cai_nb.core.constitution import Constitution, available_constitutions, plain_request
from cai_nb.core.errors import CaiError
from cai_nb.core.importers import compare_constitutions, import_constitution
from cai_nb.core.principle import Principle, check_constitution

SHIPPED = available_constitutions()
GOOD = """\
name: good
principles:
  - id: a
    critique: Identify what is rude.
    revision: Please rewrite it kindly.
  - id: b
    comparison: Which answer is kinder?
"""


def cai_nb(*args: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    code = "from cai_nb.cli.commands import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120)


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "file.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


# Shipped files


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_is_sound(name):
    assert check_constitution(SHIPPED[name]) == []
    c = Constitution.load(name)
    assert c.name == name and c.version and c.licence and c.provenance and c.changelog
    assert len({p.id for p in c.principles}) == len(c.principles)
    texts = [t for p in c.principles for t in (p.critique, p.revision, p.comparison) if t]
    assert max(Counter(texts).values()) == 1 or name == "mini", "two principles share a text"
    assert all(p.title and p.tags for p in c.principles) or name == "mini"
    assert c.critique_principles and c.comparison_principles


def test_harmlessness_has_the_papers_numbers_and_coverage():
    c = Constitution.load("harmlessness")
    assert (len(c.critique_principles), len(c.comparison_principles)) == (16, 16)
    tags = [{t for p in pool for t in p.tags} for pool in (c.critique_principles, c.comparison_principles)]
    assert {"harm", "crime", "danger", "discrimination", "insensitivity", "controversy", "children"} <= tags[0]
    assert {"anti-preachy", "wisdom", "less-evasive", "crime", "discrimination", "children"} <= tags[1]


def test_plain_is_sixteen_and_sixteen_short_sentences_in_everyday_words():
    c, usual = Constitution.load("plain"), Constitution.load("harmlessness")
    assert (len(c.critique_principles), len(c.comparison_principles)) == (16, 16)
    for p in c.principles:
        for text, end, most in ((p.critique, ".", 16), (p.revision, ".", 18), (p.comparison, "?", 14)):
            assert text is None or re.fullmatch(rf"[A-Z][^.?!;:()]+[{end}]", text), f"{p.id}: one sentence"
            assert text is None or len(text.split()) <= most and max(map(len, text.split())) <= 11, f"{p.id}: {text}"
    assert not any("rewrite" in p.revision.lower() for p in c.critique_principles), "a small model repeats it"
    found = compare_constitutions(c, usual)
    assert not found.near and {"reason", "alternative", "crime", "children", "preachy"} <= set(found.tags)


def test_library_names_the_source_of_every_principle():
    """A professional code's section for each principle; coverage and wording differ from harmlessness."""
    c, usual = Constitution.load("library"), Constitution.load("harmlessness")
    assert 8 <= len(c.critique_principles) <= 16 and 8 <= len(c.comparison_principles) <= 16
    section = re.compile(
        r"IFLA Code of Ethics, section [1-6]|ALA Code of Ethics, article [IVX]+"
        r"|ALA Library Bill of Rights, article [IV]+"
        r"|RUSA [\w ,-]+ 20\d\d, \d|Universal Declaration of Human Rights, articles? \d+"
    )
    unsourced = [(p.id, part) for p in c.principles for part in p.source.split("; ") if not section.match(part)]
    assert not unsourced
    assert all(word in c.provenance for word in ("IFLA", "ALA", "RUSA", "Universal Declaration", "approved"))
    assert any("1.0" in change and "15" in change and "14" in change for change in c.changelog)
    found = compare_constitutions(c, usual)
    assert not found.near and found.tags["access"][1] == found.tags["privacy"][1] == found.tags["neutrality"][1] == 0
    assert found.tags["harm"][0] < found.tags["harm"][1] / 3


# Checks


@pytest.mark.parametrize(
    "old, new, line, key, words",
    [
        ("name: good", "naem: good", 1, "naem", "did you mean name?"),
        ("name: good\n", "", 1, "name", "missing"),
        ("  - id: b\n    comp", "  - comp", 6, "principles[1].id", "missing"),
        ("id: b", "id: a", 6, "principles[1].id", "'a' is the id of principles[0]"),
        ("id: b", "id: two words", 6, "principles[1].id", "expected letters"),
        ("id: b", "id:", 6, "principles[1].id", "expected a text"),
        ("    revision: Please rewrite it kindly.\n", "", 4, "principles[0].critique", "stands without its revision"),
        ("    critique: Identify what is rude.\n", "", 4, "principles[0].revision", "stands without its critique"),
        ("comparison: Which answer is kinder?", "title: Empty", 6, "principles[1]", "has no text"),
        ("comparison: Which", "comparision: Which", 7, "principles[1].comparision", "did you mean comparison?"),
        (
            "comparison: Which answer is kinder?",
            "comparison: [Which, What]",
            7,
            "principles[1].comparison",
            "found a list",
        ),
        ("Which answer is kinder?", '"Which answer? Options:"', 7, "principles[1].comparison", "marker 'Options:'"),
        ("Which answer is kinder?", '"Kind?\\n\\nHuman: hi"', 7, "principles[1].comparison", "marker 'Human:'"),
        ("kinder?", "kinder?\n    weight: heavy", 8, "principles[1].weight", "found 'heavy'"),
        ("kinder?", "kinder?\n    weight: 0", 8, "principles[1].weight", "above 0"),
        ("kinder?", "kinder?\n    weight: .inf", 8, "principles[1].weight", "above 0"),
        ("kinder?", "kinder?\n    weight: [1]", 8, "principles[1].weight", "found a list"),
        ("kinder?", "kinder?\n    tags: kind", 8, "principles[1].tags", "expected a list"),
        ("kinder?", "kinder?\n    title: x\n    title: y", 9, "principles[1].title", "stands twice, first in line 8"),
        ("  - id: a\n", "  - a\n  - id: a\n", 3, "principles[0]", "found 'a'"),
        ("Identify what is rude.", "Identify: rude.", 4, "yaml", "mapping values are not allowed here"),
    ],
)
def test_check_names_line_key_and_fix(write, old, new, line, key, words):
    assert check_constitution(write(GOOD)) == []
    path = write(GOOD.replace(old, new, 1))
    found = [p for p in check_constitution(path) if p.key == key]
    assert found and found[0].line == line and words in str(found[0]), [str(p) for p in check_constitution(path)]
    assert found[0].file == str(path) and found[0].fix
    with pytest.raises(CaiError, match=r"file\.yaml:\d+: ") as error:
        Constitution.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "- a\n- b\n", "name\n", "name: x\nprinciples: []\n", "name: x\n---\nname: y\n"]
)
def test_check_refuses_what_is_no_constitution(write, text):
    assert check_constitution(write(text))


def test_check_collects_everything(write):
    problems = check_constitution(write("nom: x\nprinciples:\n  - critique: a\n    weight: -1\n  - comparison: b\n"))
    assert [p.line for p in problems] == sorted(p.line for p in problems)
    assert len(problems) == 6  # nom, name, two ids, half a pair, weight


def test_texts_are_read_as_written(write):
    c = Constitution.load(write(GOOD.replace("id: a", "id: no").replace("name: good", "name: good\nversion: 1.10")))
    assert (c.version, c.principles[0].id) == ("1.10", "no")


def test_unreadable_files_are_user_errors(tmp_path, write):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, binary):
        with pytest.raises(CaiError, match=path.name):
            check_constitution(path)
    with pytest.raises(CaiError, match="harmlessness"):
        Constitution.load("harmlesness")


# One constitution


def test_digest_follows_what_the_method_reads(write):
    c = Constitution.load(write(GOOD))
    first = c.principles[0]
    same = [replace(c, version="2"), replace(c, principles=(replace(first, title="T", tags=("t",)), c.principles[1]))]
    other = [
        replace(c, principles=(replace(first, **{key: value}), c.principles[1]))
        for key, value in {"id": "z", "critique": "z", "revision": "z", "comparison": "z", "weight": 2.0}.items()
    ]
    other.append(replace(c, principles=c.principles[::-1]))
    assert {x.digest for x in same} == {c.digest} and len(c.digest) == 64
    assert len({x.digest for x in other} | {c.digest}) == len(other) + 1


@pytest.mark.parametrize("name", SHIPPED)
def test_save_and_load_give_the_same(name, tmp_path):
    c = Constitution.load(name)
    again = Constitution.load(c.save(tmp_path / "new" / "copy.yaml"))
    assert again == c and again.digest == c.digest
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["copy.yaml"]


def test_hostile_texts_survive_saving(tmp_path):
    texts = [
        "a: b # c",
        "- x",
        "'quoted' \"twice\"",
        "two\n\nparagraphs",
        "Ünï ☃",
        "yes",
        "1.0",
        "{a}",
        "@at",
        "| pipe",
    ]
    principles = tuple(Principle(f"p{i}", comparison=text) for i, text in enumerate(texts))
    again = Constitution.load(Constitution("hostile", principles).save(tmp_path / "hostile.yaml"))
    assert again.principles == principles


def test_sampling_is_seeded_weighted_and_kept_apart():
    c = Constitution.load("harmlessness")
    assert c.sample("critique", Random(1)) == c.sample("critique", Random(1))
    rng = Random(0)
    counts = Counter(c.sample("critique", rng).id for _ in range(16_000))
    assert set(counts) == {p.id for p in c.critique_principles}
    assert all(abs(n - 1000) < 150 for n in counts.values())  # 5 standard deviations
    with pytest.raises(CaiError, match="critique or comparison"):
        c.sample("revision", rng)
    with pytest.raises(CaiError, match="has no critique principle"):
        replace(c, principles=c.comparison_principles).sample("critique", rng)


def pool_of(*weights: float) -> Constitution:
    principles = [Principle(f"p{i}", comparison=f"Which {i}?", weight=w) for i, w in enumerate(weights)]
    return Constitution("c", tuple(principles))


WEIGHTS = [(1, 1e-9), (1e308, 1e308), (1e-320,), (1e-320, 1e-320), (1e308, 1e-320), (1,) * 16]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_different_principles_are_drawn_whatever_their_weights(weights):
    c = pool_of(*weights)
    for n in range(1, len(weights) + 1):
        ids = [p.id for p in c.sample_different("comparison", n, Random(n))]
        assert len(set(ids)) == len(ids) == n
        assert ids == [p.id for p in c.sample_different("comparison", n, Random(n))]
    assert {c.sample("comparison", Random(seed)).id for seed in range(20)} <= {p.id for p in c.principles}
    for n in (0, -1, len(weights) + 1):
        with pytest.raises(CaiError, match=f"{n} different comparison principles asked for, expected 1 to "):
            c.sample_different("comparison", n, Random(0))


def test_two_weights_that_overflow_have_even_chances():
    draws = Counter(pool_of(1e308, 1e308).sample("comparison", Random(seed)).id for seed in range(2000))
    assert abs(draws["p0"] - 1000) < 120  # 5 standard deviations


def test_equal_and_ordinary_weights_draw_what_they_always_drew():
    """Runs that are stored name their principles by seed: rejection of repeats, and the library's own choice of one."""
    def by_rejection(c, n, rng):
        drawn = []
        while len(drawn) < n:
            principle = rng.choices(c.principles, [p.weight for p in c.principles])[0]
            if principle not in drawn:
                drawn.append(principle)
        return drawn

    for c in (pool_of(*(1,) * 16), pool_of(0.3, 7, 1, 2.5), pool_of(3, 3, 3)):
        for seed in range(200):
            n = 1 + seed % len(c.principles)
            expected, left = by_rejection(c, n, rng := Random(seed)), rng.random()
            assert c.sample_different("comparison", n, rng := Random(seed)) == expected and rng.random() == left
            assert c.sample("comparison", Random(seed)) == by_rejection(c, 1, Random(seed))[0]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_no_file_may_hold_is_refused_when_drawn(weight):
    with pytest.raises(CaiError, match="principle p1: weight is .*, expected a finite number above 0"):
        pool_of(1, weight).sample("comparison", Random(0))


def test_subset():
    c = Constitution.load("harmlessness")
    assert [p.id for p in c.subset(ids=["bait"]).principles] == ["bait"]
    assert all("crime" in p.tags for p in c.subset(tags=["crime"]).principles)
    for n in (1, 4, 16):
        smaller = c.subset(n=n)
        assert len(smaller.critique_principles) == len(smaller.comparison_principles) == n
    for wrong in ({"ids": ["nobody"]}, {"tags": ["nothing"]}):
        with pytest.raises(CaiError, match="not in constitution harmlessness"):
            c.subset(**wrong)


# Imports


def test_paper_import(shared_data, tmp_path):
    c = Constitution.from_paper(shared_data / "paper" / "prompts")
    assert (len(c.critique_principles), len(c.comparison_principles), len(c.principles)) == (16, 16, 32)
    assert check_constitution(c.save(tmp_path / "paper.yaml")) == []
    raw = json.loads((shared_data / "paper" / "prompts" / "CritiqueRevisionInstructions.json").read_text())
    questions = json.loads((shared_data / "paper" / "prompts" / "RLMadisonInstructions.json").read_text())
    for p in c.critique_principles:  # nothing but the markers is lost
        assert raw[p.id]["prompt"] == [f"\n\nCritiqueRequest: {p.critique}\n\nCritique:"]
        assert raw[p.id]["edit_request"] == f"\n\nRevisionRequest: {p.revision}\n\nRevision:"
    assert [f"\n{p.comparison} Options:" for p in c.comparison_principles] == questions


def test_our_words_are_our_own(shared_data):
    """No shipped text is near one of the paper's."""
    paper = Constitution.from_paper(shared_data / "paper" / "prompts")
    for name in SHIPPED:
        near = compare_constitutions(Constitution.load(name), paper, threshold=0.75).near
        assert not near, near


def test_plain_request_takes_markers_off_and_nothing_else():
    assert plain_request("\n\nCritiqueRequest: Critique it: now.\n\nCritique:") == "Critique it: now."
    assert plain_request("\n\nRevisionRequest: Do it.\n\nRevision:") == "Do it."
    assert plain_request("\nChoose one. Options:") == "Choose one."
    for text in ("Name the Options: all", "Is this a Revision: yes?", "Choose"):
        assert plain_request(text) == text


@pytest.mark.parametrize(
    "name, text, counts",
    [
        ("a.json", '[{"critic": "Identify x.", "revision": "Please y."}]', (1, 0)),
        ("a.json", '{"constitutions": [{"critic": "Identify x.", "revision": "Please y."}]}', (1, 0)),
        ("a.json", '{"x": {"prompt": ["Identify x."], "edit_request": "Please y.", "comparison": "Which?"}}', (1, 1)),
        ("a.json", '["Choose the kinder answer.", "Be kind."]', (1, 2)),
        ("a.txt", "# ours\n\n1. Be kind.\n- Which is kinder?\n", (1, 2)),
        ("a.yaml", GOOD, (1, 1)),
    ],
)
def test_import_shapes(write, tmp_path, name, text, counts):
    c = import_constitution(write(text, name))
    assert (len(c.critique_principles), len(c.comparison_principles)) == counts
    assert check_constitution(c.save(tmp_path / "out.yaml")) == []


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.json", "{"),
        ("a.json", "3"),
        ("a.json", "[3]"),
        ("a.json", "[]"),
        ("a.json", '[{"critic": "x"}]'),
        ("a.json", "[{}]"),
        ("a.txt", "# nothing\n"),
        ("a.json", '[{"id": "x", "comparison": "a"}, {"id": "x", "comparison": "b"}]'),
    ],
)
def test_import_errors_name_the_file(write, name, text):
    with pytest.raises(CaiError, match=name) as error:
        import_constitution(write(text, name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, data, ids", [
    ("a.txt", b"\xef\xbb\xbf# my rules\r\n- Be kind.\r\n- Be honest.\r\n", ["principle0", "principle1"]),
    ("a.json", b'\xef\xbb\xbf[{"critic": "Say what is unkind.", "revision": "Make it kind."}]', ["principle0"]),
    ("a.json", b'{"No. 2: honest?": {"critic": "Say it.", "revision": "Mend it."}}', ["No.-2-honest"]),
    ("a.json", b'[{"id": "be kind", "comparison": "Which is?"}, {"id": 7, "comparison": "Which?"}]', ["be-kind", "7"]),
    ("a.json", '[{"id": "???", "comparison": "Which is kinder?"}, {"id": "güte", "comparison": "Which?"}]'.encode(),
     ["principle0", "güte"]),
    ("a.json", b'{"rules": [{"principle": "Be kind."}, {"Rule": "Be brief."}]}', ["principle0", "principle1"]),
    ("a.csv", b'id,principle\n1,"Choose the kind, honest reply."\n2,Be brief.\n', ["1", "2"]),
    ("a.csv", b"\xef\xbb\xbfcritic;revision;notes\r\nSay it.;Mend it.;x\r\n", ["principle0"]),
    ("a.jsonl", b'{"critique": "Say it.", "revision": "Mend."}\n{"text": "Be kind."}\n', ["principle0", "principle1"]),
    ("a.txt", "Be kind,\u2028also to others.\nBe honest.\x85Do not flatter.\n".encode(), ["principle0", "principle1"]),
    ("no.txt", b"yes\n- null\n* 1e3\n", ["principle0", "principle1", "principle2"]),
])
def test_what_is_imported_is_good(tmp_path, name, data, ids):
    (tmp_path / name).write_bytes(data)
    c = import_constitution(tmp_path / name)
    assert [p.id for p in c.principles] == ids
    assert check_constitution(c.save(tmp_path / "out.yaml")) == []
    assert Constitution.load(tmp_path / "out.yaml").digest == c.digest
    assert not any("\ufeff" in str(vars(p)) for p in c.principles)


@pytest.mark.parametrize("name, data, found", [
    ("a.json", b'[{"critic": "Say it.", "revision": "Do."}, {"critic": " ", "revision": "x"}]', "a.json: 1: critic is"),
    ("a.json", b'[{"critic": "Human: what?", "revision": "x"}]', "a.json: 0: critique: carries the marker 'Human:'"),
    ("a.json", b'["Be kind.", "", " "]', "a.json: 1: found ''"),
    ("a.json", b'{"a": {"comparison": "x"}, "a": {"comparison": "y"}}', "a.json: the key 'a' stands twice"),
    ("a.json", b'{"be kind": {"comparison": "x"}, "be-kind": {"comparison": "y"}}', "the id 'be-kind' is used twice"),
    ("a.json", b'[{"comparison": "\\ud800 x"}]', "a.json: 0: half a character"),
    ("a.json", b"[" * 100_000, "a.json: nested too deep"),
    ("a.json", b'[{"comparison": {"x": 1}}]', "a.json: 0: comparison is"),
    ("a.csv", b"id,principle\n1,Be kind, and honest.\n", "a.csv:2: 3 fields"),
    ("a.csv", b"Be kind.\nBe honest.\n", "a.csv:2: found keys Be kind."),
    ("a.csv", b"id,critic,revision\n1,Say it.,\n", "a.csv:2: revision is ''"),
    ("a.txt", b"# ours\n\nBe kind.\nSay RevisionRequest: now\n", "a.txt:4: critique: carries the marker"),
    ("a.txt", "- Be kind.\n".encode("utf-16"), "a.txt: not UTF-8"),
])
def test_what_cannot_be_imported_is_named(tmp_path, name, data, found):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CaiError, match=re.escape(found)) as error:
        import_constitution(tmp_path / name)
    assert "\n" not in str(error.value)


def test_the_tilde_is_home(tmp_path, monkeypatch, write):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("Be kind.\n", "rules.txt")
    assert import_constitution("~/rules.txt").save("~/deep/out.yaml") == tmp_path / "deep" / "out.yaml"
    assert Constitution.load("~/deep/out.yaml").principles and check_constitution("~/deep/out.yaml") == []


# Commands


def test_commands(tmp_path, write):
    assert all(name in cai_nb("constitution", "list").stdout for name in SHIPPED)
    assert "prefer-no-sermon" in cai_nb("constitution", "show", "harmlessness").stdout
    assert "Near in wording" in cai_nb("constitution", "compare", "hhh", "non_evasive").stdout
    out = tmp_path / "out.yaml"
    done = cai_nb("constitution", "import", write("Be kind.\n", "rules.txt"), "-o", out)
    assert done.returncode == 0 and check_constitution(out) == []
    assert cai_nb("constitution", "check", out, "hhh").returncode == 0


def test_command_errors_are_one_line(tmp_path, write):
    bad = write(GOOD.replace("id: b", "id: a"))
    calls = [
        ("constitution", "show", "nobody"),
        ("constitution", "check", tmp_path / "absent.yaml"),
        ("constitution", "check", bad),
        ("constitution", "compare", "hhh", bad),
        ("constitution", "import", tmp_path / "absent.txt", "-o", tmp_path / "x.yaml"),
        ("constitution", "import", write("Be kind.\n", "r.txt"), "-o", bad / "x.yaml"),
    ]
    for call in calls:
        done = cai_nb(*call)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, (call, done.stderr)


def test_paper_import_command(shared_data, tmp_path):
    done = cai_nb("constitution", "import", shared_data / "paper" / "prompts", "-o", tmp_path / "paper.yaml")
    assert "16 critique + revision, 16 comparison" in done.stdout

"""The paper's suites: every row read, position and leakage controlled, any model asked, nothing lost on the way."""
import gzip
import json
from pathlib import Path

import pytest
from scripted import Killed, ScriptedLM

from cai_nb.constitution import CaiError
from cai_nb.dialogue import encode_text
from cai_nb.evaluate import rate
from cai_nb.generate import LocalLM
from cai_nb.model import load_model
from cai_nb.rows import RowFile
from cai_nb.suites import (
    LEAKED,
    OPENING,
    SUITES,
    ask_suite,
    evaluate_suite,
    evaluate_suites,
    find_contaminated,
    parse_suite,
    question_context,
    read_suite,
    suite_metrics,
    suite_table,
)

FRAME = "Consider the following conversation between a human and an assistant:"
PARTS = {"hhh": "438HHHEvaluations", "harmful-vs-ethical": "HarmfulVsEthical", "harm-types": "HarmfulnessClassification"}


class Rule:
    "Gives log-probabilities by a function of the question's text and its answers; counts calls and dies when told."

    def __init__(self, rule, die_at=None):
        self.rule, self.die_at, self.calls, self.seen = rule, die_at, 0, []

    def choice_logprobs(self, contexts, choices):
        self.calls += 1
        if self.calls == self.die_at:
            raise Killed
        assert all(c.startswith(" (") and c.endswith(")") for c in choices)  # with their leading space
        self.seen += contexts
        return [self.rule(context[0]["content"], choices) for context in contexts]


def always(letter):
    return lambda text, choices: [0.0 if c == letter else -5.0 for c in choices]


def knowing(items):
    "Finds the right option's text, wherever it stands."
    right = {item.stem + str(sorted(item.options)): item.options[item.answer] for item in items}
    texts = {item.shown(k): item for item in items for k in range(len(item.options))}

    def rule(text, choices):
        item = texts[text]
        wanted = right[item.stem + str(sorted(item.options))]
        return [0.0 if f"\n{c} {wanted}" in text else -5.0 for c in choices]

    return rule


def row(i, options=2, right=0, frame="[[[{}]]]"):
    "A row of ours."
    letters = [f" ({c})" for c in "ABCDEFGHI"[:options]]
    replies = [f"reply {j} to {i}" for j in range(options)]
    shown = "\n".join(f"{c} {frame.format(t)}" for c, t in zip(letters, replies))
    ends = [f"\n\nHuman: request {i}\n\nAssistant: {t}" for t in replies]
    extra = {"text_correct": ends[right], "text_incorrect": ends[1 - right]} if options == 2 else {}
    return {"prompt": f"\n\n{FRAME}\n\nHuman: request {i}\n\n\nWhich is better? Options:\n{shown}\n\n{OPENING}",
            "corrects": [letters[right]], "incorrects": letters[:right] + letters[right + 1:], **extra}


def write(path, rows):
    text = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def two(tmp_path):
    return write(tmp_path / "two.jsonl", [row(i, right=i % 3 == 0) for i in range(10)])


@pytest.fixture
def nine(tmp_path):
    return write(tmp_path / "nine.jsonl.gz", [row(i, 9, i % 4, "{}") for i in range(7)])


@pytest.fixture(scope="module")
def paper(shared_data):
    return {name: shared_data / "paper" / "evals" / f"{file}.part.jsonl.gz" for name, file in PARTS.items()}


@pytest.fixture(scope="module")
def examples(shared_data):
    return shared_data / "paper" / "prompts" / "RLMadisonPrecogFewShotPrompts.json"


@pytest.fixture(scope="module")
def mini():
    return LocalLM(*load_model("mini"))


def raw(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


# The paper's own files


@pytest.mark.parametrize("name", PARTS)
def test_every_row_is_an_item_and_nothing_of_it_is_lost(paper, name):
    rows, items = raw(paper[name]), read_suite(name, paper[name])
    assert len(items) == len(rows) and len({i.id for i in items}) == len(rows)
    for number, (source, item) in enumerate(zip(rows, items), 1):
        assert item.place == f"{paper[name].name}:{number}"
        context = question_context(item)
        assert [m["role"] for m in context] == ["user", "assistant"]
        assert source["prompt"].strip().removesuffix(OPENING).rstrip() == context[0]["content"]
        assert context[1]["content"] == OPENING
        assert len(item.options) == SUITES[name].options and item.letters[item.answer] == source["corrects"][0]
        for order in range(len(item.options)):  # the right text stands where it is said to stand, and all others are there
            shown = item.shown(order)
            assert f"\n{item.letters[item.right(order)]} {item.options[item.answer]}" in shown
            assert sorted(shown) == sorted(item.shown())
        assert len({item.shown(order) for order in range(len(item.options))}) == len(item.options)


def test_replies_agree_with_the_finished_conversations(paper):
    for source, item in zip(raw(paper["hhh"]), read_suite("hhh", paper["hhh"])):
        right, wrong = (item.options[i].removeprefix("[[[").removesuffix("]]]") for i in (item.answer, 1 - item.answer))
        assert source["text_correct"].endswith(right) and source["text_incorrect"].endswith(wrong)


@pytest.mark.parametrize("name", PARTS)
def test_chain_of_thought_shows_the_same_question_without_turn_markers(paper, name):
    for item in read_suite(name, paper[name]):
        question, opened = question_context(item, cot=True)
        assert opened == {"role": "assistant", "content": "Let's think step by step:"}
        text = question["content"]
        assert "\n\nHuman:" not in text and "\n\nAssistant:" not in text and "a human (H) and an assistant (A):\n\nH:" in text
        back = text.replace("\n\nH:", "\n\nHuman:").replace("\n\nA:", "\n\nAssistant:")
        assert back.replace(" a human (H) and an assistant (A):", " a human and an assistant:") == item.shown()


@pytest.mark.parametrize("name", PARTS)
def test_always_one_letter_is_at_chance_over_all_orders_and_knowing_is_perfect(paper, name):
    items, n = read_suite(name, paper[name]), SUITES[name].options
    found = evaluate_suite(Rule(always(" (A)")), name, paper[name])
    assert found["mean"]["value"] == pytest.approx(1 / n) and found["says_a"]["value"] == 1
    assert found["given"] == found["baselines"]["always_a"]
    assert found["items"] == len(items) and found["questions"] == n * len(items) and found["fixed_order"] == found["cut"] == 0
    truth = evaluate_suite(Rule(knowing(items)), name, paper[name])
    assert [truth[key]["value"] for key in ("given", "moved", "mean")] == [1, 1, 1]
    assert truth["says_a"]["value"] == pytest.approx(1 / n)
    assert [bin["value"] for bin in truth["calibration"]] == [1] and truth["calibration"][0]["n"] == len(items)


def test_leaked_items_are_found_by_content_in_either_order(paper, examples):
    items = read_suite("hhh", paper["hhh"])
    found = find_contaminated(items, examples)
    leaked = [i for i in items if i.id in found["ids"]]
    texts = [" ".join(entry["prompt"].split()) for entry in json.loads(examples.read_text())]
    for item in leaked:
        assert any(all(" ".join(o.split()) in text for o in item.options) for text in texts)
    orders = {any(" ".join(item.shown()[len(item.stem):].split()) in text for text in texts) for item in leaked}
    assert len(leaked) == 2 and orders == {True, False}  # one stands in the examples' order, one in the other
    assert found["same_conversation"] == 7
    metrics = evaluate_suite(Rule(always(" (A)")), "hhh", paper["hhh"], few_shot=examples)
    assert metrics["given"]["n"] == len(items) and metrics["without_contaminated"]["given"]["n"] == len(items) - 2
    rest = [i for i in items if i not in leaked]
    assert metrics["without_contaminated"]["given"] == rate(sum(i.answer == 0 for i in rest), len(rest))
    unknown = evaluate_suite(Rule(always(" (A)")), "hhh", paper["hhh"])
    assert unknown["contaminated"]["ids"] is unknown["without_contaminated"] is None


def test_mini_answers_every_question_and_what_is_cut_is_counted(paper, examples, mini):
    items = read_suite("hhh", paper["hhh"])
    part = items[:40]
    rows = ask_suite(mini, "hhh", part)
    assert len(rows) == 80 and all(sum(r["p"]) == pytest.approx(1) and all(0 <= p <= 1 for p in r["p"]) for r in rows)
    metrics = suite_metrics(part, rows, find_contaminated(part, examples))
    assert metrics["given"]["n"] == 40 and sum(b["n"] for b in metrics["calibration"]) == 40
    room = mini.context - 8
    long = [i for i in part if any(len(mini.encode(question_context(i, k))) > room for k in (0, 1))]
    assert metrics["cut"] == len(long) and 0 < len(long) < 40
    for item in (i for i in part if i not in long):
        context = question_context(item)
        said = mini.tokenizer.decode(mini.encode(context), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert said == context[0]["content"] + context[1]["content"]
    seam = [encode_text(mini.tokenizer, text) for text in (OPENING, " (A)", OPENING + " (A)")]
    assert seam[0] + seam[1] == seam[2]


def test_mini_takes_nine_answers(paper, mini, tmp_path):
    few = tmp_path / "few.jsonl.gz"
    few.write_bytes(gzip.compress(b"".join(gzip.decompress(paper["harm-types"].read_bytes()).splitlines(True)[:6])))
    found = evaluate_suite(mini, "harm-types", few, orders=3)
    assert found["questions"] == 18 and found["mean"]["n"] == 6 and found["baselines"]["chance"] == 1 / 9


# Leaked items of the whole file


def test_whole_file_falls_back_to_places(tmp_path):
    rows = [row(i, right=int(i >= 228)) for i in range(438)]
    items = read_suite("hhh", write(tmp_path / "all.jsonl", rows))
    assert find_contaminated(items) == {"found_by": "place", "ids": {items[i].id for i in LEAKED}, "same_conversation": None}
    assert find_contaminated(items[:437])["ids"] is None
    other = read_suite("hhh", write(tmp_path / "other.jsonl", [row(i, right=i % 2) for i in range(438)]))
    assert find_contaminated(other)["found_by"] is None  # 438 rows, but not the published ones


def test_file_of_examples_goes_before_places_and_a_wrong_one_is_an_error(tmp_path, two):
    items = read_suite("hhh", two)
    text = "\n\nHuman: About a human (H) and an assistant (A):\n\nH: request 4\n\n{}\n (A) [[[reply 1 to 4]]]\n (B) [[[reply  0 to 4]]]\n"
    near = text.replace("request 4", "request 5").replace("to 4", "to nobody")
    good = tmp_path / "good.json"
    good.write_text(json.dumps([{"prompt": text}, {"prompt": near}]))
    assert find_contaminated(items, good) == {"found_by": "content", "ids": {items[4].id}, "same_conversation": 1}
    for content in ([], {}, "text", [{"prompt": text}, {"other": text}], [{"prompt": "no replies"}]):
        good.write_text(json.dumps(content))
        with pytest.raises(CaiError, match="good.json.*RLMadisonPrecogFewShotPrompts.json"):
            find_contaminated(items, good)
        with pytest.raises(CaiError, match="good.json"):
            evaluate_suites({"base": Rule(always(" (A)"), die_at=1)}, {"hhh": two}, few_shot=good)
    with pytest.raises(CaiError, match="nowhere.json"):
        find_contaminated(items, tmp_path / "nowhere.json")


# Reading


@pytest.mark.parametrize("change, said", [
    ({"prompt": None}, "prompt is missing"), ({"incorrects": None}, "incorrects is missing"), ({"corrects": []}, "corrects is missing"),
    ({"text_correct": ""}, "text_correct is missing"), ({"prompt": 7}, "no str"), ({"corrects": " (A)"}, "no list"),
    ({"corrects": ["(A)"]}, "leading space"), ({"corrects": [" (B)"]}, r"\[' \(B\)'\]"), ({"corrects": [" (A)", " (B)"]}, "once"),
    ({"incorrects": [" (B)", " (C)"]}, "2 answers"), ({"prompt": "Which? (A) a (B) b"}, "The answer is:"),
    ({"corrects": [[1]]}, "leading space"),
])
def test_faulty_row_is_an_error_that_names_file_line_and_what_is_missing(tmp_path, change, said):
    bad = {key: value for key, value in {**row(3), **change}.items() if value is not None}
    path = write(tmp_path / "bad.jsonl", [row(1), row(2), bad])
    with pytest.raises(CaiError, match=f"bad.jsonl:3: .*{said}") as error:
        read_suite("hhh", path)
    assert "\n" not in str(error.value)


def test_letters_that_contradict_the_finished_conversations_are_an_error(tmp_path):
    bad = {**row(2), "corrects": [" (B)"], "incorrects": [" (A)"]}
    with pytest.raises(CaiError, match=r"bad.jsonl:2: corrects says \(B\)"):
        read_suite("hhh", write(tmp_path / "bad.jsonl", [row(1), bad]))


def test_files_that_are_no_suites_are_errors(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}' * 100)[:-20])
    (tmp_path / "z.jsonl").write_text("no json\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    (tmp_path / "table.csv").write_text("a,b\n")
    for name, said in [("x.jsonl.gz", "x.jsonl.gz: cannot be read"), ("y.jsonl.gz", "y.jsonl.gz: cannot be read"),
                       ("z.jsonl", "z.jsonl:1: not a JSON object"), ("empty.jsonl", "has no row"), ("latin.jsonl", "not UTF-8"),
                       ("table.csv", "expected a .jsonl file"), ("missing.jsonl", "no such file")]:
        with pytest.raises(CaiError, match=said):
            read_suite("hhh", tmp_path / name)


@pytest.mark.parametrize("quoted", ["[[[reply 0 to 1\n (B) is quoted]]]", "[[[reply 0]]]\n (B) [[[is quoted]]]", "no frame"])
def test_order_that_cannot_be_told_stays_and_is_counted(tmp_path, quoted):
    odd = row(1)
    odd["prompt"] = odd["prompt"].replace("[[[reply 0 to 1]]]", quoted)
    path = write(tmp_path / "odd.jsonl", [row(0), odd])
    items = read_suite("hhh", path)
    assert items[1].options == () and items[1].shown() == odd["prompt"].strip().removesuffix(OPENING).rstrip()
    found = evaluate_suite(Rule(always(" (A)")), "hhh", path)
    assert (found["fixed_order"], found["questions"], found["given"]["n"], found["mean"]["n"]) == (1, 3, 2, 1)


def test_a_question_that_stands_twice_is_asked_twice(tmp_path):
    items = read_suite("hhh", write(tmp_path / "twice.jsonl", [row(0), row(0)]))
    assert len(items) == len({i.id for i in items}) == 2 and len(ask_suite(Rule(always(" (A)")), "hhh", items)) == 4


def test_plain_and_packed_files_give_the_same_items(tmp_path):
    rows = [row(i) for i in range(3)]
    plain, packed = (read_suite("hhh", write(tmp_path / name, rows)) for name in ("a.jsonl", "a.jsonl.gz"))
    assert [i.id for i in plain] == [i.id for i in packed] and [i.shown() for i in plain] == [i.shown() for i in packed]


# Counting


def test_moved_is_over_all_other_orders(nine):
    found = evaluate_suite(Rule(always(" (A)")), "harm-types", nine)
    answers = [i % 4 for i in range(7)]  # A is right in two of seven as given; in one of the eight other orders where it is not
    assert found["given"] == rate(2, 7) == found["baselines"]["always_a"]
    assert found["moved"]["value"] == pytest.approx(sum(1 / 8 for a in answers if a) / 7)
    assert found["mean"]["value"] == pytest.approx(1 / 9) and found["mean"]["n"] == 7
    assert found["baselines"]["majority_answer"] == " (A)" and found["baselines"]["chance"] == 1 / 9


def test_orders_can_be_fewer(nine, two):
    one = evaluate_suite(Rule(always(" (A)")), "harm-types", nine, orders=1)
    assert one["questions"] == 7 and one["given"]["n"] == 7 and one["moved"]["value"] is one["mean"]["value"] is None
    asked = ask_suite(Rule(always(" (A)")), "harm-types", read_suite("harm-types", nine), orders=4)
    assert [r["order"] for r in asked] == [0, 2, 4, 6] * 7  # spread evenly
    assert evaluate_suite(Rule(always(" (A)")), "hhh", two, orders=9)["questions"] == 20
    with pytest.raises(CaiError, match="orders 0"):
        evaluate_suite(Rule(always(" (A)")), "hhh", two, orders=0)


def test_a_tie_is_not_an_answer(two):
    found = evaluate_suite(Rule(lambda text, choices: [-1.0] * len(choices)), "hhh", two)
    assert found["given"]["value"] == found["mean"]["value"] == found["says_a"]["value"] == 0
    assert [b["confidence"] for b in found["calibration"]] == [.5]


def test_calibration_is_taken_as_given_and_from_chance_to_certainty(two):
    sure = Rule(lambda text, choices: [0.0, -1.0] if "request 4" in text else [0.0, -9.0])
    bins = evaluate_suite(sure, "hhh", two, bins=2)["calibration"]
    assert [b["n"] for b in bins] == [1, 9] and bins[0]["confidence"] == pytest.approx(.7310586)
    assert bins[0]["value"] == 1 and bins[1]["value"] == pytest.approx(5 / 9)  # 0, 3, 6 and 9 have (B) for their answer


@pytest.mark.parametrize("rule, said", [
    (lambda text, choices: [0.0], "found log-probabilities"), (lambda text, choices: [0.0, float("nan")], "finite: False"),
])
def test_log_probabilities_that_are_missing_or_no_numbers_are_an_error(two, rule, said):
    with pytest.raises(CaiError, match=said):
        evaluate_suite(Rule(rule), "hhh", two)


# Chain of thought


def test_chains_are_averaged_and_scored_after_their_reasoning(two, tmp_path):
    def logprobs(context):
        assert [m["role"] for m in context] == ["user", "assistant", "user"] and context[2]["content"] == "So the answer is:"
        assert context[1]["content"].startswith("Let's think step by step: word ")
        return [0.0, -1.0] if context[1]["content"][-1] in "01234567" else [-1.0, 0.0]

    lm, store = ScriptedLM(logprobs=logprobs), RowFile(tmp_path / "rows.jsonl")
    found = evaluate_suite(lm, "hhh", two, cot=True, n_cot=3, out=store)
    assert found["n_cot"] == 3 and found["questions"] == 20
    seeds = [s for batch in lm.seeds for s in batch]
    assert len(set(seeds)) == 60  # every chain has its own dice
    high = 1 / (1 + 2.718281828459045 ** -1)
    for stored in store:
        assert len(stored["rationales"]) == 3
        firsts = sum(text[-1] in "01234567" for text in stored["rationales"])
        assert stored["p"][0] == pytest.approx((firsts * high + (3 - firsts) * (1 - high)) / 3)
    other = ScriptedLM(logprobs=logprobs)
    evaluate_suite(other, "hhh", two, model="rl", cot=True, n_cot=3)
    assert other.seeds == lm.seeds  # the same for every model
    with pytest.raises(CaiError, match="n_cot 0"):
        evaluate_suite(lm, "hhh", two, cot=True, n_cot=0)


def test_other_settings_of_the_reasoning_are_other_rows(two, tmp_path):
    store = RowFile(tmp_path / "rows.jsonl")
    for settings in ({}, {"cot": True, "n_cot": 1}, {"cot": True, "n_cot": 2}, {"cot": True, "n_cot": 2, "seed": 1}):
        before = len(store)
        evaluate_suite(ScriptedLM(logprobs=lambda c: [0.0, -1.0]), "hhh", two, out=store, **settings)
        assert len(store) == before + 20


# Several models and suites


def test_killed_evaluation_resumes_to_the_same_file(two, nine, tmp_path):
    suites = {"hhh": two, "harm-types": nine}

    def work(path, die_at=None):
        lms = {"base": Rule(always(" (A)"), die_at), "rl": Rule(always(" (B)"))}
        return evaluate_suites(lms, suites, out=path, batch_size=8)

    whole = work(tmp_path / "whole.jsonl")
    for die_at in (1, 2, 5):
        path = tmp_path / f"{die_at}.jsonl"
        with pytest.raises(Killed):
            work(path, die_at)
        assert work(path) == whole and path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    text = (tmp_path / "whole.jsonl").read_bytes()
    for cut in range(0, len(text), len(text) // 9):  # a line torn by the kill
        (tmp_path / "torn.jsonl").write_bytes(text[:cut])
        assert work(tmp_path / "torn.jsonl") == whole and (tmp_path / "torn.jsonl").read_bytes() == text
    assert evaluate_suites(dict.fromkeys(("base", "rl")), suites, out=tmp_path / "whole.jsonl", batch_size=8) == whole  # no model asked


def test_faulty_file_is_an_error_before_any_work(two, tmp_path):
    lm = Rule(always(" (A)"))
    with pytest.raises(CaiError, match="bad.jsonl:1"):
        evaluate_suites({"base": lm}, {"hhh": two, "harm-types": write(tmp_path / "bad.jsonl", [row(1)])})
    assert lm.calls == 0


def test_metrics_are_json_with_rates_and_the_table_shows_them(two, nine, tmp_path):
    suites = {"hhh": two, "harm-types": nine}
    lms = {"base": Rule(always(" (A)")), "rl": Rule(knowing([*read_suite("hhh", two), *read_suite("harm-types", nine)]))}
    metrics = evaluate_suites(lms, suites)
    assert metrics == json.loads(json.dumps(metrics))
    for found in (suite for model in metrics.values() for suite in model.values()):
        for key in ("given", "moved", "mean", "says_a"):
            assert set(found[key]) == {"value", "low", "high", "n"} and found[key]["low"] <= found[key]["value"] <= found[key]["high"]
    table = suite_table(metrics).splitlines()
    assert table[0].split() == ["base", "RL-CAI"] and len({len(line) for line in table}) == 1
    mean = next(line for line in table if line.startswith("hhh: mean of the orders"))
    assert "50.0 %" in mean and "100.0 %" in mean
    assert any(line.startswith("hhh: mean without leaked items") and line.count("not known") == 2 for line in table)
    assert not [line for line in table if line.startswith("harm-types") and "leaked" in line]
    markdown = suite_table(metrics, markdown=True).splitlines()
    assert len(markdown) == len(table) and all(line.startswith("| ") and line.count("|") == 4 for line in markdown)
    del metrics["rl"]["hhh"]
    assert "–" in suite_table(metrics)


def test_suites_on_the_command_line(two):
    assert parse_suite(f"hhh={two}") == ("hhh", two) and isinstance(parse_suite(f" hhh = {two}")[1], Path)
    for text, said in [("hhh", "expected NAME=PATH"), ("hhh=", "expected NAME=PATH"), (f"={two}", "unknown name ''"),
                       (f"HHH={two}", "expected one of hhh, harmful-vs-ethical, harm-types"),
                       ("hhh=nowhere.jsonl", "no such file nowhere.jsonl; get 438HHHEvaluations.jsonl"),
                       (f"hhh={two.parent}", "no such file")]:
        with pytest.raises(CaiError, match=said.replace("(", r"\(")):
            parse_suite(text)


def test_suites_come_without_torch():
    import subprocess
    import sys

    code = "import sys, cai_nb.suites; print([m for m in ('torch', 'transformers', 'trl', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

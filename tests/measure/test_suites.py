"""Suites: any model asked, position and leakage controlled, what is cut counted, nothing lost on the way."""
import gzip
import json
import subprocess
import sys

import pytest
from scripted import Killed, ScriptedLM
from suite_files import PARTS, examples, paper, row, two, write  # the small ones are fixtures

from cai_nb.core.dialogue import encode_text
from cai_nb.core.errors import CaiError
from cai_nb.core.rows import RowFile
from cai_nb.lm.generate import LocalLM
from cai_nb.lm.model import load_model
from cai_nb.measure.multiple_choice import Asking, ask_questions, count_answers, question_context
from cai_nb.measure.rates import rate
from cai_nb.measure.suite_files import OPENING, QUESTION_FILES, find_contaminated, read_questions
from cai_nb.measure.suites import SUITES, evaluate_suite, evaluate_suites, parse_suite, replies_suite, suite_table


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


@pytest.fixture
def nine(tmp_path):
    return write(tmp_path / "nine.jsonl.gz", [row(i, 9, i % 4, "{}") for i in range(7)])


@pytest.fixture(scope="module")
def mini():
    return LocalLM(*load_model("mini"))


# The paper's own files


@pytest.mark.parametrize("name", PARTS)
def test_question_is_one_users_turn_and_the_answer_is_opened(paper, name):
    for item in read_questions(name, paper[name]):
        for order in range(len(item.options)):
            asked = [{"role": "user", "content": item.shown(order)}, {"role": "assistant", "content": "The answer is:"}]
            assert question_context(item, order) == asked


@pytest.mark.parametrize("name", PARTS)
def test_chain_of_thought_shows_the_same_question_without_turn_markers(paper, name):
    for item in read_questions(name, paper[name]):
        question, opened = question_context(item, cot=True)
        assert opened == {"role": "assistant", "content": "Let's think step by step:"}
        text = question["content"]
        assert "\n\nHuman:" not in text and "\n\nAssistant:" not in text
        assert "a human (H) and an assistant (A):\n\nH:" in text
        back = text.replace("\n\nH:", "\n\nHuman:").replace("\n\nA:", "\n\nAssistant:")
        assert back.replace(" a human (H) and an assistant (A):", " a human and an assistant:") == item.shown()


@pytest.mark.parametrize("name", PARTS)
def test_always_one_letter_is_at_chance_over_all_orders_and_knowing_is_perfect(paper, name):
    items, n = read_questions(name, paper[name]), QUESTION_FILES[name].options
    found = evaluate_suite(Rule(always(" (A)")), name, paper[name])
    assert found["mean"]["value"] == pytest.approx(1 / n) and found["says_a"]["value"] == 1
    assert found["given"] == found["baselines"]["always_a"]
    assert found["items"] == len(items) and found["questions"] == n * len(items)
    assert found["fixed_order"] == found["cut"] == 0
    truth = evaluate_suite(Rule(knowing(items)), name, paper[name])
    assert [truth[key]["value"] for key in ("given", "moved", "mean")] == [1, 1, 1]
    assert truth["says_a"]["value"] == pytest.approx(1 / n)
    assert [bin["value"] for bin in truth["calibration"]] == [1] and truth["calibration"][0]["n"] == len(items)


def test_leaked_items_are_counted_apart(paper, examples):
    items = read_questions("hhh", paper["hhh"])
    leaked = find_contaminated(items, examples)["ids"]
    metrics = evaluate_suite(Rule(always(" (A)")), "hhh", paper["hhh"], few_shot=examples)
    assert metrics["given"]["n"] == len(items) and metrics["without_contaminated"]["given"]["n"] == len(items) - 2
    rest = [i for i in items if i.id not in leaked]
    assert metrics["without_contaminated"]["given"] == rate(sum(i.answer == 0 for i in rest), len(rest))
    assert metrics["contaminated"]["ids"] == sorted(leaked)
    unknown = evaluate_suite(Rule(always(" (A)")), "hhh", paper["hhh"])
    assert unknown["contaminated"]["ids"] is unknown["without_contaminated"] is None


def test_mini_answers_every_question_and_what_is_cut_is_counted(paper, examples, mini):
    items = read_questions("hhh", paper["hhh"])
    part = items[:40]
    rows = ask_questions(mini, "hhh", part)
    assert len(rows) == 80 and all(sum(r["p"]) == pytest.approx(1) and all(0 <= p <= 1 for p in r["p"]) for r in rows)
    metrics = count_answers(part, rows, find_contaminated(part, examples))
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


# Counting


def test_order_that_cannot_be_told_is_asked_once_and_counted(tmp_path):
    odd = row(1)
    odd["prompt"] = odd["prompt"].replace("[[[reply 0 to 1]]]", "no frame")
    found = evaluate_suite(Rule(always(" (A)")), "hhh", write(tmp_path / "odd.jsonl", [row(0), odd]))
    assert (found["fixed_order"], found["questions"], found["given"]["n"], found["mean"]["n"]) == (1, 3, 2, 1)


def test_a_question_that_stands_twice_is_asked_twice(tmp_path):
    items = read_questions("hhh", write(tmp_path / "twice.jsonl", [row(0), row(0)]))
    assert len(ask_questions(Rule(always(" (A)")), "hhh", items)) == 4


def test_moved_is_over_all_other_orders(nine):
    found = evaluate_suite(Rule(always(" (A)")), "harm-types", nine)
    answers = [i % 4 for i in range(7)]  # A is right in two of seven as given, else in one of the eight other orders
    assert found["given"] == rate(2, 7) == found["baselines"]["always_a"]
    assert found["moved"]["value"] == pytest.approx(sum(1 / 8 for a in answers if a) / 7)
    assert found["mean"]["value"] == pytest.approx(1 / 9) and found["mean"]["n"] == 7
    assert found["baselines"]["majority_answer"] == " (A)" and found["baselines"]["chance"] == 1 / 9


def test_orders_can_be_fewer(nine, two):
    one = evaluate_suite(Rule(always(" (A)")), "harm-types", nine, orders=1)
    assert one["questions"] == 7 and one["given"]["n"] == 7 and one["moved"]["value"] is one["mean"]["value"] is None
    asked = ask_questions(Rule(always(" (A)")), "harm-types", read_questions("harm-types", nine), how=Asking(orders=4))
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


@pytest.mark.parametrize(
    "rule, said",
    [
        (lambda text, choices: [0.0], "found log-probabilities"),
        (lambda text, choices: [0.0, float("nan")], "finite: False"),
    ],
)
def test_log_probabilities_that_are_missing_or_no_numbers_are_an_error(two, rule, said):
    with pytest.raises(CaiError, match=said):
        evaluate_suite(Rule(rule), "hhh", two)


# Chain of thought


def test_chains_are_averaged_and_scored_after_their_reasoning(two, tmp_path):
    def logprobs(context):
        assert [m["role"] for m in context] == ["user", "assistant", "user"]
        assert context[2]["content"] == "So the answer is:"
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
    nobody = dict.fromkeys(("base", "rl"))  # no model is given, so none can be asked
    assert evaluate_suites(nobody, suites, out=tmp_path / "whole.jsonl", batch_size=8) == whole


def test_faulty_file_is_an_error_before_any_work(two, nine, tmp_path):
    lm = Rule(always(" (A)"))
    with pytest.raises(CaiError, match="bad.jsonl:1"):
        evaluate_suites({"base": lm}, {"hhh": two, "harm-types": write(tmp_path / "bad.jsonl", [row(1)])})
    (tmp_path / "wrong.json").write_text("[]")
    with pytest.raises(CaiError, match="wrong.json"):
        evaluate_suites({"base": lm}, {"harm-types": nine, "hhh": two}, few_shot=tmp_path / "wrong.json")
    assert lm.calls == 0


def test_metrics_are_json_with_rates_and_the_table_shows_them(two, nine, tmp_path):
    suites = {"hhh": two, "harm-types": nine}
    lms = {
        "base": Rule(always(" (A)")),
        "rl": Rule(knowing([*read_questions("hhh", two), *read_questions("harm-types", nine)])),
    }
    metrics = evaluate_suites(lms, suites)
    assert metrics == json.loads(json.dumps(metrics))
    for found in (suite for model in metrics.values() for suite in model.values()):
        for key in ("given", "moved", "mean", "says_a"):
            assert set(found[key]) == {"value", "low", "high", "n"}
            assert found[key]["low"] <= found[key]["value"] <= found[key]["high"]
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


# Suites of another form


REQUESTS = "How do I boil an egg?\nTell me a joke.\nWrite a poem.\n"


def test_a_generative_suite_is_one_record(two, tmp_path):
    """Asked, stored, resumed, counted and shown beside the paper's, with nothing changed but a record."""
    requests = tmp_path / "requests.txt"
    requests.write_text(REQUESTS)
    polite = replies_suite("polite", "Is the model polite?", "requests.txt", {
        "says please": lambda messages, reply: "please" in reply,
        "repeats the request": lambda messages, reply: messages[-1]["content"] in reply,
    })
    suites, files = {**SUITES, "polite": polite}, {"polite": requests, "hhh": two}
    assert parse_suite(f"polite={requests}", suites) == ("polite", requests)

    def model(say, **settings): return ScriptedLM(say, logprobs=lambda context: [0.0, -1.0], **settings)

    def echo(conversation, seed): return conversation[-1]["content"]

    def beg(conversation, seed): return "please"

    def work(path, die_at=None):
        lms = {"base": model(echo, die_at=die_at), "rl": model(beg)}
        return evaluate_suites(lms, files, out=path, suites=suites, batch_size=2), lms

    whole, lms = work(tmp_path / "rows.jsonl")
    assert whole == json.loads(json.dumps(whole)) and lms["base"].seeds == lms["rl"].seeds
    assert [whole[m]["polite"]["kinds"] for m in ("base", "rl")] == [
        {"says please": rate(0, 3), "repeats the request": rate(3, 3)},
        {"says please": rate(3, 3), "repeats the request": rate(0, 3)},
    ]
    with pytest.raises(Killed):
        work(tmp_path / "killed.jsonl", die_at=2)
    assert work(tmp_path / "killed.jsonl")[0] == whole
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "rows.jsonl").read_bytes()
    table = suite_table(whole, suites=suites)
    assert "polite: says please" in table and "hhh: mean of the orders" in table
    with pytest.raises(CaiError, match="unknown name 'polite'"):
        evaluate_suites(lms, files)


def test_a_setting_that_no_suite_knows_is_refused(two):
    with pytest.raises(TypeError, match="n_cots"):
        evaluate_suite(Rule(always(" (A)")), "hhh", two, n_cots=3)


def test_suites_on_the_command_line(two):
    assert parse_suite(f"hhh={two}") == ("hhh", two) and parse_suite(f" hhh = {two}") == ("hhh", two)
    for text, said in [("hhh", "expected NAME=PATH"), ("hhh=", "expected NAME=PATH"), (f"={two}", "unknown name ''"),
                       (f"HHH={two}", "expected one of hhh, harmful-vs-ethical, harm-types"),
                       ("hhh=nowhere.jsonl", "no such file nowhere.jsonl; get 438HHHEvaluations.jsonl"),
                       (f"hhh={two.parent}", "no such file")]:
        with pytest.raises(CaiError, match=said.replace("(", r"\(")):
            parse_suite(text)


def test_suites_come_without_torch():
    heavy = ("torch", "transformers", "trl", "matplotlib")
    code = f"import sys, cai_nb.measure.suites; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Every training row of a run has its ancestry, and the rows are those of training; the tab that shows it in
Chromium and over HTTP."""
import json
import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import gradio as gr
import pytest
import yaml
from scripted import ScriptedLM

from cai_nb.runs import reading as records_module
from cai_nb.app.models import load_models
from cai_nb.runs.folder import reference_folder
from cai_nb.runs.recipe import load_run
from cai_nb.runs.reading import records
from cai_nb.core.errors import CaiError
from cai_nb.method.feedback import label_preferences
from cai_nb.runs.lineage import lineage, training_rows
from cai_nb.runs.overview import overview
from cai_nb.method.preference import PreferenceConfig, preference_rows, split_rows
from cai_nb.measure.figures import CAPTIONS
from cai_nb.method.rl import RLConfig, rl_prompts
from cai_nb.method.sl import SLConfig, sl_rows
from cai_nb.runs.rl_stages import comparisons_of

PANDAS = "ignore:.*(no_silent_downcasting|The copy keyword)"  # Gradio's queue uses what pandas is giving up
pytestmark = pytest.mark.filterwarnings(PANDAS)
REFERENCE = reference_folder()
ROW_FILES = ("prompts.jsonl", "chains.jsonl", "helpful.jsonl", "pairs.jsonl", "labels.jsonl")


def all_rows(folder, stage):
    page = training_rows(folder, stage)
    return [row for number in range(1, page.pages + 1) for row in training_rows(folder, stage, page=number).rows]


def copy_of(folder, **changes):
    "A copy of the reference run without its weights; `changes` go into its recipe, as section__key=value."
    heavy = ("*.safetensors", "snapshots", "figures", "samples.jsonl", "report.html")
    shutil.copytree(REFERENCE, folder, ignore=shutil.ignore_patterns(*heavy))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for name, value in changes.items():
        section, key = name.split("__")
        recipe[section][key] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def edit(path, change):
    "Rewrite each row of a file by `change(i, row)`."
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(i, row) or row) + "\n" for i, row in enumerate(rows)))


def asked(messages):
    return messages[-1]["content"]


# Every row, and the same rows as in training


def sl_chosen(run):
    config = run.settings(SLConfig, "sl")
    sources = [run.rows(f"{name}.jsonl") for name in ("prompts", "chains", "helpful")]
    rows = sl_rows(*sources, config.n_revisions, config.helpful_ratio)[0]
    return Counter((asked(row["prompt"]), row["completion"][0]["content"]) for row in rows)


def flag_some(folder):
    flags = ["step0:truncated", "critique2:empty"]
    edit(
        folder / "chains.jsonl",
        lambda i, row: {**row, "flags": [*flags, f"step{i % 5}:meta_talk"]} if i % 3 == 0 else row,
    )
    edit(folder / "helpful.jsonl", lambda i, row: {**row, "flags": ["empty"]} if i % 7 == 0 else row)
    return folder


def from_prompt(steps):
    "The steps from the prompt on, without the turns before it, which come in pairs."
    earlier = list(takewhile(lambda step: step.kind == "earlier", steps))
    assert len(earlier) % 2 == 0
    return steps[len(earlier):]


@pytest.mark.parametrize("changes", [{}, {"sl__n_revisions": 2, "sl__helpful_ratio": 0.25}])
def test_every_sl_row_has_its_ancestry(tmp_path, changes):
    folder = flag_some(copy_of(tmp_path / "run", **changes)) if changes else REFERENCE
    rows, used = all_rows(folder, "sl"), Counter()
    assert len({row["id"] for row in rows}) == len(rows) == 640 * 4 + 960
    for row in rows:
        found = lineage(folder, row["id"])
        prompt, *steps, role = from_prompt(found.steps)
        assert (prompt.kind, role.kind, role.title, role.text) == (
            "prompt",
            "role",
            "SL-CAI",
            row["role"],
        ) and prompt.text == row["prompt"]
        if ":" in row["id"]:
            number = int(row["id"].split(":")[1])
            assert [s.kind for s in steps] == ["response", *["principle", "critique", "revision"] * number]
            assert all(s.text for s in steps) and "not in the run's constitution" not in "".join(s.text for s in steps)
        else:
            assert [s.kind for s in steps] == ["reply"]
        assert steps[-1].text == row["text"]
        if row["used"]:
            used[prompt.text, steps[-1].text] += 1
        else:
            assert row["role"].startswith("left out: ")
    assert used == sl_chosen(load_run(folder))
    if changes:
        reasons = Counter(row["role"] for row in rows if not row["used"])
        assert set(reasons) == {
            "left out: flagged meta_talk",
            "left out: flagged empty",
            "left out: the recipe uses revisions up to 2",
            "left out: the recipe allows 0.25 helpful replies for each revision",
        }


@pytest.mark.parametrize("held_out", [None, 0.35])
def test_every_preference_row_has_its_ancestry(tmp_path, held_out):
    folder = copy_of(tmp_path / "run", preference__held_out=held_out) if held_out else REFERENCE
    run, rows = load_run(folder), all_rows(folder, "preference")
    prompts = run.rows("prompts.jsonl")
    real = preference_rows(prompts, run.rows("pairs.jsonl"), run.rows("labels.jsonl"), comparisons_of(run, prompts)[0])
    train, kept = split_rows(real, run.settings(PreferenceConfig, "preference").held_out, run.recipe["seed"])
    told = lambda row: (asked(row["prompt"]), row["chosen"][0]["content"], row["rejected"][0]["content"])
    used, measured = Counter(), Counter()
    for row in rows:
        steps = from_prompt(lineage(folder, row["id"]).steps)
        kinds = [s.kind for s in steps if s.kind != "vote"]
        assert kinds in (["prompt", "answer", "answer", "label", "role"], ["prompt", "answer", "answer", "role"])
        prompt, first, second = steps[:3]
        label = next((s for s in steps if s.kind == "label"), None)
        answers = (first.text, second.text) if label is None or label.p >= 0.5 else (second.text, first.text)
        votes = [s.p for s in steps if s.kind == "vote"]
        assert label is None or not votes or sum(votes) / len(votes) == pytest.approx(label.p)
        if row["used"] and label:
            assert f"{100 * max(label.p, 1 - label.p):.1f} %" in row["role"]
        if row["used"] or "held out" in row["role"]:
            assert row["text"] == answers[0]
            (used if row["used"] else measured)[prompt.text, *answers] += 1
        else:
            assert first.text == second.text and row["role"] == "left out: the two answers are the same" and not votes
    assert used == Counter(map(told, train)) and measured == Counter(map(told, kept)) and measured


def test_every_rl_row_has_the_steps_at_which_it_was_drawn():
    run, rows = load_run(REFERENCE), all_rows(REFERENCE, "rl")
    config = run.settings(RLConfig, "rl")
    each = config.batch_size // config.group_size
    drawn = rl_prompts(run.train_prompts(), config.steps * each, config.helpful_ratio, config.seed)
    real = {}
    for i, row in enumerate(drawn):
        real.setdefault(row["id"], []).append(str(i // each + 1))
    assert {row["id"] for row in rows} == {row["id"] for row in run.train_prompts()}
    for row in rows:
        found = lineage(REFERENCE, row["id"])
        assert [s.kind for s in from_prompt(found.steps)] == ["prompt", "role"] and found.later
        at = " and at step ".join(real.get(row["id"], ()))
        assert row["role"] == (f"answered 8 times at step {at}" if at else "left out: not drawn") and row[
            "used"
        ] == bool(at)


def test_a_prompt_leads_to_all_that_came_of_it():
    run = load_run(REFERENCE)
    came = {
        name: Counter(row["prompt_id"] for row in run.rows(f"{name}.jsonl")) for name in ("chains", "helpful", "pairs")
    }
    for prompt in run.rows("prompts.jsonl")[::7]:
        found = lineage(REFERENCE, prompt["id"])
        kinds = Counter(s.kind for steps in found.later.values() for s in steps)
        expected = [came[name][prompt["id"]] for name in ("chains", "helpful", "pairs")]
        assert [kinds["response"], kinds["reply"], kinds["answer"] / 2] == expected
        if prompt["split"] == "eval":
            assert (
                found.steps[-1].text == "left out: it is kept for evaluation, and nothing was trained on it"
                and not found.later
            )


def test_reasoning_is_told_with_its_vote(tmp_path):
    folder = copy_of(tmp_path / "run")
    run = load_run(folder)
    lm = ScriptedLM(lambda c, s: f"(A) is <b>kind</b>, {s}", lambda c: [-0.1, -3.0])
    pairs = [pair for pair in run.rows("pairs.jsonl") if not pair["flags"]][:4]
    (folder / "labels.jsonl").unlink()
    label_preferences(lm, pairs, run.constitution, run.rows("prompts.jsonl"), cot=True, out=folder / "labels.jsonl")
    steps = lineage(folder, pairs[0]["id"]).steps
    assert [s.kind for s in steps[3:]] == ["vote", "reasoning", "vote", "reasoning", "label", "role"]
    assert "60.0 % (94.8 % before it was kept within bounds)" in steps[3].note and "40.0 %" in steps[5].note
    assert steps[4].note == "" and steps[6].note == "here (A) stands for answer B, and (B) for answer A"
    assert all(row["role"] == "left out: it has no label" for row in all_rows(folder, "preference") if row["id"] in {
        p["id"] for p in run.rows("pairs.jsonl") if not p["flags"]} - {p["id"] for p in pairs})


def test_where_the_comparisons_are_not_at_hand_the_held_out_rows_are_not_guessed(tmp_path):
    folder = copy_of(tmp_path / "run", helpfulness__comparisons="Anthropic/hh-rlhf/helpful-base:train")
    rows = all_rows(folder, "preference")
    doubts = [
        row["role"].endswith("unless its prompt is among the 10 % that were held out") for row in rows if row["used"]
    ]
    different = sum(len(set(pair["responses"])) == 2 for pair in load_run(folder).rows("pairs.jsonl"))
    assert (len(rows), len(doubts)) == (640, different) and all(doubts) and different < 640


def test_prompts_that_were_too_long_leave_the_steps_open(tmp_path):
    folder = copy_of(tmp_path / "run")
    path = folder / "rl/metrics.json"
    path.write_text(path.read_text().replace('"prompts_too_long": 0', '"prompts_too_long": 3'))
    assert {row["role"] for row in all_rows(folder, "rl")} == {
        "among the prompts to draw from; the steps cannot be told here"
    }


# Damage, beginnings, growth, size


def without_texts(line):
    return json.dumps(
        {k: v if k in ("id", "pair_id", "prompt_id") else None for k, v in json.loads(line).items()}
    ).encode()


DAMAGE = {
    "torn": lambda line: line[:60],
    "not JSON": lambda line: b"}{",
    "not UTF-8": lambda line: b'{"id": "\xff\xfe"}',
    "a list": lambda line: b"[1]",
    "no id": lambda line: b"{}",
    "nothing but brackets": lambda line: b"[" * 100_000,
    "a number for an id": lambda line: b'{"id": 5, "pair_id": 5}',
    "texts that are none": without_texts,
    "a list for an id": lambda line: b'{"id": ["x"], "pair_id": ["x"], "prompt_id": ["x"]}',
}


@pytest.mark.parametrize("name", ROW_FILES)
def test_damaged_lines_are_named_and_the_rest_is_shown(tmp_path, name):
    folder = copy_of(tmp_path / "run")
    path = folder / name
    lines = path.read_bytes().splitlines()
    whole = len(lines)
    for i, damage in enumerate(DAMAGE.values()):
        lines[3 * i] = damage(lines[3 * i])
    lines.insert(1, lines[1])  # twice
    path.write_bytes(b"\n".join(lines))
    found = records(folder)
    numbers = [1, 3, *(3 * i + 2 for i in range(1, len(DAMAGE)))]
    assert [p.split(":")[:2] for p in found.problems] == [[name, str(n)] for n in numbers]
    assert len(found.files[path.stem].rows) == whole - len(DAMAGE)
    for stage in ("sl", "preference", "rl"):
        for row in [*all_rows(folder, stage)][:60]:
            assert lineage(folder, row["id"]).steps[-1].kind == "role"
    assert set(found.problems) <= set(overview(folder).problems)


def test_a_lost_prompt_is_a_reason(tmp_path):
    folder = copy_of(tmp_path / "run")
    path, chain = folder / "prompts.jsonl", load_run(folder).rows("chains.jsonl")[0]
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if chain["prompt_id"] not in line))
    found = lineage(folder, f"{chain['id']}:1")
    assert found.steps[0].note.startswith(f"{chain['prompt_id']} is not in prompts.jsonl")
    assert found.steps[-1].text == f"left out: its prompt {chain['prompt_id']} is not in prompts.jsonl"
    assert (
        training_rows(folder, "sl", chain["id"]).rows[0]["prompt"]
        == f"(prompt {chain['prompt_id']} is not in prompts.jsonl)"
    )


@pytest.mark.parametrize("names", [(), ("prompts.jsonl",), ROW_FILES[:2], ROW_FILES])
def test_a_run_that_is_not_finished_shows_what_is_there(tmp_path, names):
    for name in ("recipe.yaml", *names):
        shutil.copy(REFERENCE / name, tmp_path)
    seen = overview(tmp_path)
    assert len(seen.missing) == 8 and any(p.startswith("manifest.json: ") for p in seen.problems) and not seen.judged
    assert not any(str(tmp_path) in p for p in seen.problems), "no paths of the server"
    rows = {stage: all_rows(tmp_path, stage) for stage in ("sl", "preference", "rl")}
    assert len(rows["sl"]) == {0: 0, 1: 0, 2: 2560, 5: 3520}[len(names)] and len(rows["rl"]) == (1120 if names else 0)
    for of in rows.values():
        assert all("this stage is not finished" in row["role"] for row in of if row["used"])
    if "chains.jsonl" in names:
        assert "not in the run's constitution" in lineage(tmp_path, rows["sl"][0]["id"]).steps[2].text


def test_a_run_without_an_oracle(tmp_path):
    folder = copy_of(tmp_path / "run")
    metrics = json.loads((folder / "eval/metrics.json").read_text())
    (folder / "eval/metrics.json").write_text(json.dumps({"elo": metrics["elo"]}))
    seen = overview(folder)
    assert not seen.judged and list(seen.tables) == ["Votes of the feedback model", "Stages"] and seen.problems == ()


OTHER_DAMAGE = [
    ("eval/metrics.json", "{"),
    ("manifest.json", "[["),
    ("rl/metrics.json", "x"),
    ("constitution.yaml", "a: ["),
]


@pytest.mark.parametrize("name, text", OTHER_DAMAGE)
def test_other_damaged_files_are_named(tmp_path, name, text):
    folder = copy_of(tmp_path / "run")
    (folder / name).write_text(text)
    shutil.copytree(REFERENCE / "eval/figures", folder / "eval/figures")
    assert [p for p in overview(folder).problems if p.startswith(name)], overview(folder).problems
    assert lineage(folder, all_rows(folder, "sl")[0]["id"]).steps[-1].kind == "role"


def test_only_a_folder_without_a_recipe_is_refused(tmp_path):
    for text in (None, "", "[", "- a", "base: 7", "base: mini\nsl: {epochs: many}"):
        if text is not None:
            (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(CaiError, match="no run folder|recipe.yaml:1: |recipe.yaml: (base|sl.epochs) is "):
            overview(tmp_path)


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    folder = copy_of(tmp_path / "run")
    before, version = records(folder), overview(folder).version
    read = []
    monkeypatch.setattr(
        records_module, "sketch", lambda name, line, real=records_module.sketch: read.append(name) or real(name, line)
    )
    assert records(folder) is before and read == []
    lines = (folder / "labels.jsonl").read_text().splitlines()
    (folder / "labels.jsonl").write_text("\n".join(lines[:100]) + "\n")
    after = records(folder)
    assert len(after.files["labels"].rows) == 100 and set(read) == {"labels"} and overview(folder).version != version
    assert after.files["chains"] is before.files["chains"]


def test_a_page_of_a_large_run_reads_only_its_own_lines(tmp_path, monkeypatch):
    folder, n = copy_of(tmp_path / "run"), 3000
    row = json.loads((folder / "chains.jsonl").open().readline())
    prompt = json.loads((folder / "prompts.jsonl").open().readline())
    prompts = [{**prompt, "id": f"p{i}", "source": "x" * 500} for i in range(n)]
    chains = [{**row, "id": f"c{i}", "prompt_id": f"p{i}", "response": "word " * 500} for i in range(n)]
    for name, rows in (("prompts", prompts), ("chains", chains)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_rows(folder, "sl").found == 4 * n + 960 and "word word" not in repr(
        records(folder).files["chains"].rows
    )
    opened, whole = [], records_module.Index.whole
    monkeypatch.setattr(records_module.Index, "whole", lambda self, ids=None: opened.append(ids) or whole(self, ids))
    start = time.perf_counter()
    page = training_rows(folder, "sl", page=400)
    story = lineage(folder, page.rows[0]["id"])
    assert (
        [ids for ids in opened if ids is None or len(ids) > 1] == []
        and len(opened) < 60
        and time.perf_counter() - start < 2
    )
    assert story.steps[0].text == prompt["messages"][-1]["content"]


# Finding


def test_rows_are_found_by_words_and_ids_and_not_by_the_files_own_words(tmp_path):
    folder = copy_of(tmp_path / "run")
    edit(
        folder / "helpful.jsonl", lambda i, row: {**row, "response": 'Größe "zehn"\nund\tmehr \\ Öl'} if i == 5 else row
    )
    id = json.loads((folder / "helpful.jsonl").read_text().splitlines()[5])["id"]
    for query in ("größe", "GRÖSSE", '"ZEHN" und', "mehr \\ öl", id, id[:8]):
        assert id in [row["id"] for row in training_rows(folder, "sl", query).rows], query
    rows = load_run(folder).rows("helpful.jsonl")
    (folder / "helpful.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert [row["id"] for row in training_rows(folder, "sl", "mehr \\ ÖL").rows] == [
        id
    ]  # written as the pipeline writes it
    for query in ("prompt_id", "principle_id", '{"id"', "revision\":", "und zehn"):
        assert training_rows(folder, "sl", query).found == 0
    prompt = load_run(folder).train_prompts()[0]
    assert training_rows(folder, "sl", prompt["id"]).found == 4 and training_rows(folder, "rl", prompt["id"]).found == 1
    chosen = next(iter(records(folder).comparisons.values()))["chosen"]
    assert training_rows(folder, "preference", chosen[:40]).found


# The tab, over HTTP and in a browser


@contextmanager
def served(folder=None):
    from cai_nb.app.theme import look
    from cai_nb.app.run_tab import RUN_TAB
    from cai_nb.app.wiring import Site

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with gr.Blocks(title="A run", analytics_enabled=False) as demo:
            with gr.Tabs():
                with gr.Tab("First", id="first"):
                    gr.HTML("<p>First</p>")
                with gr.Tab("Run", id="run", render_children=True):
                    RUN_TAB.build(Site(*load_models(), folder=folder))
        demo.queue(max_size=32, default_concurrency_limit=1)
        _, url, _ = demo.launch(
            server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False, **look(RUN_TAB.style)
        )
    try:
        yield url, told
    finally:
        demo.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    kept = tmp_path_factory.mktemp("app")
    trained = copy_of(kept / "trained" / "0a1b2c3d4e5f")
    shutil.copy(REFERENCE / "sl/adapter_model.safetensors", trained / "sl")
    for name in ("pairs.jsonl", "labels.jsonl", "eval/metrics.json"):
        (trained / name).unlink()
    manifest = json.loads((trained / "manifest.json").read_text())
    manifest["stages"] = {name: manifest["stages"][name] for name in ("prompts", "chains", "sl")}
    (trained / "manifest.json").write_text(json.dumps(manifest))
    (trained / "training.json").write_text(
        json.dumps({"parts": {"sl": {"what": "new: be <b>brief</b>", "began": 0, "error": ""}}})
    )
    with served(kept) as found:
        yield found


def test_endpoints(server):
    from gradio_client import Client

    client = Client(server[0], verbose=False)
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {"/run_rows", "/lineage"}
    page = client.predict(stage="preference", query="neighbour", page=2, api_name="/run_rows")
    assert page["page"] == 2 and all(set(row) == {"id", "prompt", "text", "used", "role"} for row in page["rows"])
    pair = client.predict(stage="preference", query="neighbour", page=1, api_name="/run_rows")["rows"][0]
    story = client.predict(pair["id"], api_name="/lineage")
    assert [s["kind"] for s in story["steps"]][:3] == ["prompt", "answer", "answer"] and story["later"]
    early = client.predict(stage="preference", query="", page=1, run="0a1b2c3d4e5f", api_name="/run_rows")
    assert early["found"] == 600  # the comparisons alone
    assert [str(w.message) for w in server[1] if "deprecat" in str(w.message).lower() and "gradio" in w.filename] == []


ASKED = [["eval", "", 1, ""], ["sl", "x" * 201, 1, ""], ["sl", None, 1, ""], ["sl", "", -1, ""], ["sl", "", "1", ""],
         ["sl", "", 1, "../.."], ["sl", "", 1, "recipe.yaml"], [{}, [], {}, []]]
HOSTILE = [
    *(("run_rows", data) for data in ASKED),
    ("lineage", ["x" * 61, ""]),
    ("lineage", [None, ""]),
    ("lineage", [["a"], ""]),
    ("lineage", ["a", "0a1b2c3d4e5f/../.."]),
]


@pytest.mark.parametrize("name, data", HOSTILE)
def test_what_cannot_be_answered_is_refused_at_once(server, name, data, capfd):
    import httpx

    start = time.monotonic()
    answer = httpx.post(f"{server[0]}gradio_api/call/{name}", json={"data": data})
    assert answer.status_code == 422 and time.monotonic() - start < 5 and "Traceback" not in answer.text
    err = capfd.readouterr().err
    assert "Traceback" not in err


def test_an_unknown_row_is_a_sentence(server, capfd):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="no such row in this run"):
        Client(server[0], verbose=False).predict("../recipe.yaml", api_name="/lineage")
    assert "Traceback" not in capfd.readouterr().err


SCREENSHOTS = Path(os.environ.get("CAI_SCREENSHOTS") or tempfile.mkdtemp(prefix="screenshots-"))


@contextmanager
def visit(browser, url, width, height, scheme="light"):
    page, complaints = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme), []
    page.set_default_timeout(20_000)
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else complaints.append(r.url))
    page.goto(url)
    page.get_by_role("tab", name="Run").click()
    page.wait_for_selector("#run-rows label")
    yield page
    page.close()
    assert complaints == []


def picture(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


@pytest.mark.parametrize("width, height, scheme", [(1440, 900, "light"), (420, 860, "dark")])
def test_a_visitor_follows_a_row(server, browser, width, height, scheme):
    with visit(browser, server[0], width, height, scheme) as page:
        assert page.locator("#run-tables table").count() == 3 and page.locator("#run-figures img").count() == len(
            CAPTIONS
        )
        for image in page.locator("#run-figures img").all():
            assert any(c.isdigit() for c in image.get_attribute("alt")) and image.evaluate("e => e.naturalWidth > 100")
        searches = []
        page.on("request", lambda r: searches.append(r.post_data) if r.url.endswith("run/predict") else None)
        page.locator("#run-query input").press_sequentially("neighbour", delay=30)
        page.wait_for_function("document.querySelector('#run-found').textContent.includes('neighbour')")
        assert len(searches) == 1, "one search for one word"
        page.click("#run-rows label >> nth=3")
        page.wait_for_selector("#run-story ol.story")
        kinds = (
            page.locator("#run-story > div ol.story >> nth=0")
            .locator("> li")
            .evaluate_all("items => items.map(e => e.className)")
        )
        assert kinds[0] == "step-prompt" and kinds[-1].startswith("step-role")
        assert not page.is_visible("#run-story .later h3")
        page.click("#run-story .later summary")
        assert page.is_visible("#run-story .later h3")
        picture(page, f"run-{width}-{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing to scroll sideways"
        boxes = [page.locator(part).bounding_box() for part in ("#run-rows", "#run-story")]
        assert (boxes[0]["x"] < boxes[1]["x"]) if width > 700 else (boxes[0]["y"] < boxes[1]["y"])
        page.get_by_role("tab", name="First").click()
        page.get_by_role("tab", name="Run").click()
        page.wait_for_timeout(400)
        assert page.locator("#run-rows input:checked").count() == 1, "what was being read is still there"


def test_by_keyboard_through_pages_other_runs_and_a_page_to_keep(server, browser):
    with visit(browser, server[0], 1440, 900) as page:
        page.focus("#run-rows input >> nth=0")
        page.keyboard.press("Space")
        page.wait_for_function("document.querySelector('#run-story .note')?.textContent.endsWith(':1')")
        page.keyboard.press("ArrowDown")
        page.wait_for_function("document.querySelector('#run-story .note').textContent.endsWith(':2')")
        page.focus("#run-on")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('#run-found').textContent.includes('21–40')")
        with page.expect_download() as saved:
            page.click("#run-save")
        text = Path(saved.value.path()).read_text()
        assert (
            saved.value.suggested_filename == "mini.html"
            and text.startswith("<!doctype html>")
            and "harmful compliance" in text
        )
        page.click("#run-choice input")
        page.get_by_role("option", name="new: be <b>brief</b>").click()
        page.wait_for_function("document.querySelector('#run-head').textContent.includes('Not finished')")
        assert page.locator("#run-tables table").count() == 0 and page.locator("#run-head b >> text=brief").count() == 0
        page.click("#run-rows label >> nth=0")
        page.wait_for_selector("#run-story ol.story")
        picture(page, "run-trained")

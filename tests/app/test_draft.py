"""The Constitution tab: edits that change one thing, texts meant to harm, trainings that are killed, and the page."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError, ValidationError
from serving import make_run

from cai_nb.app import trainings as workbench
from cai_nb.runs.process import _environment, stages_of
from cai_nb.app.constitution_tab import CONSTITUTION_TAB
from cai_nb.app.answers import compare
from cai_nb.app.models import load_models
from cai_nb.core.errors import CaiError
from cai_nb.core.constitution import Constitution, available_constitutions
from cai_nb.app.theme import look
from cai_nb.app.wiring import AT_ONCE, Site
from cai_nb.app.trainings import Workbench, join, next_column
from cai_nb.app.draft import FORM_FIELDS, read_draft, text_of, with_principle, with_text, without_principle

pytestmark = pytest.mark.filterwarnings("ignore:.*(no_silent_downcasting|The copy keyword)")
MINI = available_constitutions()["mini"].read_text(encoding="utf-8")
TALK = [{"role": "user", "content": "How do I punch a boss?"}]


# Drafts


ODD = """# mine
principles:

  -   critique: >-
        Is that
        rude?   # not a comment

      revision: 'Don''t'
      id: kind   # the id
      tags:
        - a
        # within
        - b
  # before the second
  - {id: b, comparison: "Which is \\"kinder\\"?", weight: 2}
  - id: c
    title: |
      Über
      lines

    comparison: plain text   # behind
name: odd
provenance: ends without a newline"""
TEXTS = [
    "plain",
    "x: y # z",
    "- item",
    "'single' \"double\" \\ back",
    "ünïcode 🧑‍🍳 é",
    "{a: b}",
    "[1, 2]",
    "yes",
    "null",
    "1.0",
    "@at `tick` %p",
    "? q",
    "& and *",
    "line\u2028separator",
    "nbsp\u00a0here",
    "x" * 1000,
    "ends with colon:",
    "<b>&amp;</b>",
    "#",
]


@pytest.mark.parametrize(
    "text",
    [MINI, ODD, text_of(Constitution.load("harmlessness")), MINI.replace("\n", "\r\n")],
    ids=["mini", "odd", "large", "crlf"],
)
def test_an_edit_changes_one_text_and_nothing_else(text):
    rng, before = random.Random(0), read_draft(text)
    assert not before.problems
    for _ in range(25):
        place, key = rng.randrange(len(before.principles)), rng.choice(list(FORM_FIELDS))
        value = rng.choice([*TEXTS, ""])
        after = with_text(text, place, key, value)
        wanted = replace(before.principles[place], **{key: " ".join(value.split()) or ("" if key == "title" else None)})
        found = read_draft(after).principles
        assert found == (*before.principles[:place], wanted, *before.principles[place + 1:])
        comments = [
            line.partition(" #")[2] for line in text.splitlines() if " #" in line and '"' not in line.partition(" #")[2]
        ]
        assert sum(comment not in after for comment in comments) <= 1, (
            "only what stood behind a value that went may go with it"
        )
        old = getattr(before.principles[place], key)
        assert read_draft(with_text(after, place, key, old or "")).principles[place] == replace(
            before.principles[place], **{key: old and " ".join(old.split())}
        )


@pytest.mark.parametrize("text", [MINI, ODD], ids=["mini", "odd"])
def test_principles_come_and_go(text):
    before = read_draft(text).principles
    more, place = with_principle(text, "Is it?", "Make it.")
    assert read_draft(more).principles[:place] == before and place == len(before)
    for i in range(len(before)):
        assert read_draft(without_principle(more, i)).principles == (
            *before[:i],
            *before[i + 1 :],
            read_draft(more).principles[-1],
        )


def test_every_shipped_constitution_opens_as_a_draft():
    for name in available_constitutions():
        assert read_draft(text_of(Constitution.load(name))).constitution == Constitution.load(name)


N = 60_000
BOMBS = {
    "brackets": "[" * N,
    "braces": "{" * N,
    "dashes": "- " * (N // 2),
    "questions": "? " * (N // 2),
    "deep": "\n".join(" " * i + "- a:" for i in range(300)),
    "laughs": "a: &a [lol]\n"
    + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi")),
    "merge": "base: &b {id: a}\nprinciples: [{<<: *b}]",
    "wide flow": "principles: [" + "a," * 29_000 + "]",
    "too large": "x" * (N + 1),
    "many": "name: x\nprinciples:\n" + "- {id: a, comparison: b}\n" * 2_000,
    "tag": "!!python/object/apply:os.system ['true']",
    "nul": "name: \x00",
    "half a character": 'name: "\\ud800"\nprinciples: [{id: a, comparison: b}]',
    "empty": "",
    "scalar": "5",
    "infinite": "name: .inf\nprinciples: .nan",
    "key is a list": "? [a, b]\n: c",
    "long key": "k" * 50_000 + ": 1",
    "colons": ":" * N,
    "newlines": "\n" * N,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_texts_meant_to_harm_are_refused_soon_and_plainly(text):
    start = time.perf_counter()
    draft = read_draft(text)
    assert time.perf_counter() - start < 8  # usually a tenth of it; a machine may be busy
    assert draft.problems and draft.constitution is None
    assert all(p.line >= 1 and p.fix and "\n" not in str(p) for p in draft.problems)
    for edit in (
        lambda: with_text(text, 0, "title", "x"),
        lambda: without_principle(text, 0),
        lambda: with_principle(text, "a", "b"),
    ):
        try:
            edit()
        except CaiError as error:
            assert "\n" not in str(error)


# Trainings


SMALL = (
    "prompts.limit=48",
    "helpfulness.limit=4",
    "helpfulness.samples=1",
    "chains.n_revisions=2",
    "eval.n=4",
    "sl.epochs=1",
)


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def alive(pid) -> bool:
    try:
        os.kill(pid, 0)
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if Path("/proc").is_dir()
            else True
        )
    except (ProcessLookupError, FileNotFoundError):
        return False


def files(folder: Path) -> set:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_cancelled_and_taken_up_again_and_nothing_outside_the_folder(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    for name in ("home", "here", "tmp"):
        (outside / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(outside / "home"))
    monkeypatch.setenv("TMPDIR", str(outside / "tmp"))
    monkeypatch.chdir(outside / "here")
    before, arrived = files(outside), []
    bench, mini = Workbench(tmp_path / "site", arrived.append, SMALL), Constitution.load("mini")
    first = bench.start(mini)
    pid, fractions = bench.running.process.pid, []
    wait_for(lambda: fractions.append(bench.look().fraction) or bench.look().stage == "chains")
    bench.cancel()
    assert not alive(pid) and bench.look().state == "stopped" and fractions == sorted(fractions)
    prompts = first.folder / "prompts.jsonl"
    written = prompts.stat().st_mtime_ns
    again = Workbench(tmp_path / "site", arrived.append, SMALL)  # the next server
    assert [(t.id, t.state) for t in again.trainings()] == [(first.id, "stopped")] and not arrived
    again.resume(first.id)
    wait_for(lambda: again.look().state != "running")
    assert again.look().state == "done", again.look()
    assert prompts.stat().st_mtime_ns == written and [t.id for t in arrived] == [first.id]
    assert again.start(mini).state == "done" and len(arrived) == 2  # at once, and not trained twice
    assert not [t for t in threading.enumerate() if t.name.startswith("training")]
    assert files(outside) == before
    shutil.move(tmp_path / "site", tmp_path / "moved")  # the folder may be moved
    assert [t.state for t in Workbench(tmp_path / "moved", sets=SMALL).trainings()] == ["done"]


def test_a_killed_server_takes_its_training_along(tmp_path):
    code = (
        "import sys, time\n"
        "from cai_nb.app.trainings import Workbench\n"
        "from cai_nb.core.constitution import Constitution\n"
        "bench = Workbench(sys.argv[1])\n"
        "bench.start(Constitution.load('mini'))\n"
        "print(bench.running.process.pid, flush=True)\n"
        "time.sleep(600)"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | _environment(tmp_path / "trained"),
    )
    child = int(server.stdout.readline())
    assert alive(child)
    server.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    server.wait()
    wait_for(lambda: not alive(child), 20)
    (left,) = Workbench(tmp_path).trainings()
    assert left.state == "stopped"


def pretend(code: str):
    "In the place of a training: a process that runs this code in its run folder."
    def start_run(folder, part, sets=()):
        with open(folder / "training.log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", code, part],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    return start_run


def some(*ids):
    return Constitution.load("mini").subset(ids=list(ids))


def test_one_runs_one_waits_and_the_third_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, "start_run", pretend("import time; time.sleep(60)"))
    bench = Workbench(tmp_path)
    one, two = bench.start(some("unethical")), bench.start(some("harmful"))
    assert (one.state, two.state, bench.start(some("unethical")).id) == ("running", "waiting", one.id)
    with pytest.raises(CaiError, match="Another training runs and one waits.*SL-CAI alone, starting"):
        bench.start(some("privacy"))
    bench.cancel()
    wait_for(lambda: bench.look().id == two.id)
    assert bench.look().state == "running" and bench.next is None
    bench.start(some("unethical"))
    bench.close()
    assert bench.running is None and {t.state for t in bench.trainings()} == {"stopped"}


@pytest.mark.parametrize(
    "code, words",
    [
        ("raise MemoryError('no room')", "MemoryError: no room"),
        ("import sys; sys.exit('cai-nb: recipe: wrong')", "recipe: wrong"),
        ("import sys; sys.exit(3)", "code 3"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("pass", "said nothing"),
    ],
)
def test_what_fails_says_why_in_a_sentence(tmp_path, monkeypatch, code, words):
    monkeypatch.setattr(workbench, "start_run", pretend(code))
    bench = Workbench(tmp_path)
    bench.start(some("unethical"))
    wait_for(lambda: bench.last and bench.last.ended.is_set())  # by then it is on the disk too
    assert bench.look().state == "failed" and words in bench.look().error and "\n" not in str(bench.look())
    assert Workbench(tmp_path).trainings()[0].error == bench.look().error


def test_who_does_not_listen_is_forced(tmp_path, monkeypatch):
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(workbench, "start_run", pretend(deaf))
    monkeypatch.setattr(workbench, "end_group", lambda process: workbench_end(process, 0.5))
    bench = Workbench(tmp_path)
    folder = bench.start(some("unethical")).folder
    wait_for(lambda: (folder / "training.log").read_text().strip())
    pid, child = bench.running.process.pid, int((folder / "training.log").read_text())
    bench.cancel()
    wait_for(lambda: not alive(pid) and not alive(child), 10)


workbench_end = workbench.end_group


def test_folders_that_cannot_be_written_and_too_many(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CaiError, match="nothing was trained"):
        Workbench(tmp_path / "file").start(some("unethical"))
    monkeypatch.setattr(workbench, "MAX_KEPT", 1)
    monkeypatch.setattr(workbench, "start_run", pretend("pass"))
    bench = Workbench(tmp_path)
    bench.start(some("unethical"))
    with pytest.raises(CaiError, match="1 trainings lie there already; remove some"):
        bench.start(some("harmful"))
    with pytest.raises(CaiError, match="no such training"):
        bench.resume("../../etc-sl")
    bench.close()


def test_the_package_is_found_by_the_child_wherever_the_server_stands(tmp_path, root, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert _environment(tmp_path)["PYTHONPATH"].split(os.pathsep) == [str(root), "/elsewhere"]


# Joining


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    "Random adapters for mini that change what it says."
    folder = make_run(tmp_path_factory.mktemp("adapters"), [str(number) for number in range(5)])
    return [folder / str(number) for number in range(5)]


def test_columns_join_while_others_are_served_and_the_oldest_leaves(adapters):
    models, _ = load_models()
    talks = dict.fromkeys(models.adapters, TALK)
    alone = [list(compare(models, talks, seed=s))[-1] for s in range(4)]
    found = [None] * 4

    def ask(seed):
        found[seed] = list(compare(models, talks, seed=seed))[-1]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    now = models
    for folder in adapters:
        now = join(now, next_column(now), folder, "Trained", "")
    for thread in threads:
        thread.join()
    assert found == alone
    assert list(now.adapters) == ["base", "sl", "rl", "trained-3", "trained-1", "trained-2"] and set(now.titles) == set(
        now.digests
    ) == set(now.adapters)
    answers = list(compare(now, dict.fromkeys(now.adapters, TALK), seed=1))[-1]
    assert len(set(answers.values())) >= 5 and {c: answers[c] for c in alone[1]} == alone[1]


# The page


def imitate(adapter: Path) -> str:
    "A training that takes a second and leaves an adapter."
    return f"""
import json, pathlib, shutil, sys, time
here, stages = pathlib.Path("."), {list(stages_of("sl"))!r}
done = {{}}
whole = {{"cai_nb": "imitated", "constitution": {{"name": "draft", "digest": ""}}, "stages": done}}
for stage in stages:
    done[stage] = {{"status": "started", "seconds": 0.0}}
    (here / "manifest.json").write_text(json.dumps(whole))
    time.sleep(.5)
    if stage == "sl": shutil.copytree({str(adapter)!r}, here / "sl")
    done[stage] = {{"status": "done", "seconds": .5}}
    (here / "manifest.json").write_text(json.dumps(whole))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory, adapters):
    "The tab beside another one on a free port; what it trains is imitated."
    models, constitution = load_models()
    site = Site(models, constitution, tmp_path_factory.mktemp("site"))
    bench = Workbench(site.folder)
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(workbench, "start_run", pretend(imitate(adapters[0])))
        with gr.Blocks(analytics_enabled=False) as demo, gr.Tabs():
            with gr.Tab("Other", render_children=True):
                other = gr.Textbox(label="Columns", elem_id="columns")
            with gr.Tab("Constitution", render_children=True):
                ties = CONSTITUTION_TAB.build(site, bench)
            ties.joined.change(lambda: ",".join(site.models.adapters), None, other, **AT_ONCE)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        _, url, _ = demo.queue(max_size=16).launch(
            server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False, **look(CONSTITUTION_TAB.style)
        )
        yield SimpleNamespace(url=url, site=site, bench=bench, demo=demo)
        bench.close()
        demo.close()


@pytest.fixture(scope="module")
def client(served):
    return Client(served.url, verbose=False)


def test_endpoints_check_and_try(client):
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {
        "/check",
        "/try_principle",
    }
    assert client.predict(MINI, api_name="/check") == []
    (problem,) = client.predict(MINI.replace("id: unethical\n", "id: harmful\n"), api_name="/check")
    assert (
        problem["line"] == MINI[: MINI.index("id: unethical\n")].count("\n") + 1
        and problem["key"].endswith(".id")
        and problem["fix"]
    )
    seen = list(
        client.submit(
            TALK[0]["content"],
            "Look at the reply. Is that violent?",
            "Rewrite the reply so that it is not violent.",
            3,
            api_name="/try_principle",
        )
    )
    for before, after in zip(seen, seen[1:]):
        assert all(after[key].startswith(before[key]) for key in after)
    assert seen[-1]["critique"].startswith("Yes") and seen[-1]["revision"] != seen[-1]["answer"] != ""


GOOD = ("How do I bake bread?", "Is that bad?", "Make it good.", 1)


@pytest.mark.parametrize(
    "name, args, words",
    [
        ("/check", (5,), "text, not int"),
        ("/check", (None,), "text, not NoneType"),
        ("/check", ("x" * 1_000_001,), "far too long"),
        ("/try_principle", ("", *GOOD[1:]), "nothing to answer"),
        ("/try_principle", (GOOD[0], "", *GOOD[2:]), "must be a text"),
        ("/try_principle", (GOOD[0], "x" * 1_001, *GOOD[2:]), "at most 1,000"),
        ("/try_principle", (*GOOD[:2], ["x"], 1), "must be a text"),
        ("/try_principle", (*GOOD[:3], -1), "seed must be"),
        ("/try_principle", (GOOD[0], "CritiqueRequest: x", *GOOD[2:]), "carries the marker"),
        ("/try_principle", (GOOD[0], "a\ud800b", *GOOD[2:]), ""),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(client, name, args, words):
    start = time.perf_counter()
    with pytest.raises((AppError, ValidationError, UnicodeEncodeError)) as told:
        client.predict(*args, api_name=name)
    assert words in str(told.value) and "Traceback" not in str(told.value) and len(str(told.value)) < 250
    assert time.perf_counter() - start < 3


@pytest.fixture
def visit(browser, served):
    "Opens the tab; at the end there must have been no error in the console and no request to elsewhere."
    opened, complaints = [], []

    def open_page(width=1440, height=900):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(60_000)
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on(
            "request", lambda r: None if r.url.startswith((served.url, "data:", "blob:")) else complaints.append(r.url)
        )
        page.goto(served.url)
        page.click("button[role=tab]:has-text('Constitution')")
        page.wait_for_selector("#draft-try", state="visible")
        page.wait_for_timeout(500)
        opened.append(page)
        return page

    yield open_page
    folder = os.environ.get("CAI_SCREENSHOTS")
    for number, page in enumerate(opened):
        if folder:
            page.screenshot(path=f"{folder}/constitution-{page.viewport_size['width']}-{number}.png", full_page=True)
        page.close()
    assert complaints == []


def says(page, selector, text):
    page.wait_for_function("([s, t]) => document.querySelector(s)?.innerText.includes(t)", arg=[selector, text])


def value(page, key):
    return page.input_value(f"#draft-{key} textarea")


def test_form_text_and_trial_show_the_same_thing(visit):
    page = visit()
    page.fill("#draft-prompt textarea", TALK[0]["content"])
    page.click("#draft-try")
    page.wait_for_selector("#draft-shown ins")
    page.fill("#draft-critique textarea", "Look at the reply. Is that rude?")  # tried again by itself
    says(page, "#draft-told", "mini does not know: rude")
    says(page, "#draft-shown", "Is that rude?")
    page.focus("#draft-critique textarea")
    page.keyboard.press("Control+End")
    for _ in range(5):
        page.keyboard.press("Backspace")  # deletions are heard, too
    says(page, "#draft-shown", "Is that")
    page.keyboard.type("bad?")
    says(page, "#draft-told", "Edited (changed: harmful)")
    page.wait_for_function("!document.querySelector('#draft-told .warn')")

    page.click("#draft-whole > button")
    page.wait_for_selector("#draft-text .cm-content")
    line = page.locator("#draft-text .cm-line", has_text="Is that bad?").first
    assert "critique:" in line.inner_text()
    line.click()
    page.keyboard.press("End")
    page.keyboard.press("Backspace")
    page.wait_for_selector("#draft-told .problem >> text=Line 1")
    page.keyboard.type(' now"')
    page.wait_for_selector("#draft-told .note")
    page.wait_for_function("document.querySelector('#draft-critique textarea').value.endsWith('bad? now')")
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.closest('#draft-text .cm-editor') !== null"), (
        "the keyboard is not caught in the editor"
    )

    page.fill("#draft-title textarea, #draft-title input", "Other title")
    page.click("#draft-choice input")  # in the same moment
    page.keyboard.type("privacy")
    page.wait_for_selector("#draft-choice [role=option]")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#draft-critique textarea').value.includes('invasive')")
    with page.expect_download() as download:
        page.click("#draft-save")
    saved = read_draft(Path(download.value.path()).read_text(encoding="utf-8"))
    assert download.value.suggested_filename == "mini.yaml" and saved.principles[0].title == "Other title"
    assert (
        saved.principles[0].critique == "Look at the reply. Is that bad? now" and saved.principles[13].id == "privacy"
    )
    assert saved.text.count("#") == MINI.count("#")
    page.click("#draft-new")
    page.wait_for_function("document.querySelector('#draft-choice input').value.startsWith('33. New principle')")
    page.click("#draft-remove")
    page.wait_for_function("document.querySelector('#draft-choice input').value.startsWith('32.')")
    says(page, "#draft-shown", "Preferred to Base")  # a principle that compares, tried by itself
    page.click("#draft-back")
    page.wait_for_function("document.querySelector('#draft-told').innerText.trim().endsWith('to compare by.')")


def test_a_training_joins_the_comparison(visit, served):
    page = visit()
    page.fill("#draft-critique textarea", "Look at the reply. Is that bad?")
    page.click("#train")  # in the same moment: what was typed counts
    page.wait_for_selector("#train-bar .progress")
    says(page, "#train-bar", "changed: harmful")
    page.click("button[role=tab]:has-text('Other')")
    page.wait_for_function(
        "document.querySelector('#columns textarea, #columns input').value === 'base,sl,rl,trained-1'"
    )
    page.click("button[role=tab]:has-text('Constitution')")
    says(page, "#train-bar", "It has joined the comparison as “Trained 1”")
    assert served.site.models.titles["trained-1"] == ("Trained 1", "SL-CAI, changed: harmful")
    page.wait_for_selector("#train-again", state="visible")
    assert page.is_disabled("#train-cancel")
    fresh = visit()  # who opens the page now sees it as well
    says(fresh, "#train-bar", "It has joined")


def test_nothing_sticks_out_on_a_phone(visit):
    page = visit(420, 860)
    page.fill("#draft-prompt textarea", TALK[0]["content"])
    page.click("#draft-try")
    page.wait_for_selector("#draft-shown ins")
    page.click("#draft-whole > button")
    page.wait_for_selector("#draft-text .cm-content")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    boxes = [page.locator(s).bounding_box() for s in ("#draft-critique", "#draft-prompt", "#train")]
    assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"] and all(b["x"] + b["width"] <= 420 for b in boxes)


def test_without_a_folder_or_without_mini_training_is_off_and_says_so():
    models, constitution = load_models()
    for site, words in (
        (Site(models, constitution), "Training is off"),
        (Site(replace(models, recipe={"base": "x/8b"}), constitution, Path("x")), "takes hours on a GPU"),
    ):
        with gr.Blocks(analytics_enabled=False) as demo:
            ties = CONSTITUTION_TAB.build(site)
        assert not any(ties.joined in fn.outputs for fn in demo.fns.values())
        assert words in json.dumps(demo.get_config_file(), default=str)
    assert not Path("x").exists()

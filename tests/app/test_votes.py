"""The arena: votes survive whatever happens to the process; nothing tells who is A before the vote."""
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
from serving import quickest

from cai_nb.app import votes as engine
from cai_nb.app.votes import VOTE_FIELDS, VOTE_QUESTIONS, Arena, Ballot, Votes, draw_ballot, export_rows, standings
from cai_nb.app.models import Models
from cai_nb.core.errors import CaiError
from cai_nb.core.constitution import Constitution
from cai_nb.measure.elo import CHOICES

MODELS = Models(None, {"base": None, "sl": "sl", "rl": "rl"}, digests={"base": "0b", "sl": "51", "rl": "71"})
HERE = Path(__file__).parent


def ballot(i=0, a="sl", b="rl", **changes):
    known = {
        "prompt": f"How do I bake bread number {i}?",
        "seed": i,
        "temperature": 1.0,
        "columns": (a, b),
        "digests": (MODELS.digests[a], MODELS.digests[b]),
        "constitution": "c0",
        "answers": (f"Knead {i}.", f"Wait {i}."),
    }
    return Ballot(**{**known, **changes})


def python(code, *args):
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# The engine


def test_two_hundred_votes_from_twenty_threads(tmp_path):
    arena, draw = Arena(tmp_path), random.Random(0)
    cast = {}
    for i in range(200):
        a, b = draw.sample(list(MODELS.adapters), 2)
        cast[arena.open(ballot(i, a, b))] = (i, a, b, draw.choice(list(CHOICES)), draw.choice([None, *CHOICES]))
    with ThreadPoolExecutor(20) as pool:
        seen = list(pool.map(lambda token: arena.vote(token, *cast[token][3:]), cast))
    assert sorted(n for _, n in seen) == list(range(1, 201))
    kept = {(r["seed"], r["a"], r["b"], r["helpful"], r["harmless"]) for r in arena.votes.rows()}
    assert kept == set(cast.values())
    assert not arena.ballots
    table = arena.standings(MODELS)
    assert table["votes"] == 200 and {r["model"] for r in table["helpful"]} == set(MODELS.adapters)


class SlowDisk(sqlite3.Connection):
    def __exit__(self, *failed):
        time.sleep(0.05)  # with the write lock held, as a disk that takes long to say that the vote is safe
        return super().__exit__(*failed)


def test_on_a_slow_disk_voters_wait_their_turn_and_none_is_refused(tmp_path, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(engine.sqlite3, "connect", lambda *args, **options: connect(*args, factory=SlowDisk, **options))
    monkeypatch.setattr(engine, "_WAIT", 0.5)  # a tenth of what they wait in all
    votes = Votes(tmp_path)
    with ThreadPoolExecutor(20) as pool:
        numbers = list(pool.map(lambda i: votes.add(ballot(i), {"helpful": "tie", "harmless": None}), range(100)))
    assert sorted(numbers) == list(range(1, 101))


def test_a_program_that_holds_the_file_is_named_and_the_ballot_waits(tmp_path, monkeypatch):
    arena = Arena(tmp_path)
    assert arena.vote(arena.open(ballot(0)), "tie")[1] == 1
    monkeypatch.setattr(engine, "_WAIT", 0.2)
    token = arena.open(ballot(1))
    with closing(sqlite3.connect(tmp_path / "votes.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            CaiError, match="another program has held this file for 0.2 seconds; end that program and try again"
        ):
            arena.vote(token, "tie")
        other.execute("ROLLBACK")
    assert arena.vote(token, "tie")[1] == 2


def test_processes_that_find_a_new_file_at_the_same_moment_share_it(tmp_path):
    code = """if True:
        import sys, time; from test_votes import *
        print("ready", flush=True); start = float(sys.stdin.readline())
        for i in range(120):
            while time.time() < start + 0.03 * (i // 3): pass
            Votes(f"{sys.argv[1]}/{i // 3}").add(ballot(i), {"helpful": sys.argv[2], "harmless": None})"""
    voters = [python(code, tmp_path, choice) for choice in CHOICES]
    assert {voter.stdout.readline() for voter in voters} == {"ready\n"}
    start = time.time() + 0.3
    for voter in voters:
        voter.stdin.write(f"{start}\n")
        voter.stdin.flush()
    assert [voter.wait(100) for voter in voters] == [0] * len(CHOICES)
    for i in range(40):
        rows = Votes(tmp_path / str(i)).rows()
        assert {r["number"] for r in rows} == set(range(1, 3 * len(CHOICES) + 1))
        assert {c: sum(r["helpful"] == c for r in rows) for c in CHOICES} == dict.fromkeys(CHOICES, 3)


VOTER = """
import os, sys, threading
from test_votes import *
votes = Votes(sys.argv[1])
def vote(thread):
    for i in range(thread, 10**9, 20):
        votes.add(ballot(i), {"helpful": "B better", "harmless": None})
        os.write(1, b"%d\\n" % i)
for thread in range(20): threading.Thread(target=vote, args=[thread]).start()
"""


def test_every_vote_that_was_acknowledged_survives_sigkill(tmp_path):
    voter = python(VOTER, tmp_path)
    heard = [voter.stdout.readline() for _ in range(100)]
    voter.send_signal(signal.SIGKILL)
    *rest, half = voter.stdout.read().split("\n")
    assert voter.wait(60) == -signal.SIGKILL
    acknowledged = {int(line) for line in [*heard, *rest]}
    kept = {r["seed"] for r in Votes(tmp_path).rows()}
    assert len(acknowledged) >= 100 and acknowledged <= kept
    assert len(kept - acknowledged) <= 20  # at most one for each thread was written and not yet acknowledged
    with Votes(tmp_path).file() as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_nothing_personal_is_kept(tmp_path):
    Votes(tmp_path).add(ballot(), {"helpful": "tie", "harmless": None})
    with closing(sqlite3.connect(tmp_path / "votes.sqlite")) as db:
        columns = [row[1] for row in db.execute("PRAGMA table_info(votes)")]
    assert columns == ["number", *VOTE_FIELDS]
    assert not {"address", "ip", "session", "user", "cookie"} & set(columns)
    assert Votes(tmp_path).rows()[0]["time"][13:] == ":00Z"  # the hour, no minutes


def test_the_seats_do_not_depend_on_the_seed_or_on_python_s_random():
    constitution = Constitution.load("mini")
    seats = []
    for _ in range(40):
        random.seed(0)
        seats.append(draw_ballot(MODELS, constitution, "How?", seed=0).columns)
    assert len(set(seats)) > 2


def test_a_ballot_survives_a_disk_that_refuses(tmp_path):
    (tmp_path / "votes.sqlite").mkdir()
    arena = Arena(tmp_path)
    token = arena.open(ballot())
    with pytest.raises(CaiError, match="can be written"):
        arena.vote(token, "tie")
    (tmp_path / "votes.sqlite").rmdir()
    assert arena.vote(token, "tie")[1] == 1
    with pytest.raises(CaiError, match="no longer open"):
        arena.vote(token, "tie")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_the_right_to_write(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CaiError, match="name a folder that can be written"):
        Votes(tmp_path / "votes").add(ballot(), {"helpful": "tie", "harmless": None})
    tmp_path.chmod(0o700)


def test_votes_on_other_weights_do_not_count(tmp_path):
    votes = Votes(tmp_path)
    for i in range(4):
        votes.add(ballot(i), {"helpful": "A better", "harmless": "B better"})
    votes.add(ballot(9, digests=("51", "another")), {"helpful": "B better", "harmless": None})
    table = standings(votes.rows(), MODELS)
    assert (table["votes"], table["others"]) == (4, 1)
    assert next(r for r in table["helpful"] if r["model"] == "sl")["wins"] == 4
    assert next(r for r in table["harmless"] if r["model"] == "sl")["wins"] == 0


def test_the_export_is_what_the_preference_stage_reads(tmp_path):
    from cai_nb.method.preference import preference_rows
    from cai_nb.runs.folder import Run
    from cai_nb.runs.prompts_stage import HelpfulnessSettings
    from cai_nb.runs.rl_stages import comparisons_of

    votes = Votes(tmp_path)
    for i, (helpful, harmless) in enumerate(
        [("A better", "B better"), ("B better", "tie"), ("both bad", None), (None, "A better")]
    ):
        votes.add(ballot(i), {"helpful": helpful, "harmless": harmless})
    votes.add(ballot(8, answers=("", "Wait.")), {"helpful": "B better", "harmless": None})
    rows, out = export_rows(votes.rows(), "helpful")
    assert out == {"tie": 0, "both bad": 1, "empty answer": 1} and {r["about"] for r in rows} == {"helpful"}
    (tmp_path / "arena.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = vars(HelpfulnessSettings(comparisons=str(tmp_path / "arena.jsonl")))
    recipe = {"seed": 0, "base": "mini", "helpful": None, "helpfulness": asked}
    comparisons, _ = comparisons_of(Run(tmp_path, recipe), [])
    read = preference_rows([], [], [], comparisons)
    assert [
        (r["prompt"][0]["content"], r["chosen"][0]["content"], r["rejected"][0]["content"], r["p"]) for r in read
    ] == [
        ("How do I bake bread number 0?", "Knead 0.", "Wait 0.", 1.0),
        ("How do I bake bread number 1?", "Wait 1.", "Knead 1.", 1.0),
    ]
    both, out = export_rows(votes.rows())
    assert (
        len(both) == 4
        and out == {"tie": 1, "both bad": 1, "empty answer": 1}
        and {r["about"] for r in both} == set(VOTE_QUESTIONS)
    )


# Over HTTP

SERVER = """
import sys, torch, gradio as gr
from dataclasses import replace
from test_votes import *
from serving import free_port
from cai_nb.app.arena_tab import ARENA_TAB
from cai_nb.app.models import load_models
from cai_nb.app.theme import look
from cai_nb.app.wiring import Site
torch.set_num_threads(1)
folder, n = None if sys.argv[1] == "-" else sys.argv[1], int(sys.argv[2])
arena = Arena(folder)
models, constitution = load_models()
with gr.Blocks(analytics_enabled=False) as demo, gr.Tabs(), gr.Tab("Arena"):
    ARENA_TAB.build(Site(models, constitution, folder), arena)
demo.queue(max_size=64)
settings = dict(prevent_thread_lock=True, quiet=True, ssr_mode=False, **look(ARENA_TAB.style))
_, url, _ = demo.launch(server_port=free_port(), **settings)
tokens = [arena.open(ballot(i, digests=(models.digests["sl"], models.digests["rl"]))) for i in range(n)]
print(json.dumps([url, tokens]), flush=True)
demo.block_thread()
"""


@contextmanager
def serving(folder, ballots=0):
    "The arena on mini in a process of its own: (process, address, tokens of ballots that are open)."
    server = python(SERVER, folder, ballots)
    try:
        url, tokens = next(json.loads(line) for line in server.stdout if line.startswith("["))
        yield server, url, tokens
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("arena") / "votes") as (_, url, _):
        yield url


def call(url, name, *args):
    "Status and body of the first answer; after 200 the events that follow, as (kind, data)."
    first = httpx.post(f"{url}gradio_api/call/{name}", json={"data": list(args)}, timeout=30)
    if first.status_code != 200:
        return first.status_code, first.text
    kind, found = None, []
    with httpx.stream("GET", f"{url}gradio_api/call/{name}/{first.json()['event_id']}", timeout=60) as events:
        for line in events.iter_lines():
            if line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: ") and kind != "heartbeat":
                found.append((kind, json.loads(line[6:])))
    return 200, found


def test_two_answers_a_vote_and_the_table(server):
    _, events = call(server, "arena", "How do I punch a boss?", 3, 1.0)
    states = [data[0] for kind, data in events if kind in ("generating", "complete") and data]
    for before, after in zip(states, states[1:]):
        assert all(after[side].startswith(before[side]) for side in "ab"), "text only grows"
    assert [bool(s["ballot"]) for s in states[:-2]] == [False] * len(states[:-2]) and states[-1]["ballot"]
    assert set(states[-1]) == {"ballot", "a", "b"}, "nothing says who it was"
    assert not {"base", "sl", "rl"} & set(states[-1].values())

    token = states[-1]["ballot"]
    _, voted = call(server, "vote", token, "tie", None)
    (shown,) = voted[-1][1]
    assert {shown["a"], shown["b"]} < {"base", "sl", "rl"} and shown["votes"] == 1
    _, table = call(server, "standings")
    assert table[-1][1][0]["votes"] == 1


@pytest.mark.parametrize("name, args, told", [
    ("vote", ["guess", "tie", None], "no longer open"),
    ("vote", [7, "tie", None], "no longer open"),
    ("vote", [None, None, None], "no longer open"),
    ("vote", ["guess", "A", "tie"], "one of: A better, B better, tie, both bad"),
    ("vote", ["guess", "tie", ["tie"]], "one of: A better, B better, tie, both bad"),
    ("arena", ["", None, 1.0], "nothing to answer"),
    ("arena", ["x" * 5000, None, 1.0], "too long"),
    ("arena", [["a"], None, 1.0], "must be text"),
    ("arena", ["Hello", -1, 1.0], "seed must be"),
    ("arena", ["Hello", 1, "hot"], "temperature must be"),
])
def test_what_cannot_be_answered_is_refused_at_once(server, name, args, told):
    (status, text), seconds = quickest(lambda: call(server, name, *args))
    assert status == 422 and told in text and "Traceback" not in text and seconds < 0.5


def test_a_used_ballot_and_no_choice(server):
    _, events = call(server, "arena", "How do I bake bread?", 1, 1.0)
    token = events[-1][1][0]["ballot"]
    assert call(server, "vote", token, None, "")[1][-1][0] == "error"  # no choice at all: the ballot stays open
    assert call(server, "vote", token, "both bad", "both bad")[1][-1][0] == "complete"
    status, text = call(server, "vote", token, "tie", None)
    assert status == 422 and "no longer open" in text


def test_what_mini_does_not_know_is_not_voted_on(server):
    _, events = call(server, "arena", "What is the capital of France?", 1, 1.0)
    states = [data[0] for kind, data in events if kind in ("generating", "complete") and data]
    assert (
        states[-1]["outside"] is True
        and states[-1]["ballot"] == ""
        and "does not know" in states[-1]["a"] == states[-1]["b"]
    )


def test_every_vote_acknowledged_over_http_survives_sigkill(tmp_path):
    acknowledged, lock = {}, threading.Lock()
    with serving(tmp_path, 200) as (process, url, tokens):
        def vote(i):
            try:
                status, events = call(url, "vote", tokens[i], "A better", random.choice(list(CHOICES)))
            except httpx.HTTPError:
                return  # killed before it answered
            if status == 200 and events and events[-1][0] == "complete":
                with lock:
                    acknowledged[i] = events[-1][1][0]["votes"]
                    if len(acknowledged) == 70:
                        process.send_signal(signal.SIGKILL)

        with ThreadPoolExecutor(20) as pool:
            list(pool.map(vote, range(200)))
        assert process.wait(30) == -signal.SIGKILL
    assert 70 <= len(acknowledged) < 200, "it was killed in the middle"
    kept = {r["seed"]: r for r in Votes(tmp_path).rows()}
    assert set(acknowledged) <= set(kept) and len(kept) - len(acknowledged) <= 20
    assert {kept[i]["helpful"] for i in acknowledged} == {"A better"}

    unused = next(i for i in range(200) if i not in kept)
    with serving(tmp_path, 1) as (_, url, (new,)):  # started anew on the same folder
        status, text = call(url, "vote", tokens[unused], "tie", None)
        assert status == 422 and "no longer open" in text
        assert call(url, "standings")[1][-1][1][0]["votes"] == len(kept)
        assert call(url, "vote", new, "tie", "tie")[1][-1][1][0]["votes"] == len(kept) + 1


# The page


@pytest.mark.parametrize("width", [1440, 420])
def test_a_visitor_votes(server, browser, width):
    with closing(browser.new_page(viewport={"width": width, "height": 900})) as page:
        complaints = []
        page.set_default_timeout(60_000)
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(server)
        page.wait_for_selector("#arena-standings table")
        heights = page.evaluate("[...document.querySelectorAll('.blind')].map(e => e.offsetHeight)")
        for _ in range(10):  # until the answers differ
            page.click("#arena-examples .gallery-item >> nth=0")
            page.wait_for_selector("#arena-a .caret")
            page.wait_for_function("!document.querySelector('#arena-vote').disabled")
            if page.locator("#arena-helpful input").count() == 4:
                break
        assert page.evaluate("[...document.querySelectorAll('.blind')].map(e => e.offsetHeight)") == heights, (
            "nothing jumps"
        )
        assert not page.locator("#arena-answers .known").count()
        page.click("#arena-vote")
        page.wait_for_function("document.querySelector('#arena-told').textContent.includes('no vote yet')")
        page.check("#arena-helpful input >> nth=0")
        page.check("#arena-harmless input >> nth=1")
        page.click("#arena-vote")
        page.wait_for_function("document.querySelector('#arena-told').textContent.includes('Thank you')")
        names = page.locator("#arena-answers .known").all_text_contents()
        assert len(set(names)) == 2 and set(names) < {"Base", "SL-CAI", "RL-CAI"}
        assert page.is_disabled("#arena-vote") and "vote" in page.text_content("#arena-count")
        with page.expect_download() as download:
            page.click("#arena-save-harmless")
        assert download.value.suggested_filename == "arena-harmless.jsonl"
        *_, last = Path(download.value.path()).read_text(encoding="utf-8").splitlines()
        assert json.loads(last)["chosen"] == page.text_content("#arena-b .said")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing to scroll sideways"
        assert complaints == []

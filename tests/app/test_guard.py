"""What is let in over HTTP: each promise of SECURITY.md about the app, asked of a server in a process of its own."""
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from serving import PANDAS, events, free_port, post, process, served

from cai_nb.app.calls import Refusal, read_body
from cai_nb.app.guard import MAX_BODY, Brake
from cai_nb.app.server import serve
from cai_nb.core.errors import CaiError

ASK = "How do I punch a boss?"
API = "gradio_api/"
pytestmark = pytest.mark.filterwarnings(PANDAS)


class Server:
    "A server, what it says in its log, and a client."

    def __init__(self, url, log):
        self.url, self.log, self.client = url, log, httpx.Client(timeout=60)

    def ask(self, method, path, **more):
        return self.client.request(method, self.url + path, **more)

    def call(self, path, body, **headers):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", API + path, content=raw, headers={"content-type": "application/json", **headers})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "One for all, and at the end nothing in its log: nothing that a client sends is worth a trace."
    folder = tmp_path_factory.mktemp("guard")
    with process(folder, max_new_tokens=3) as (url, _):
        yield Server(url, folder / "server.log")
    assert "Traceback" not in (folder / "server.log").read_text()


# Calls that are none

FULL = {"data": [ASK, 1, 1, None]}
BODIES = {
    "empty": b"",
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe{}",
    "a list": [],
    "null": None,
    "deep": b"[" * 100_000,
    "half a character": b'{"data":["\\ud800",1,1,null],"session_hash":"\\ud800"}',
    "half a character in a key": b'{"\\udfff":1,"data":[]}',
    "no number": b'{"data":["hi",NaN,1,null],"session_hash":"s"}',
    "beyond all numbers": b'{"data":["hi",1e999,1,null],"session_hash":"s"}',
    "a long number": b'{"data":["hi",1' + b"0" * 5000 + b',1,null],"session_hash":"s"}',
    "no list": {"data": 5},
    "too few": {"data": [ASK], "session_hash": "s"},
    "too many": {"data": [ASK] * 50, "session_hash": "s"},
    "no such function": {"data": [], "fn_index": 9999, "session_hash": "s"},
    "negative": {"data": [], "fn_index": -1, "session_hash": "s"},
    "huge": {"data": [], "fn_index": 10**30, "session_hash": "s"},
    "true": {"data": [], "fn_index": True, "session_hash": "s"},
    "a word": {"data": [], "fn_index": "x", "session_hash": "s"},
    "a file": {
        "data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, 1, 1, None],
        "session_hash": "s",
    },
    "a file of another server": {
        "data": [{"path": "x", "url": "http://127.0.0.1:1/", "meta": {"_type": "gradio.FileData"}}, 1, 1, None],
        "session_hash": "s",
    },
}
CALLS = ("call/compare", "call/v2/compare", "call/v2/no_such", "call/no_such")
ROUTES = ("queue/join", *CALLS, "run/compare", "run/predict")


@pytest.mark.parametrize("route", ROUTES)
def test_a_call_that_is_none_is_the_clients_mistake(server, route):
    for kind, body in BODIES.items():
        answer = server.call(route, body)
        assert 400 <= answer.status_code < 500, (kind, answer.status_code, answer.text[:200])
        assert "detail" in answer.json() and "Traceback" not in answer.text, kind


@pytest.mark.parametrize("route", ["cancel", "reset"])
def test_what_cancels_takes_no_nonsense_either(server, route):
    for kind in ("empty", "no JSON", "half a character", "no number", "beyond all numbers", "deep"):
        assert 400 <= server.call(route, BODIES[kind]).status_code < 500, kind


def test_answers_that_nobody_waits_for_are_not_there(server):
    gone = ("queue/data?session_hash=no_such", "queue/data", "call/compare/no_such", "call/compare/%ff")
    for path in (*gone, "call/v2/compare/x"):
        assert server.ask("GET", API + path).status_code == 404, path


def test_the_line_has_no_way_around_it(server):
    "`/run` answers at once, without check and line: for what the page does without the model, and for nothing else."
    assert server.call("run/compare", FULL).status_code == 404
    assert server.call("api/compare", FULL).status_code == 404
    named = [d for d in server.ask("GET", "config").json()["dependencies"] if d["queue"] and d["backend_fn"]]
    for found in named:
        body = {"data": [None] * len(found["inputs"]), "fn_index": found["id"], "session_hash": "s"}
        assert server.call("run/predict", body).status_code == 404


def test_functions_of_the_page_have_no_names(server):
    hidden = [d for d in server.ask("GET", "config").json()["dependencies"] if d["api_visibility"] != "public"]
    assert len(hidden) > 20
    for found in hidden[:40]:
        answer = server.call(f"call/{found['api_name']}", {"data": [None] * len(found["inputs"])})
        assert answer.status_code == 404, found["api_name"]


def test_values_that_a_component_cannot_take_leave_no_trace(server):
    "The page's own functions, called by number with what the page would never send."
    found, log = server.ask("GET", "config").json()["dependencies"], server.log.read_text()
    at_once = [d for d in found if d["backend_fn"] and not d["queue"] and d["inputs"]]
    wanted = {d["api_name"].rstrip("_0123456789"): d for d in at_once}
    assert len(wanted) > 15
    for value in (None, ["x"]):
        for d in wanted.values():
            body = {"data": [value] * len(d["inputs"]), "fn_index": d["id"], "session_hash": "values"}
            server.call("run/predict", body)
    assert "Traceback" not in server.log.read_text()[len(log):]


# Paths


CLOSED = [
    ("POST", "upload"), ("GET", "upload_progress?upload_id=x"), ("POST", "component_server"),
    ("POST", "process_recording"), ("GET", "file=/etc/passwd"), ("GET", "file/x"),
    ("GET", "proxy=http://127.0.0.1:1/"), ("GET", "proxy=https://x.hf.space/"),
    ("POST", "stream/x"), ("GET", "stream/a/1/1/playlist.m3u8"), ("GET", "deep_link?session_hash=a"), ("GET", "token"),
    ("POST", "vibe-edit"), ("GET", "vibe-code"), ("GET", "dev/reload"), ("GET", "runs"),
    ("GET", "custom_component/a/client/component/x"),
    ("GET", "queue/status"), ("PUT", "upload"), ("TRACE", ""), ("DELETE", "queue/join"),
]  # fmt: skip


@pytest.mark.parametrize("method, path", CLOSED, ids=[f"{m} {p}" for m, p in CLOSED])
def test_what_the_page_does_not_need_is_not_there(server, method, path):
    answer = server.ask(method, API + path, content=b"x" * 50 if method == "POST" else None)
    assert answer.status_code == 404 and "There is nothing here" in answer.text


def test_no_upload_reaches_the_disk(server):
    answer = server.ask("POST", API + "upload", files={"files": ("state.json", b"x" * 100)})
    assert answer.status_code == 404
    for path in ("monitoring", "monitoring/x", "docs", "openapi.json", "static/%2e%2e/%2e%2e/x", "assets/../../x"):
        assert server.ask("GET", path).status_code in (403, 404), path


def test_the_page_itself_is_there(server):
    for path in ("", "config", "theme.css", API + "info", API + "openapi.json", API + "startup-events", "?view=api"):
        assert server.ask("GET", path).status_code == 200, path
    assert server.ask("HEAD", "").status_code == 200


# Names, origins, headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "", "localhost.evil.example", "0x7f01", "a b"])
def test_another_name_is_not_answered_on_this_computer(server, host):
    for method, path in (("GET", ""), ("GET", "config"), ("POST", API + "call/compare")):
        answer = server.ask(method, path, headers={"host": host})
        assert answer.status_code == 403 and "--allow-host" in answer.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:7860", "[::1]:7860", "app.localhost"])
def test_this_computer_has_several_names(server, host):
    assert server.ask("GET", "", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "page",
    [
        {"origin": "http://localhost:3000"}, {"origin": "http://127.0.0.1:1"}, {"origin": "null"},
        {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
        {"origin": "http://localhost:3000", "sec-fetch-site": "same-site"},
    ],
    ids=str,
)  # fmt: skip
def test_another_page_calls_nothing_and_reads_nothing(server, page):
    assert server.call("call/compare", FULL, **page).status_code == 403
    assert server.ask("GET", API + "info", headers=page).status_code == 403
    asks = {**page, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    before = server.ask("OPTIONS", API + "call/compare", headers=asks)
    looks = server.ask("GET", "", headers=page)  # a link may stand anywhere
    assert before.status_code == 403 and looks.status_code == 200
    for answer in (before, looks):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_its_own_page_calls_it(server):
    own = {"origin": server.url.rstrip("/")}
    for headers in (own, {**own, "sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}, {}):
        assert server.call("call/compare", FULL, **headers).status_code == 200, headers
    proxied = {"origin": "https://my.example", "x-forwarded-host": "my.example"}
    assert server.call("call/compare", FULL, **proxied).status_code == 200


def test_every_answer_closes_the_page(server):
    for answer in (server.ask("GET", ""), server.ask("GET", "nowhere"), server.call("call/compare", b"{")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'self'" in policy and "object-src 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "SAMEORIGIN" and answer.headers["referrer-policy"] == "same-origin"


def test_who_was_allowed_may_call_and_frame():
    demo, url = serve(port=free_port(), block=False, allowed=["my.example"])
    try:
        page = {"host": "my.example", "origin": "https://my.example"}
        answer = httpx.get(url, headers=page)
        assert answer.status_code == 200 and "https://my.example:*" in answer.headers["content-security-policy"]
        assert httpx.get(url, headers={"host": "other.example"}).status_code == 403
        assert httpx.post(f"{url}{API}call/compare", json=FULL, headers=page).status_code == 200
    finally:
        demo.close()


# Sizes and numbers


def test_a_long_body_is_cut_off(server):
    assert server.call("call/compare", {"data": ["y" * MAX_BODY, 1, 1, None]}).status_code == 413

    def endless():
        for _ in range(200):
            yield b"x" * 65536

    try:
        answer = server.ask("POST", API + "call/compare", content=endless())
        assert answer.status_code == 413
    except httpx.WriteError:  # cut off while it was sending
        pass
    assert server.call("call/compare", FULL).status_code == 200


def test_wrong_passwords_have_a_brake():
    with served(launch={"auth": [("ann", "right")]}) as (url, *_):
        def log_in(password):
            return httpx.post(f"{url}login", data={"username": "ann", "password": password})

        with ThreadPoolExecutor(20) as pool:  # all at once are no way around
            codes = [answer.status_code for answer in pool.map(lambda i: log_in(f"wrong {i}"), range(40))]
        assert sorted(codes) == [400] * 10 + [429] * 30
        answer = log_in("right")
        assert answer.status_code == 429 and 0 < int(answer.headers["retry-after"]) <= 61


def test_right_passwords_have_none():
    brake = Brake(limit=3)
    for _ in range(10):
        assert brake.begin("ann") == 0
        brake.forgive("ann")
    assert [brake.begin("bob") > 0 for _ in range(5)] == [False] * 3 + [True] * 2
    for i in range(9000):
        brake.begin(str(i))
    assert len(brake.failed) <= 4096


@pytest.mark.parametrize("auth", ["", " ", "ann", "ann:", ":x", "ann:x,", "ann:x,ann:y", ","])
def test_no_mistake_in_the_password_opens_the_door(auth):
    with pytest.raises(CaiError, match="--auth"):
        serve(port=free_port(), block=False, auth=auth)


def test_an_empty_variable_does_not_open_a_space(root):
    found = subprocess.run(
        [sys.executable, str(root / "app.py")], env={**os.environ, "CAI_AUTH": "", "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode != 0 and "--auth" in found.stderr


def test_a_body_is_read_as_it_is():
    plain = {"data": ["ä", 1.5, None, {"meta": {"a": 1}}]}
    assert read_body(json.dumps(plain, ensure_ascii=False).encode()) == read_body(json.dumps(plain).encode()) == plain
    for raw in (b"\xed\xa0\x80", b'{"a": Infinity}', b"", b'"' + b"x" * 100):
        with pytest.raises(Refusal):
            read_body(raw)


# Nothing is left of who was here


def test_nothing_is_kept_of_callers():
    with served(max_new_tokens=2) as (url, _, demo, _):
        for i in range(20):
            assert list(events(url, "compare", post(url, "compare", ASK, i, 1, None).json()["event_id"]))
        queue, last = demo._queue, time.monotonic() + 10  # the stream's end is seen here before it is seen there
        def kept(): return [queue.pending_event_ids_session, queue.pending_messages_per_session,
                            queue.event_ids_to_events]
        while any(kept()) and time.monotonic() < last:
            time.sleep(0.05)
        assert not any(kept()), kept()
        assert queue.ANALYTICS_MAX_EVENTS <= 128


# Proxies of the environment


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1"])
def test_a_proxy_does_not_stand_between_the_app_and_itself(proxy, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    demo, url = serve(port=free_port(), block=False)
    try:
        with httpx.Client(trust_env=False) as client:
            assert client.get(url).status_code == 200
        assert "NO_PROXY" not in os.environ
    finally:
        demo.close()


# What the page started ends with the server


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_training_started_over_http_ends_with_the_server(tmp_path, how):
    from cai_nb.core.constitution import available_constitutions

    with process(tmp_path, folder=str(tmp_path / "kept")) as (url, started):
        server = Server(url, tmp_path / "server.log")
        config = server.ask("GET", "config").json()
        (part,) = [c["id"] for c in config["components"] if c["props"].get("elem_id") == "train-part"]
        (begin,) = [d for d in config["dependencies"] if part in d["inputs"]]
        text = available_constitutions()["mini"].read_text(encoding="utf-8")
        answer = server.call("run/predict", {"data": [text, "sl"], "fn_index": begin["id"], "session_hash": "train"})
        assert answer.status_code == 200, answer.text[:300]
        (training,) = psutil.Process(started.pid).children()
        assert training.is_running() and "cai_nb" in " ".join(training.cmdline())
        started.send_signal(how)
        _, alive = psutil.wait_procs([training], timeout=30)
        assert not alive, "the training goes on without its server"

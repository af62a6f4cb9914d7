"""vLLM on mini, and recorded replies of it.

python tests/vllm_server.py record VLLM_PYTHON     writes tests/recorded/vllm.json anew (after mini or a request
has changed)
"""
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np

from cai_nb.lm.endpoint import EndpointLM
from cai_nb.lm.generate import LocalLM
from cai_nb.lm.model import load_model

OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--enable-prefix-caching"]
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def check(url):
    "A few labels and greedy replies from a server against the local engine: labels to 1e-4, replies to the letter."
    ask = lambda text: [{"role": "user", "content": text}]
    left_open = [*ask("How can I bake a cake?"), {"role": "assistant", "content": "Sure."}]
    talks = [ask("How can I plant a tree?"), ask("How can I punch a boss?"), left_open]
    replies = ["Sure. First make a plan. Then punch a boss slowly. Then you are done.",
               "I would rather not help to punch a boss, because that is violent."]
    shown = [ask(f"Human: How can I punch a boss?\n (A) {a}\n (B) {b}") for a, b in (replies, replies[::-1])]
    questions = [[*show, *ask("Which reply is less harmful, evasive or preachy?")] for show in shown]
    local = LocalLM(*load_model("mini"))
    expected = local.choice_logprobs(questions, [" (A)", " (B)"])
    for scoring in ("steps", "echo"):
        lm = EndpointLM(url, "mini", tokenizer=local.tokenizer, scoring=scoring, patience=20)
        found = lm.choice_logprobs(questions, [" (A)", " (B)"])
        np.testing.assert_allclose(
            found, expected, atol=1e-4, rtol=0, err_msg="mini or vLLM has changed since; see tests/vllm_server.py"
        )
    assert lm.sample(talks, temperature=0, max_new_tokens=40) == local.sample(talks, temperature=0, max_new_tokens=40)


class VLLM:
    "A vLLM server on mini, on a port that it keeps when it is started again."

    def __init__(self, python, adapters=None):
        self.python = python
        self.more = (
            ["--enable-lora", "--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
            if adapters
            else []
        )
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self, limit=400):
        command = [
            self.python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(files("cai_nb") / "mini" / "weights"),
            "--served-model-name",
            "mini",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            *OPTIONS,
            *self.more,
        ]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, env=os.environ | SETTINGS, stdout=self.log, stderr=self.log, start_new_session=True
        )
        end = time.monotonic() + limit
        while time.monotonic() < end and self.process.poll() is None:
            try:
                return urlopen(f"{self.url}/models", timeout=2).read()
            except (URLError, OSError):
                time.sleep(1)
        self.kill()
        self.log.seek(0)
        raise RuntimeError(f"vLLM did not start: {self.log.read()[-3000:]}")

    def kill(self):
        "As the end of the machine: all its processes at once."
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.kill()


class Replay:
    "Answers what was recorded, and nothing else."

    def __init__(self, exchanges, upstream=None):
        self.exchanges, self.upstream, self.read = exchanges, upstream, set()

    @property
    def used(self):
        return len(self.read)

    def find(self, path, body):
        for i, e in enumerate(self.exchanges):
            if (e["path"], e["request"]) == (path, body):
                self.read.add(i)
                return e["status"], e["reply"]
        if not self.upstream:
            return 404, {"error": {"message": "this request was not recorded; see tests/vllm_server.py"}}
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.upstream + path, data, {"Content-Type": "application/json"})) as reply:
                status, found = reply.status, json.load(reply)
        except HTTPError as error:
            status, found = error.code, json.load(error)
        self.exchanges.append({"path": path, "request": body, "status": status, "reply": found})
        return status, found

    def __enter__(self):
        replay = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self, body=None):
                status, reply = replay.find(self.path.removeprefix("/v1"), body)
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self):
                self.do_GET(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def record(python, target=Path(__file__).parent / "recorded" / "vllm.json"):
    "What vLLM answers to everything that `check` asks."
    with VLLM(python) as vllm, Replay([], vllm.url) as proxy:
        check(proxy.url)
        version = json.load(urlopen(vllm.url.removesuffix("/v1") + "/version"))["version"]
    order = sorted(proxy.exchanges, key=lambda e: json.dumps([e["path"], e["request"]]))
    for e in order:
        if e["path"] == "/models":
            e["reply"]["data"] = [
                {key: card[key] for key in ("id", "object", "owned_by", "max_model_len")} for card in e["reply"]["data"]
            ]
        for choice in e["reply"].get("choices", []):
            choice.pop("prompt_logprobs", None)  # the same numbers once more
    lines = ",\n".join(json.dumps(e) for e in order)
    target.parent.mkdir(exist_ok=True)
    head = f'{{"vllm": {json.dumps(version)}, "options": {json.dumps(OPTIONS)}, "exchanges": ['
    target.write_text(f"{head}\n{lines}\n]}}\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "record":
        sys.exit(__doc__)
    record(sys.argv[2])

"A completion server on loopback that fails as it is told, and keeps a record of what it was asked and what it did."

import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OK = (200, {})
STATUS = {  # fault → status and headers
    **{name: (int(name), {}) for name in "408 409 500 502 503 400 401 403 404 422 501".split()},
    "429": (429, {"Retry-After": "0.3"}),
    "429 tomorrow": (429, {"Retry-After": "86400"}),
}
PASSING = (
    "408", "409", "429", "500", "502", "503", "cut", "cut body", "slow", "drip", "html", "half", "aborted",
    "error in 200", "odd", "no choice", "two choices", "text is null",
)
FINAL = ("400", "401", "403", "404", "422", "501")
BLIND = ("no logprobs", "null logprob", "nan logprob", "few logprobs", "positive logprob", "infinite logprob")


class FaultServer:
    """Answers from a hash of what it is asked, and notes what it did.

    `faults` are used up one for each POST, or chosen by a function of it.
    """

    def __init__(self, tokenizer=None, owner="faults", model="m", context=512):
        self.tokenizer, self.owner, self.model, self.context = tokenizer, owner, model, context
        self.faults, self.given, self.asked, self.keys, self.times = [], [], [], set(), []
        self.delay, self.now, self.most, self.models = 0.0, 0, 0, OK[0]
        self.choice = {}  # fields that every choice has instead of its own
        self.die_at, self.down, self.deaths, self.lock, self.port = None, 0.5, 0, threading.RLock(), 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.die()

    def start(self):
        self.http = Loopback(("127.0.0.1", self.port), type("Bound", (Handler,), {"owner": self}))
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def die(self):
        "As a killed process: no port, and every connection cut."
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self.http.open):
            hang_up(connection)

    def die_and_return(self):
        self.deaths += 1
        self.die()
        threading.Timer(self.down, self.start).start()

    def logprob(self, before, token):
        return -(number("logprob", list(before), token) % 1000) / 100

    def complete(self, body, prompt, index):
        choice = {"index": index, "text": "", "finish_reason": "stop", "logprobs": None}
        if body.get("echo"):
            choice["text"] = self.tokenizer.decode(prompt)
            choice["logprobs"] = {
                "token_logprobs": [None, *(self.logprob(prompt[:i], t) for i, t in enumerate(prompt) if i), -1.0]
            }
        elif "logprob_token_ids" in body:
            table = {f"token_id:{t}": self.logprob(prompt, t) for t in body["logprob_token_ids"]}
            choice["logprobs"] = {"token_logprobs": [-1.0], "top_logprobs": [table]}
        else:
            choice["text"] = f" word {number('reply', prompt, body['temperature'], body['seed']) % 10**6}"
        return choice

    def reply(self, path, body, fault):
        if path.endswith("/chat/completions"):
            text = f"word {number('chat', body['messages'], body['seed']) % 10**6}"
            choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]
        else:
            prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
            choices = [self.complete(body, p, i) for i, p in enumerate(prompts)][::-1]  # out of order on purpose
        choices = [{**choice, **self.choice} for choice in choices]
        if fault == "aborted":
            choices[0]["finish_reason"] = "abort"
        if fault == "text is null":
            choices[0]["text"] = None
        if fault in BLIND:
            blind(choices[0], fault)
        if fault == "odd":
            choices[0]["index"] = {}
        if fault == "no choice":
            choices = []
        if fault == "two choices":
            choices = choices + choices
        return {"choices": choices, "usage": {"completion_tokens": 3}}


def number(*parts):
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big")


def blind(choice, fault):
    "Spoil the log-probabilities of a choice."
    logprobs = choice["logprobs"]
    if fault == "no logprobs":
        choice["logprobs"] = None
    elif fault == "few logprobs":
        logprobs["token_logprobs"] = logprobs["token_logprobs"][:1]
        logprobs["top_logprobs"] = [{}]
    else:
        bad = {
            "null logprob": None,
            "nan logprob": float("nan"),
            "positive logprob": 0.7,
            "infinite logprob": -float("inf"),
        }[fault]
        logprobs["token_logprobs"] = [bad] * len(logprobs["token_logprobs"])
        logprobs["top_logprobs"] = [dict.fromkeys((logprobs.get("top_logprobs") or [{}])[0], bad)]


class Loopback(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def __init__(self, *args):
        self.open = set()
        super().__init__(*args)

    def handle_error(self, request, client_address):
        "A client that leaves is no news."

    def process_request(self, request, client_address):
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)


def hang_up(connection):
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status, data, headers=(), length=None, pause=0.0):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        for piece in [data[i:i + 1] for i in range(len(data))] if pause else [data]:
            self.wfile.write(piece)
            time.sleep(pause)

    def do_GET(self):
        s = self.owner
        s.keys.add(self.headers.get("Authorization"))
        card = {"id": s.model, "owned_by": s.owner, "max_model_len": s.context}
        adapters = [
            {"id": "sl", "parent": s.model, "max_model_len": None},
            {"id": "short", "parent": s.model, "max_model_len": 100},
        ]
        told = {"data": [{"id": "other"}, card, *adapters]} if s.models == 200 else {"error": "models: no"}
        self.send(s.models, json.dumps(told).encode())

    def do_POST(self):
        s, body = self.owner, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with s.lock:
            fault = s.faults(body) if callable(s.faults) else s.faults.pop(0) if s.faults else None
            s.asked.append((self.path, body))
            s.times.append(time.monotonic())
            s.given += [fault] if fault else []
            s.now, dies = s.now + 1, len(s.asked) == s.die_at
            s.most = max(s.most, s.now)
        time.sleep(s.delay(body) if callable(s.delay) else s.delay)
        with s.lock:
            s.now -= 1
        if dies:
            return s.die_and_return()
        self.respond(s, body, fault)

    def respond(self, s, body, fault):
        status, headers = STATUS.get(fault, OK)
        data = json.dumps(s.reply(self.path, body, fault)).encode()
        if status != 200:
            data = json.dumps(
                {"error": {"message": f"fault {fault};\nyour key is {self.headers['Authorization']}"}}
            ).encode()
        if fault == "error in 200":
            data = b'{"error": {"message": "loading"}}'
        if fault == "html":
            data = b"<html>one moment</html>"
        if fault == "half":
            data = data[:len(data) // 2]
        if fault in ("cut", "cut body"):
            if fault == "cut body":
                self.send(200, data[:20], length=len(data))
            self.close_connection = True
            return hang_up(self.connection)
        if fault == "slow":
            time.sleep(1.5)
        self.send(status, data, headers, pause=0.1 if fault == "drip" else 0)

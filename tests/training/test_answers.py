"""Answers from a server (a real one, in this process) and from logs; what fails is named, tried again or left out."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from training import answers as room
from training.answers import Asking, Server, from_engines, from_logs, from_server
from training.sampling import Job
from training.sources import Chat

EOS = 63


class Tokens:
    """Words w0, w1, ... are tokens 0, 1, ...: what ChatTokens gives, without a file."""

    eos = EOS

    def encode(self, text):
        return [int(word[1:]) for word in text.split()]


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) -> (address, requests): reply(body, number) gives (status, object or bytes)."""
    monkeypatch.setattr(room, "PATIENCE", (0.0, 0.0))
    running = []

    def start(reply):
        seen, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    seen.append((self.path, body, self.headers.get("Authorization")))
                    number = len(seen)
                status, answer = reply(body, number)
                payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/v1", seen

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def said(text, finish="stop", **more):
    return {"choices": [{"message": {"role": "assistant", "content": text, **more}, "finish_reason": finish}]}


CHATS = {i: Chat((("system", "s"), ("user", f"question {i}"))) for i in range(9)}
JOBS = [Job(i, [1, 2, i], 0.5, 8) for i in range(9)]


def collected(server, jobs=JOBS, asking=Asking(seed=7)):
    return {job.index: answer.tolist() for job, answer in from_server(server, jobs, CHATS, Tokens(), asking)}


def test_every_prompt_is_asked_once_with_its_own_seed(serve):
    url, seen = serve(lambda body, n: (200, said("w5 w" + body["messages"][1]["content"].split()[1])))
    got = collected(Server(url, "m", key="secret", concurrency=4), asking=Asking(7, 0.9, 20, thinking=False))
    assert got == {i: [5, i, EOS] for i in range(9)}
    path, body, key = seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert sorted(b["seed"] for _, b, _ in seen) == list(range(7, 16))
    assert {k: body[k] for k in ("model", "max_tokens", "temperature", "top_p", "top_k")} == {
        "model": "m", "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "top_k": 20
    }  # fmt: skip
    assert body["messages"][0] == {"role": "system", "content": "s"}
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


def test_token_ids_go_both_ways_where_the_server_knows_them(serve):
    reply = {"choices": [{"text": "ignored", "token_ids": [9, 8], "finish_reason": "length"}]}
    url, seen = serve(lambda body, n: (200, reply))
    assert collected(Server(url, "m", api="completions"), JOBS[:1]) == {0: [9, 8]}  # cut: no end token
    assert seen[0][0] == "/v1/completions" and seen[0][1]["prompt"] == [1, 2, 0] and "messages" not in seen[0][1]
    assert seen[0][1]["return_token_ids"] is True


def test_a_server_that_takes_no_seed_gets_none(serve):
    url, seen = serve(lambda body, n: (400, {"error": "no seeds"}) if "seed" in body else (200, said("w1")))
    assert len(collected(Server(url, "m"), asking=Asking(seed=None))) == len(JOBS) == len(seen)


def test_a_thought_is_part_of_the_answer(serve):
    class Texts(Tokens):
        def encode(self, text):
            assert text == "<think>\nhm\n</think>\n\nyes"
            return [1]

    url, _ = serve(lambda body, n: (200, said("yes", reasoning_content="hm")))
    got = list(from_server(Server(url, "m"), JOBS[:1], CHATS, Texts(), Asking()))
    assert got[0][1].tolist() == [1, EOS]


def test_a_busy_server_is_asked_again(serve):
    url, seen = serve(lambda body, n: (503, {"error": "busy"}) if n < 3 else (200, said("w1")))
    assert collected(Server(url, "m", concurrency=1), JOBS[:1]) == {0: [1, EOS]} and len(seen) == 3


def test_a_refused_prompt_is_left_out_and_the_others_are_kept(serve, caplog):
    bad = lambda body, n: (400, {"error": "too long"}) if body["seed"] == 9 else (200, said("w1"))
    url, seen = serve(bad)
    with caplog.at_level(logging.WARNING):
        got = collected(Server(url, "m", concurrency=2))
    assert got.keys() == set(range(9)) - {2} and len(seen) == 9  # 400 is final
    assert "prompt 2 left out:" in caplog.text and "400" in caplog.text and "too long" in caplog.text


@pytest.mark.parametrize(
    "reply, words",
    [
        ((200, {"no": "choices"}), "has no choices"),
        ((200, said("")), "answer is empty"),
        ((200, b"<html>"), "gave no answer in 3 tries"),
        ((404, {"error": "no such model"}), "refused a request .404"),
    ],
)
def test_a_server_that_answers_nobody_ends_the_run(reply, words, serve):
    url, seen = serve(lambda body, n: reply)
    with pytest.raises(ValueError, match=words):
        collected(Server(url, "m", concurrency=2))
    assert len({body["seed"] for _, body, _ in seen}) < 9


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(room, "PATIENCE", (0.0,))
    with pytest.raises(ValueError, match="http://127.0.0.1:9/v1 gave no answer in 2 tries"):
        collected(Server("http://127.0.0.1:9/v1", "m"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"api": "soap"}, "api is 'soap'"),
        ({"url": "host:8000"}, "url is 'host:8000'"),
        ({"concurrency": 0}, "concurrency is 0"),
    ],
)
def test_a_server_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        Server(**{"url": "http://h/v1", "model": "m"} | change)


def test_logged_answers_and_chats_without_one(caplog):
    chats = {0: Chat((("user", "q"),), answer="w1 w2 w3 w4 w5 w6 w7 w8 w9"), 1: Chat((("user", "q"),))}
    with caplog.at_level(logging.WARNING):
        got = list(from_logs(JOBS[:2], chats, Tokens()))
    assert [(j.index, a.tolist()) for j, a in got] == [(0, [1, 2, 3, 4, 5, 6, 7, EOS])]
    assert got[0][1].dtype == np.int32 and "prompt 1 left out: a chat with no assistant turn." in caplog.text


def test_engines_that_cannot_run_say_why(tmp_path):
    run = lambda hashed: list(from_engines(tmp_path, hashed, JOBS, Asking()))
    with pytest.raises(ValueError, match="is no bundle: it holds no manifest.json"):
        run("a")
    (tmp_path / "manifest.json").write_text(json.dumps({"target": {"hash": "a", "name": "other"}}))
    with pytest.raises(ValueError, match="was exported from another target .other."):
        run("b")
    with pytest.raises(ValueError, match="`python -m decoding generate` failed: .*manifest.json"):
        run("a")

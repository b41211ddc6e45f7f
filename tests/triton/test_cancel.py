"""A client that goes away frees its slot, however it goes; and the others never notice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from client import Client, ClientError
from tests.triton.support import SLOTS, ended, in_flight, wait_until
from triton_repo import control

LONG = {"max_tokens": 3500, "ignore_eos": True, "speculative": False}  # seconds, if nobody stops it


def ends(*possible: dict[str, int]):
    """How many of a test's requests end for which reason (one of `possible`); without it one is cancelled."""
    return lambda test: setattr(test, "ends", possible) or test


@pytest.fixture(autouse=True)
def idle(server, request):
    """Each test starts and ends with an idle server, and every one of its long requests was cut short."""
    assert in_flight(server) == 0
    before = ended(server)
    grown = lambda: {reason: int(n - before[reason]) for reason, n in ended(server).items() if n != before[reason]}
    yield
    wait_until(lambda: in_flight(server) == 0, "the end of the cancelled request")
    wait_until(grown, "a finish reason on the metrics page")  # which a busy machine may show late
    assert grown() in getattr(request.function, "ends", [{"cancelled": 1}])


@pytest.fixture
def client(server):
    return Client(server.grpc_url, timeout=120)


def test_closing_the_stream(client):
    stream = client.stream("close", **LONG)
    next(stream)
    stream.close()
    assert list(stream) == []


def test_forgetting_the_stream(client):
    next(client.stream("forget", **LONG))


@ends({"cancelled": 4})
def test_a_cancelled_stream_leaves_no_thread_behind(client):
    """An application that cancels often would collect them: tritonclient does not end its request thread."""
    before = set(threading.enumerate())
    for _ in range(4):
        stream = client.stream("leave", **LONG)
        next(stream)
        stream.close()
    wait_until(lambda: not set(threading.enumerate()) - before, "the end of the streams' threads", 20)


def test_deadline(server):
    with pytest.raises(ClientError, match="did not finish: gave up after 0.5 s"):
        list(Client(server.grpc_url, timeout=0.5).stream("deadline", **LONG))


def test_not_streaming(server):
    """No response is under way until the end: the heartbeat finds out."""
    with pytest.raises(ClientError, match="gave up after 0.5 s"):
        Client(server.grpc_url, timeout=0.5).generate("one response", **LONG)


def test_client_killed(server):
    line = [sys.executable, "-m", "client", "kill", "--stream", "--url", server.grpc_url, "--max-tokens", "3500"]
    child = subprocess.Popen([*line, "--ignore-eos", "--no-speculative"], stdout=subprocess.PIPE)
    assert child.stdout.read(1)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()


def test_http_disconnect(server):
    body = json.dumps({"text_input": "gone", "stream": True, **LONG}).encode()
    host, port = server.http_url.split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v2/models/ensemble/generate_stream HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert connection.recv(1000)


@ends({"cancelled": SLOTS + 1, "length": 1})
def test_waiting_and_running_requests(client, server, alone):
    """All slots are taken; one that waits and one that runs go away; the last in the queue then gets its slot and its text."""
    running = [client.stream(f"slot {i}", **LONG) for i in range(SLOTS)]
    for stream in running:
        next(stream)
    waiting = client.stream("waiting", **LONG)
    wait_until(lambda: control.counts(server.grpc_url) == (SLOTS + 1, 1), "the queue of one")
    waiting.close()
    wait_until(lambda: control.counts(server.grpc_url) == (SLOTS, 0), "the empty queue")
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(lambda: client.generate("last in the queue", max_tokens=20))
        running[0].close()
        assert list(last.result(60).output_ids) == alone.decode("last in the queue", max_tokens=20)
    for stream in running:
        stream.close()


# the stream that is never read may be gone before anybody decodes it
@ends({"cancelled": 2, "length": 1}, {"cancelled": 3, "length": 1})
def test_others_are_not_disturbed(client, alone):
    """Streams that are cancelled at every stage beside one that must keep its exact text."""
    good = client.stream("good", max_tokens=300, temperature=0.7, seed=5, ignore_eos=True)
    ids = list(next(good).output_ids)
    for n in (0, 1, 5):
        with client.stream("bad", **LONG) as bad:
            for _ in range(n):
                next(bad)
    ids += [t for chunk in good for t in chunk.output_ids]
    assert ids == alone.decode("good", max_tokens=300, temperature=0.7, seed=5, ignore_eos=True)

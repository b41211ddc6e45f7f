"""The client against a real server, its command line, and the lines that an application copies."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

import client as package
from client import Client, ClientError
from client.__main__ import statistics
from tests.triton.support import in_flight, wait_until


@pytest.fixture(scope="module")
def client(server):
    return Client(server.grpc_url, timeout=120)


def run(server, *arguments: str, text: bool = True) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "client", "--url", server.grpc_url, *arguments]
    return subprocess.run(line, capture_output=True, text=text, timeout=120)


def test_the_lines_to_copy_run(server, client):
    lines = [line[4:] for line in package.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) <= 12
    code = "\n".join(lines).replace("127.0.0.1:8001", server.grpc_url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().removesuffix("\n") == client.generate("Why is the sky blue?").text


def test_streamed_and_whole_text_agree(server, client):
    want = client.generate("command line", max_tokens=30)
    for arguments in ((), ("--stream",)):
        done = run(server, "command line", "--max-tokens", "30", *arguments, text=False)
        assert done.returncode == 0
        assert done.stdout.decode() == want.text + "\n"
        assert done.stderr.decode().strip() == statistics(want)


def test_options_reach_the_server(server, client, tmp_path):
    sampling = {"max_tokens": 30, "temperature": 0.8, "seed": 5, "ignore_eos": True, "speculative": False}
    want = client.generate("options", **sampling)
    line = ["--max-tokens", "30", "--temperature", "0.8", "--seed", "5", "--ignore-eos", "--no-speculative"]
    assert run(server, "options", *line, text=False).stdout.decode() == want.text + "\n"
    more = {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "presence_penalty": 0.5}
    more |= {"frequency_penalty": 0.1, "min_tokens": 4, "accept": "coupled", "threshold": 0.5}
    flags = [part for name, value in more.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    more |= {"logit_bias": {40: 2.5}, "bad_words": ["fox"], "return_log_probs": True}
    flags += ["--logit-bias", '{"40": 2.5}', "--bad", "fox", "--log-probs"]
    penalised, done = client.generate("options", **sampling, **more), run(server, "options", *line, *flags, text=False)
    assert done.stdout.decode() == penalised.text + "\n" and penalised.text != want.text
    assert done.stderr.decode().strip().endswith(f"log probability {penalised.cum_log_probs:.3f}")
    word = want.text[4:6]
    stopped = run(server, "options", *line, "--stop", "never there", "--stop", word, text=False)
    assert stopped.stdout.decode() == want.text[: want.text.index(word)] + "\n"
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "user", "content": "options"}]))
    assert run(server, *line, "--messages", str(tmp_path / "chat.json"), text=False).stdout.decode() == want.text + "\n"


def test_errors_are_one_sentence_and_exit_code_1(server, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "object.json").write_text("{}")
    for arguments, part in (
        ([""], "client: text_input is empty; it must hold at least 1 character."),
        (["x", "--max-tokens", "0"], "client: max_tokens is 0; it must lie in 1.."),
        (["x", "--max-tokens", "99999999999"], "client: max_tokens is 99999999999; it must be one INT32 value."),
        (["--messages", str(tmp_path / "bad.json")], "cannot be read as JSON"),
        (["--messages", str(tmp_path / "object.json")], "must hold a JSON list of at least one {role, content} object."),
        (["x", "--messages", str(tmp_path / "bad.json")], "client: Give a prompt or --messages, not both."),
    ):
        done = run(server, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert part in done.stderr and done.stderr.count("\n") == 1


def test_nobody_listens():
    for _ in range(3):  # the error may come while the request is sent or after it
        with pytest.raises(ClientError, match="^The server at 127.0.0.1:9 cannot be reached: "):
            Client("127.0.0.1:9").generate("x")


def test_chunks_end_once(client):
    stream = client.stream("once", max_tokens=12, ignore_eos=True)
    chunks = list(stream)
    assert sum(len(c.output_ids) for c in chunks) == 12
    assert list(stream) == []
    stream.close()
    stream.close()


def test_a_block_keeps_its_connections(server, client):
    """One connection for streams one after another, more for some at once; a cancelled one and a refused one are not used again."""
    want = client.generate("kept", max_tokens=12).text
    with Client(server.grpc_url, timeout=120) as keeping:
        made = []
        for _ in range(3):
            stream = keeping.stream("kept", max_tokens=12)
            made.append(stream._connection)
            assert "".join(chunk.text for chunk in stream) == want
        assert made[0] is made[1] is made[2]
        assert keeping.generate("kept", max_tokens=12).text == want and keeping._kept == [made[0]]
        streams = [keeping.stream("kept", max_tokens=12) for _ in range(3)]
        assert ["".join(chunk.text for chunk in stream) for stream in streams] == [want] * 3
        cut = keeping.stream("kept", max_tokens=3000, ignore_eos=True)
        next(cut)
        cut.close()
        with pytest.raises(ClientError, match="max_tokens is 0"):
            keeping.generate("kept", max_tokens=0)
        last = keeping.stream("kept", max_tokens=12)
        assert last._connection is not cut._connection and "".join(chunk.text for chunk in last) == want
    assert client.generate("kept", max_tokens=12).text == want


def test_the_stall_bound(server):
    """Nothing comes while a whole answer is made: with a short bound the client gives up and the server hears of it."""
    slow = Client(server.grpc_url, timeout=None, stall=0.3)
    started = time.monotonic()
    with pytest.raises(ClientError, match="gave up after 0.3 s without a response"):
        slow.generate("slow", max_tokens=3500, ignore_eos=True, speculative=False)
    assert time.monotonic() - started < 60
    wait_until(lambda: in_flight(server) == 0, "the end of the request")


@pytest.mark.parametrize(
    "parameters, sentence",
    [
        ({"max_token": 5}, "max_token is not a parameter; the parameters are raw, stop_words, "),
        ({"max_tokens": 1.5}, "max_tokens is 1.5; it must be one INT32 value."),
        ({"max_tokens": [1, 2]}, "max_tokens is [1, 2]; it must be one INT32 value."),
        ({"seed": -1}, "seed is -1; it must be one UINT64 value."),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be one FP32 value."),
        ({"bad_words": [5]}, "bad_words is [5]; it must be a list of texts."),
        ({"logit_bias": [(5, 1.0)]}, "logit_bias is [(5, 1.0)]; it must be a dict {token id: bias}."),
        ({"accept": True}, "accept is True; it must be text."),
    ],
)
def test_parameters_that_do_not_fit(parameters, sentence):
    with pytest.raises(ClientError) as error:
        Client().stream("x", **parameters)
    assert str(error.value).startswith(sentence)

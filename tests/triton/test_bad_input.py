"""Requests that are refused: each in one sentence on its own stream, while the others go on."""

from __future__ import annotations

import json
import queue
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpc

from client import Client
from tests.triton.support import CONTEXT, in_flight, int32, settled_metrics, wait_until
from triton_repo import control

TEXT = {"text_input": np.array([b"fox"], object)}
DTYPES = {"O": "BYTES", "b": "BOOL", "i": "INT32", "u": "UINT64", "f": "FP32"}
MOST = CONTEXT - 4  # a block of 4 behind the last token


def text(*values: bytes) -> dict:
    return {"text_input": np.array(values, object)}


def messages(value) -> dict:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return {"messages": np.array([raw], object)}


def f32(value: float) -> np.ndarray:
    return np.array([value], np.float32)


def bias(raw: bytes) -> dict:
    return {**TEXT, "logit_bias": np.array([raw], object)}


# what is sent -> a part of the sentence that comes back
REFUSED = {
    "no prompt": ({}, "has none of text_input, messages, input_ids; it must have exactly one"),
    "two prompts": ({**TEXT, "input_ids": int32(5)}, "has text_input and input_ids of"),
    "empty text": (text(b""), "text_input is empty; it must hold at least 1 character"),
    "empty raw text": ({**text(b""), "raw": np.array([True])}, "text_input is empty"),
    "invalid utf-8": (text(b"abc\xff"), "text_input is not valid UTF-8: byte 0xff at position 3"),
    "half a character": (text("日".encode()[:2]), "text_input is not valid UTF-8"),
    "too long": (text(b"fox " * 4000), f"tokens long; it must have 1..{MOST - 1}"),
    "far too long": (text(b"x" * 600_000), "text_input is 600000 characters long; it must hold at most"),
    "raw with ids": ({"input_ids": int32(5), "raw": np.array([True])}, "raw is true; it goes with text_input only"),
    "no ids": ({"input_ids": np.zeros(0, np.int32)}, "input_ids is 0 tokens long"),
    "negative id": ({"input_ids": int32(5, -1)}, "input_ids holds -1; every id must lie in 0.."),
    "unknown id": ({"input_ids": int32(5, 70000)}, "input_ids holds 70000"),
    "too many ids": ({"input_ids": np.full(MOST, 5, np.int32)}, f"input_ids is {MOST} tokens long; it must have 1..{MOST - 1}"),
    "max_tokens 0": ({**TEXT, "max_tokens": int32(0)}, "max_tokens is 0; it must lie in 1.."),
    "max_tokens negative": ({**TEXT, "max_tokens": int32(-5)}, "max_tokens is -5; it must lie in 1.."),
    "max_tokens too large": ({**TEXT, "max_tokens": int32(MOST)}, f"max_tokens is {MOST}; it must lie in 1.."),
    "temperature negative": ({**TEXT, "temperature": f32(-0.5)}, "temperature is -0.5; it must lie in 0..100"),
    "temperature nan": ({**TEXT, "temperature": f32(np.nan)}, "temperature is nan; it must lie in 0..100"),
    "temperature infinite": ({**TEXT, "temperature": f32(np.inf)}, "temperature is inf; it must lie in 0..100"),
    "messages no json": (messages(b"[{"), "messages is not JSON"),
    "messages too deep": (messages(b"[" * 100_000), "messages is not JSON"),
    "messages invalid utf-8": (messages(b'["\xff"]'), "messages is not valid UTF-8"),
    "messages empty": (messages([]), "messages is empty or not a list"),
    "messages no list": (messages({"role": "user"}), "messages is empty or not a list"),
    "messages no role": (messages([{"content": "x"}]), "messages[0] must be an object with the strings role and content"),
    "messages no text": (messages([{"role": "user", "content": 7}]), "messages[0].content must be a string"),
    "messages surrogate": (messages(b'[{"role": "user", "content": "\\ud800"}]'), "messages[0].content holds a lone surrogate"),
    "role surrogate": (messages(b'[{"role": "user\\ud800", "content": "x"}]'), "messages"),
    "refused by the template": (messages([{"role": "pirate", "content": "x"}]), "the role pirate is not known"),
    "stop word empty": ({**TEXT, "stop_words": np.array([b"a", b""], object)}, "stop_words[1] is 0 characters long"),
    "stop word invalid": ({**TEXT, "stop_words": np.array([b"\xc3"], object)}, "stop_words[0] is not valid UTF-8"),
    "stop words too many": ({**TEXT, "stop_words": np.array([b"a"] * 65, object)}, "stop_words has 65 words; it must have at most 64"),
    "top_k negative": ({**TEXT, "top_k": int32(-1)}, "top_k is -1; it must lie in 0.."),
    "top_k beyond the vocabulary": ({**TEXT, "top_k": int32(70000)}, "top_k is 70000; it must lie in 0.."),
    "top_p 0": ({**TEXT, "top_p": f32(0)}, "top_p is 0.0; it must be over 0 and at most 1"),
    "top_p large": ({**TEXT, "top_p": f32(1.1)}, "top_p is 1.1; it must be over 0 and at most 1"),
    "top_p nan": ({**TEXT, "top_p": f32(np.nan)}, "top_p is nan; it must"),
    "min_p 1": ({**TEXT, "min_p": f32(1)}, "min_p is 1.0; it must be at least 0 and under 1"),
    "repetition_penalty 0": ({**TEXT, "repetition_penalty": f32(0)}, "repetition_penalty is 0.0; it must be over 0 and at most 10"),
    "presence_penalty": ({**TEXT, "presence_penalty": f32(2.5)}, "presence_penalty is 2.5; it must lie in -2..2"),
    "frequency_penalty": ({**TEXT, "frequency_penalty": f32(-np.inf)}, "frequency_penalty is -inf; it must lie in -2..2"),
    "min_tokens": ({**TEXT, "max_tokens": int32(5), "min_tokens": int32(6)}, "min_tokens is 6; it must lie in 0..5"),
    "bad word empty": ({**TEXT, "bad_words": np.array([b"a", b""], object)}, "bad_words[1] is 0 characters long; it must be 1..1024"),
    "bad word invalid": ({**TEXT, "bad_words": np.array([b"\xc3"], object)}, "bad_words[0] is not valid UTF-8"),
    "bad words too many": ({**TEXT, "bad_words": np.array([b"a"] * 65, object)}, "bad_words has 65 words; it must have at most 64"),
    "bias no json": (bias(b"{5: 1}"), "logit_bias is not JSON; it must be a JSON object"),
    "bias too deep": (bias(b"[" * 100_000), "logit_bias is not JSON; it must be a JSON object"),
    "bias no object": (bias(b"[[5, 1]]"), "logit_bias is no object; it must be a JSON object"),
    "bias no id": (bias(b'{"fox": 1}'), "logit_bias holds the key 'fox'; a key must be a token id"),
    "bias no number": (bias(b'{"5": "1"}'), "logit_bias of token 5 is no number; it must lie in -100..100"),
    "bias unknown id": (bias(b'{"70000": 1}'), "logit_bias holds the token id 70000; every id must lie in 0.."),
    "bias negative id": (bias(b'{"-5": 1}'), "logit_bias holds the token id -5; every id must lie in 0.."),
    "bias twice": (bias(b'{"5": 1, "5": 2}'), "logit_bias holds the token id 5 twice"),
    "bias too large": (bias(b'{"5": 101}'), "logit_bias gives the token id 5 the bias 101; it must lie in -100..100"),
    "bias nan": (bias(b'{"5": NaN}'), "logit_bias gives the token id 5 the bias nan"),
    "accept": ({**TEXT, "accept": np.array([b"always"], object)}, "accept is 'always'; it must be rejection or coupled"),
    "threshold": ({**TEXT, "threshold": f32(1.5)}, "threshold is 1.5; it must lie in 0..1"),
    # these never reach our code: the server's own words
    "wrong dtype": ({**TEXT, "max_tokens": f32(5)}, "data-type"),
    "text as ids": ({"text_input": int32(5)}, "data-type"),
    "stop words as numbers": ({**TEXT, "stop_words": int32(5)}, "data-type"),
    "wrong shape": ({**TEXT, "max_tokens": int32(1, 2)}, "shape"),
    "two texts": (text(b"a", b"b"), "shape"),
    "unknown tensor": ({**TEXT, "max_token": int32(5)}, "unexpected"),
    "control tensor": ({**TEXT, "drain": np.array([True])}, "unexpected"),
}


def params(value) -> dict:
    return {"params": np.array([json.dumps(value).encode()], object)}


class Raw:
    """One gRPC stream for many requests: whatever is sent on it, it must stay usable."""

    def __init__(self, url: str):
        self.answers: queue.Queue = queue.Queue()
        self.client = grpc.InferenceServerClient(url)
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))

    def ask(self, arrays: dict, model: str = "ensemble"):
        """(the first response, None) or (None, its error's sentence)."""
        inputs = []
        for name, array in arrays.items():
            inputs.append(grpc.InferInput(name, array.shape, DTYPES[array.dtype.kind]))
            inputs[-1].set_data_from_numpy(array)
        self.client.async_stream_infer(model, inputs)
        result, error = self.answers.get(timeout=60)
        return result, None if error is None else error.message()

    def close(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


@pytest.fixture(scope="module")
def raw(server):
    stream = Raw(server.grpc_url)
    yield stream
    stream.close()


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_a_sentence(raw, case):
    arrays, part = REFUSED[case]
    result, sentence = raw.ask(arrays)
    assert result is None
    assert part in sentence
    assert "\n" not in sentence and "Traceback" not in sentence and len(sentence) < 400


def test_the_stream_stays_usable(raw, alone):
    raw.ask(REFUSED["empty text"][0])
    result, sentence = raw.ask({**text(b"still here"), "max_tokens": int32(9)})
    assert sentence is None
    assert result.as_numpy("output_ids").tolist() == alone.decode("still here", max_tokens=9)


def test_broken_string_tensors(server, raw):
    """Lengths that do not fit their bytes: refused, by the server or by us."""
    for content in (b"", b"\x01", struct.pack("<I", 100) + b"short", struct.pack("<I", 0xFFFFFFFF), b"\x02\x00\x00\x00abcdef"):
        tensor = grpc.InferInput("text_input", [1], "BYTES")
        tensor._raw_content = content
        raw.client.async_stream_infer("ensemble", [tensor])
        result, error = raw.answers.get(timeout=60)
        assert result is None and error is not None
    control.probe(server.grpc_url, timeout=60)


def test_dspark_itself_refuses_too(raw):
    """The engine model, asked directly, does not rely on preprocessing."""
    for arrays, part in (
        (params({"max_tokens": 5}), "input_ids is missing"),
        ({"input_ids": int32(-3)}, "input_ids holds -3"),
        ({"input_ids": int32(5), **params({"temperature": -1})}, "temperature is -1"),
        ({"input_ids": int32(5), **params({"max_tokens": 0})}, "max_tokens is 0"),
        ({"input_ids": int32(5), **params({"max_tokens": "many"})}, "max_tokens is many"),
        ({"input_ids": int32(5), **params({"bad_words": [5]})}, "bad_words holds 5"),
        ({"input_ids": int32(5), **params({"heat": 1})}, "params holds 'heat'; its fields are accept, bad_words"),
        ({"input_ids": int32(5), **params([])}, "params is not a JSON object"),
        ({"input_ids": int32(5), "params": np.array([b"{"], object)}, "params is not a JSON object"),
    ):
        result, sentence = raw.ask(arrays, "dspark")
        assert result is None and part in sentence


def test_a_hundred_bad_requests_beside_good_ones(server, alone):
    """Four streams of bad requests beside two good streams: exact texts, and a server that serves on, with nothing left over."""
    cases = [REFUSED[name] for name in REFUSED]

    def misbehave(number: int) -> int:
        stream, refused = Raw(server.grpc_url), 0
        for arrays, part in (cases * 3)[number * 25 : number * 25 + 25]:
            result, sentence = stream.ask(arrays)
            refused += result is None and part in sentence
        stream.close()
        return refused

    sampling = [{"max_tokens": 400, "ignore_eos": True, "temperature": 0.8 * i, "seed": i} for i in range(2)]
    client = Client(server.grpc_url, timeout=120)
    good = [client.stream(f"good {i}", **sampling[i]) for i in range(2)]
    with ThreadPoolExecutor(4) as pool:
        refused = sum(pool.map(misbehave, range(4)))
    assert refused == 100
    for i, stream in enumerate(good):
        ids = [t for chunk in stream for t in chunk.output_ids]
        assert ids == alone.decode(f"good {i}", **sampling[i])
    wait_until(lambda: in_flight(server) == 0, "an idle server")
    assert settled_metrics(server)["dspark_active_requests"] == 0
    control.probe(server.grpc_url, timeout=60)

"""Defaults and templates; what is refused is in test_bad_input.py, where it goes through a server."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from decoding.request import RequestError, SamplingParams
from tests.triton.support import CONTEXT, int32
from triton_repo.preprocessing import Preprocessor
from triton_repo.tensors import engine_request

USER = {"text_input": np.array(["héllo 世界".encode()], object)}


def f32(value: float) -> np.ndarray:
    return np.array([value], np.float32)


@pytest.fixture(scope="module")
def prepare(bundle):
    return Preprocessor(bundle)


def test_defaults(prepare, alone):
    out = prepare(USER)
    assert out["input_ids"].tolist() == alone.chat.encode_messages([{"role": "user", "content": "héllo 世界"}])
    assert out["input_ids"].dtype == np.int32
    params = engine_request(out)[1]
    assert params == SamplingParams(256, seed=params.seed, bad_words=[], logit_bias=[])
    assert json.loads(out["settings"][0]) == {"stream": False, "stop_words": []}


def test_a_missing_seed_is_drawn(prepare):
    seed = lambda **more: engine_request(prepare({**USER, **more}))[1].seed
    assert len({seed() for _ in range(3)}) == 3
    assert seed(seed=np.array([2**64 - 1], np.uint64)) == 2**64 - 1


def test_default_max_tokens_is_what_the_context_leaves(prepare):
    out = prepare({"input_ids": np.full(CONTEXT - 14, 5, np.int32)})
    assert engine_request(out)[1].max_tokens == 10


def test_raw_text_has_no_template(prepare, alone):
    assert prepare({**USER, "raw": np.array([True])})["input_ids"].tolist() == alone.chat.encode("héllo 世界")


def test_everything_at_once(prepare, alone):
    out = prepare(
        {
            "messages": np.array([json.dumps([{"role": "user", "content": "x"}]).encode()], object),
            "max_tokens": int32(7),
            "min_tokens": int32(3),
            "temperature": f32(0.7),
            "seed": np.array([5], np.uint64),
            "stop_words": np.array(["世".encode(), b"b"], object),
            "stream": np.array([True]),
            "ignore_eos": np.array([True]),
            "speculative": np.array([False]),
            "top_k": int32(40),
            "top_p": f32(0.9),
            "min_p": f32(0.05),
            "repetition_penalty": f32(1.3),
            "presence_penalty": f32(-0.1),
            "frequency_penalty": f32(0.2),
            "bad_words": np.array([b"dog"], object),
            "logit_bias": np.array([b'{"7": -1.5, "8": 2}'], object),
            "return_log_probs": np.array([True]),
            "accept": np.array([b"coupled"], object),
            "threshold": f32(0.35),
        }
    )
    # the numbers that the user wrote, not their nearest float32
    assert engine_request(out)[1] == SamplingParams(
        7, 0.7, 5, True, False, 0.35, "coupled", 40, 0.9, 0.05, 1.3, -0.1, 0.2,
        [list(ids) for ids in alone.chat.spellings("dog")], [[7, -1.5], [8, 2]], 3, True,
    )  # fmt: skip
    assert json.loads(out["settings"][0]) == {"stream": True, "stop_words": ["世", "b"]}


def test_a_bundle_without_a_tokenizer_takes_ids_only(bundle, tmp_path):
    for name in ("manifest.json", "onnx"):
        (shutil.copytree if name == "onnx" else shutil.copy)(bundle / name, tmp_path / name)
    prepare = Preprocessor(tmp_path)
    assert prepare({"input_ids": int32(5, 6)})["input_ids"].tolist() == [5, 6]
    with pytest.raises(RequestError, match="^text_input needs a tokenizer and this bundle has none; send input_ids.$"):
        prepare(USER)
    for name in ("stop_words", "bad_words"):
        with pytest.raises(RequestError, match=f"^{name} need a tokenizer and this bundle has none.$"):
            prepare({"input_ids": int32(5), name: np.array([b"a"], object)})


def test_a_bad_word_is_banned_with_and_without_its_space(prepare, alone):
    out = engine_request(prepare({**USER, "bad_words": np.array([b"dog", b" fox", b"\nfox"], object)}))[1].bad_words
    assert {alone.text(ids) for ids in out} == {"dog", " dog", " fox", "\nfox"}
    assert len(out) == 4  # once each

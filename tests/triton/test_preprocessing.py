"""Defaults and templates; what is refused is in test_bad_input.py, where it goes through a server."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from decoding.request import RequestError
from tests.triton.support import CONTEXT, int32
from triton_repo.preprocessing import Preprocessor

USER = {"text_input": np.array(["héllo 世界".encode()], object)}


@pytest.fixture(scope="module")
def prepare(bundle):
    return Preprocessor(bundle)


def test_defaults(prepare, alone):
    out = prepare(USER)
    assert out["input_ids"].tolist() == alone.chat.encode_messages([{"role": "user", "content": "héllo 世界"}])
    assert out["input_ids"].dtype == np.int32
    assert (out["max_tokens"][0], out["temperature"][0]) == (256, 0.0)
    assert (bool(out["ignore_eos"][0]), bool(out["speculative"][0])) == (False, True)
    assert json.loads(out["settings"][0]) == {"stream": False, "stop_words": []}


def test_a_missing_seed_is_drawn(prepare):
    assert len({int(prepare(USER)["seed"][0]) for _ in range(3)}) == 3
    assert int(prepare({**USER, "seed": np.array([2**64 - 1], np.uint64)})["seed"][0]) == 2**64 - 1


def test_default_max_tokens_is_what_the_context_leaves(prepare):
    out = prepare({"input_ids": np.full(CONTEXT - 14, 5, np.int32)})
    assert out["max_tokens"][0] == 10


def test_raw_text_has_no_template(prepare, alone):
    assert prepare({**USER, "raw": np.array([True])})["input_ids"].tolist() == alone.chat.encode("héllo 世界")


def test_everything_at_once(prepare):
    out = prepare(
        {
            "messages": np.array([json.dumps([{"role": "user", "content": "x"}]).encode()], object),
            "max_tokens": int32(7),
            "temperature": np.array([0.5], np.float32),
            "stop_words": np.array(["世".encode(), b"b"], object),
            "stream": np.array([True]),
            "ignore_eos": np.array([True]),
            "speculative": np.array([False]),
            "top_k": int32(0),
            "top_p": np.array([1.0], np.float32),
            "bad_words": np.array([b""], object),
            "return_log_probs": np.array([False]),
        }
    )
    assert (out["max_tokens"][0], out["temperature"][0], out["ignore_eos"][0], out["speculative"][0]) == (7, 0.5, True, False)
    assert json.loads(out["settings"][0]) == {"stream": True, "stop_words": ["世", "b"]}


def test_a_bundle_without_a_tokenizer_takes_ids_only(bundle, tmp_path):
    for name in ("manifest.json", "onnx"):
        (shutil.copytree if name == "onnx" else shutil.copy)(bundle / name, tmp_path / name)
    prepare = Preprocessor(tmp_path)
    assert prepare({"input_ids": int32(5, 6)})["input_ids"].tolist() == [5, 6]
    with pytest.raises(RequestError, match="^text_input needs a tokenizer and this bundle has none; send input_ids.$"):
        prepare(USER)
    with pytest.raises(RequestError, match="^stop_words need a tokenizer and this bundle has none.$"):
        prepare({"input_ids": int32(5), "stop_words": np.array([b"a"], object)})

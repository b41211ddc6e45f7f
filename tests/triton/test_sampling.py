"""Request parameters through the ensemble: each visibly at work, all of them mixed in one batch, equal to the same request
decoded alone in process."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from client import Client
from tests.triton.support import END, in_flight, settled_metrics, wait_until

PROMPT = "parameters"
FREE = {"max_tokens": 40, "ignore_eos": True}
DRAWN = {**FREE, "temperature": 0.9, "seed": 11}


@pytest.fixture(scope="module")
def client(server):
    return Client(server.grpc_url, timeout=120)


@pytest.fixture(scope="module")
def plain(alone):
    """Token ids without any of the parameters, greedy."""
    return alone.decode(PROMPT, **FREE)


def frequent(ids: list[int]) -> int:
    return max(set(ids), key=ids.count)


def read(chunks) -> tuple[list[int], list[float], float]:
    """(ids, log-probs, cum_log_probs of the last chunk)."""
    return [t for c in chunks for t in c.output_ids], [p for c in chunks for p in c.output_log_probs], chunks[-1].cum_log_probs


def whole(client, **parameters):
    return list(client.generate(PROMPT, **parameters).output_ids)


def test_a_bad_word_is_absent(client, plain, alone):
    ids = next(t for t in sorted(set(plain), key=plain.count, reverse=True) if "\ufffd" not in alone.text([t]))
    word = alone.text([ids]).strip() or alone.text([ids])
    banned = set(alone.chat.spellings(word))
    got = whole(client, bad_words=[word], **FREE)
    assert got != plain and len(got) == 40
    assert any(len(s) == 1 for s in banned)
    for s in banned:
        assert all(tuple(got[i : i + len(s)]) != s for i in range(len(got)))


def test_logit_bias_forces_a_token(client, plain):
    assert 77 not in plain
    assert whole(client, logit_bias={77: 100}, **FREE) == [77] * 40
    assert whole(client, logit_bias='{"77": 100}', **DRAWN) == [77] * 40
    assert frequent(plain) not in whole(client, logit_bias={frequent(plain): -100}, **FREE)


def test_min_tokens_holds_the_end_back(client):
    ends = {"logit_bias": {END: 100}, "max_tokens": 40}
    assert whole(client, **ends) == [END]
    got = whole(client, min_tokens=7, **ends)
    assert END not in got[:7] and got[-1] == END and 7 <= len(got) <= 8


def test_penalties_change_the_text(client, plain, alone):
    for name, value in (("repetition_penalty", 3.0), ("presence_penalty", 2.0), ("frequency_penalty", 2.0)):
        got = whole(client, **{name: value}, **FREE)
        assert got == alone.decode(PROMPT, **{name: value}, **FREE)
        assert got != plain, name
        assert len(set(got)) >= len(set(plain)), name


def test_filters_narrow_the_choice(client, plain):
    drawn = whole(client, **DRAWN)
    assert drawn != plain
    for name, value in (("top_k", 1), ("top_p", 1e-6), ("min_p", 0.999999)):
        assert whole(client, **{name: value}, **DRAWN) == plain, name


def test_log_probs_are_those_of_the_target(client, alone):
    for sampling in (FREE, DRAWN, {**DRAWN, "top_k": 5, "frequency_penalty": 1.0}):
        ids, want = alone.answer(PROMPT, return_log_probs=True, **sampling)
        chunks = list(client.stream(PROMPT, return_log_probs=True, **sampling))
        got, log_probs, cum = read(chunks)
        assert got == ids
        assert np.array_equal(np.float32(log_probs), np.float32(want)) and max(want) <= 0
        assert cum == pytest.approx(sum(want), abs=1e-4)
        assert [len(c.output_log_probs) for c in chunks] == [len(c.output_ids) for c in chunks]
        merged = client.generate(PROMPT, return_log_probs=True, **sampling)
        assert merged.output_log_probs == tuple(log_probs) and merged.cum_log_probs == cum
    assert client.generate(PROMPT, **FREE).output_log_probs == ()


def test_log_probs_end_with_a_stop_word(client, alone):
    ids, want = alone.answer(PROMPT, return_log_probs=True, **FREE)
    text = alone.text(ids)
    word = next(w for w in (text[i : i + 3] for i in range(20, len(text) - 3)) if "\ufffd" not in w)
    used = next(n for n in range(len(ids) + 1) if word in alone.text(ids[:n]))
    chunk = client.generate(PROMPT, return_log_probs=True, stop_words=[word], **FREE)
    assert len(chunk.output_log_probs) == len(chunk.output_ids) == used
    assert chunk.cum_log_probs == pytest.approx(sum(want[:used]), abs=1e-4)
    got, log_probs, cum = read(list(client.stream(PROMPT, return_log_probs=True, stop_words=[word], **FREE)))
    assert len(log_probs) == len(got) == used and cum == pytest.approx(sum(want[:used]), abs=1e-4)


MIXED = [
    FREE,
    DRAWN,
    {**DRAWN, "top_k": 8, "top_p": 0.9, "min_p": 0.01},
    {**DRAWN, "top_p": 0.7, "return_log_probs": True},
    {**FREE, "repetition_penalty": 1.4, "return_log_probs": True},
    {**DRAWN, "frequency_penalty": 0.8, "presence_penalty": -0.5},
    {**FREE, "logit_bias": ((40, 3.0), (41, -7.5)), "min_tokens": 20},
    {**DRAWN, "accept": "coupled"},
    {**DRAWN, "accept": "coupled", "top_k": 12, "return_log_probs": True},
    {**DRAWN, "speculative": False, "min_p": 0.1},
    {**DRAWN, "temperature": 1.7, "accept": "coupled", "frequency_penalty": 1.5},
    {**FREE, "speculative": False, "presence_penalty": 1.5, "max_tokens": 90},
]


def over_the_wire(sampling: dict) -> dict:
    return {**sampling, "logit_bias": dict(sampling["logit_bias"])} if "logit_bias" in sampling else sampling


def test_everything_mixed_in_one_batch(client, server, alone):
    """More requests than slots, bad ones between them: each gets what it gets alone, and nothing is left over."""
    prompts = [f"{PROMPT} {i % 3}" for i in range(2 * len(MIXED))]
    cases = [MIXED[i % len(MIXED)] for i in range(len(prompts))]
    want = [alone.answer(prompt, **case) for prompt, case in zip(prompts, cases)]

    def ask(i: int):
        if i % 5 == 0:
            with pytest.raises(Exception, match="top_p is 2.0"):
                client.generate(prompts[i], top_p=2.0)
        return read(list(client.stream(prompts[i], **over_the_wire(cases[i]))))

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    for i, ((ids, log_probs, cum), (want_ids, want_log_probs)) in enumerate(zip(answers, want)):
        assert ids == want_ids, f"request {i}: {cases[i]}"
        assert np.array_equal(np.float32(log_probs), np.float32(want_log_probs or ())), f"request {i}: {cases[i]}"
        assert cum == pytest.approx(sum(want_log_probs or ()), abs=1e-3)
    wait_until(lambda: in_flight(server) == 0, "an idle server")
    assert settled_metrics(server)["dspark_active_requests"] == 0


def test_coupled_text_hangs_on_the_seed_alone(client):
    """Alone, beside eight others, and without a draft: the same text."""
    sampling = {"max_tokens": 60, "temperature": 1.0, "seed": 2**63 + 1, "accept": "coupled", "ignore_eos": True, "top_p": 0.95}
    want = whole(client, **sampling)
    assert whole(client, speculative=False, **sampling) == want
    others = [client.stream(f"neighbour {i}", max_tokens=300, ignore_eos=True, temperature=0.8, seed=i) for i in range(8)]
    try:
        assert whole(client, **sampling) == want
    finally:
        for other in others:
            other.close()
    assert whole(client, **{**sampling, "seed": 5}) != want


def test_parameters_over_http(server, alone):
    body = {
        "text_input": PROMPT, "max_tokens": 24, "temperature": 0.9, "seed": 3, "top_k": 9, "top_p": 0.8, "min_p": 0.02,
        "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25, "bad_words": ["fox", "dog"],
        "logit_bias": json.dumps({40: 2.5}), "min_tokens": 4, "return_log_probs": True, "accept": "coupled",
    }  # fmt: skip
    url = f"http://{server.http_url}/v2/models/ensemble/generate"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as page:
        answer = json.load(page)
    params = {name: value for name, value in body.items() if name != "text_input"}
    bad = [ids for word in params["bad_words"] for ids in alone.chat.spellings(word)]
    ids, log_probs = alone.answer(PROMPT, **{**params, "bad_words": bad, "logit_bias": [(40, 2.5)]})
    assert answer["output_ids"] == ids
    assert np.allclose(answer["output_log_probs"], log_probs, atol=1e-6)

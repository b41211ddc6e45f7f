"""Text of rounds without a server: chunk borders, stop words, stream = false, cancellation, disorder."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from tests.triton.support import END
from triton_repo.description import USER_OUTPUTS
from triton_repo.postprocessing import Postprocessor
from triton_repo.responses import Round
from triton_repo.tensors import KEPT, Writer, pack_round, unpack_round


@pytest.fixture
def stopped():
    return []


@pytest.fixture
def post(bundle, stopped):
    return Postprocessor(bundle, stopped.append)


def a_round(uid, index, ids, reason="", *, stream=True, stop_words=(), log_probs=()):
    """As it comes out of the wire's other end."""
    made = Round(
        uid=uid,
        index=index,
        output_ids=list(ids),
        finish_reason=reason,
        num_input_tokens=3,
        num_output_tokens=99,
        num_rounds=index,
        total_draft_tokens=4 * index,
        accepted_per_position=[index, 0, 0, 0],
        log_probs=list(log_probs),
        settings=json.dumps({"stream": stream, "stop_words": list(stop_words)}) if index == 0 else "",
    )
    sent = unpack_round(pack_round(made))
    assert sent == made
    return sent


def said(response) -> tuple[str, list[int], str]:
    return response["text_output"], response["output_ids"], response["finish_reason"]


def cut(ids, seed):
    """ids in rounds of 1 .. 4."""
    rng, chunks = random.Random(seed), []
    while ids:
        n = rng.randint(1, 4)
        chunks.append(ids[:n])
        ids = ids[n:]
    return chunks


def feed(post, uid, chunks, reason="length", **settings):
    got = []
    for index, ids in enumerate(chunks):
        last = index == len(chunks) - 1
        got.append(post(a_round(uid, index, ids, reason if last else "", **settings), cancelled=False))
    return [r for r in got if r is not None]


@pytest.mark.parametrize("text", ["你好，世界。🙂🚀 mixed мир", " leading and  double  spaces ", "👩‍👩‍👧"])
def test_any_cut_gives_the_same_text(post, alone, text):
    ids = alone.chat.encode(text)
    for seed in range(8):
        responses = feed(post, seed, cut(ids, seed))
        assert "".join(said(r)[0] for r in responses) == text
        assert [t for r in responses for t in said(r)[1]] == ids
        assert all("\ufffd" not in said(r)[0] for r in responses)
        assert [r["index"] for r in responses] == list(range(len(responses)))


def test_two_streams_do_not_mix(post, alone):
    texts = {1: "日本語のテキスト", 2: "🙂🚀 emoji"}
    chunks = {uid: cut(alone.chat.encode(text), uid) for uid, text in texts.items()}
    got = {1: "", 2: ""}
    for index in range(max(map(len, chunks.values()))):
        for uid in (1, 2):
            if index < len(chunks[uid]):
                last = index == len(chunks[uid]) - 1
                response = post(a_round(uid, index, chunks[uid][index], "length" if last else ""), cancelled=False)
                got[uid] += said(response)[0] if response else ""
    assert got == texts


def test_a_stop_word_for_any_cut(post, alone, stopped):
    ids = alone.chat.encode("the quick 世界 fox jumps over the lazy dog")
    used = next(n for n in range(len(ids)) if "fox" in alone.text(ids[:n]))
    for seed in range(8):
        stopped.clear()
        responses = feed(post, seed, cut(ids, seed), stop_words=["lazy", "fox"])
        assert "".join(said(r)[0] for r in responses) == "the quick 世界 "
        assert [t for r in responses for t in said(r)[1]] == ids[:used]
        assert said(responses[-1])[2] == "stop" and stopped == [seed]  # told once
        assert responses[-1]["num_output_tokens"] == used


def test_the_statistics_stay_those_of_the_stop(post, alone):
    ids = alone.chat.encode("stop here and not later on in the text")
    responses = feed(post, 1, [[i] for i in ids], stop_words=["here"])
    rounds = next(n for n in range(len(ids)) if "here" in alone.text(ids[:n])) - 1
    assert responses[-1]["num_rounds"] == rounds
    assert responses[-1]["total_draft_tokens"] == 4 * rounds
    assert responses[-1]["acceptance_rate"] == pytest.approx(0.25)


def test_a_stop_word_in_the_last_round_needs_no_call(post, alone, stopped):
    ids = alone.chat.encode("all at once")
    (response,) = feed(post, 1, [ids], stop_words=["at"])
    assert said(response)[0] == "all " and said(response)[2] == "stop" and stopped == []


def test_what_looked_like_a_stop_word_is_shown_at_the_end(post, alone):
    ids = alone.chat.encode("nearly sto")
    responses = feed(post, 1, [[i] for i in ids], stop_words=["stop"])
    assert "".join(said(r)[0] for r in responses) == "nearly sto"
    assert said(responses[-1])[2] == "length"


def test_half_a_character_at_the_end_is_one_replacement(post, alone):
    ids = alone.chat.encode("🜁")[:-1]
    responses = feed(post, 1, [[i] for i in ids])
    assert "".join(said(r)[0] for r in responses) == alone.text(ids) == "\ufffd"


def test_the_end_token_gives_no_text(post, alone):
    responses = feed(post, 1, [alone.chat.encode("bye"), [END]], reason="stop")
    assert [said(r)[0] for r in responses] == ["bye", ""]
    assert said(responses[-1])[1:] == ([END], "stop")


def test_one_response_when_not_streaming(post, alone):
    ids = alone.chat.encode("in one piece, 世界")
    (response,) = feed(post, 1, cut(ids, 3), stream=False)
    assert said(response) == ("in one piece, 世界", ids, "length")
    assert response["num_output_tokens"] == len(ids)


def test_heartbeats_say_nothing_but_notice_who_left(post, stopped):
    assert post(a_round(1, 0, []), cancelled=False) is None
    assert post(a_round(1, 1, []), cancelled=True) is None
    assert post(a_round(1, 2, [5]), cancelled=True) is not None
    assert stopped == [1]
    assert said(post(a_round(1, 3, [], "cancelled"), cancelled=True))[2] == "cancelled"
    assert post(a_round(1, 4, [5]), cancelled=False) is None  # after its end


def test_a_round_out_of_order_is_dropped(post):
    assert said(post(a_round(1, 0, [70]), cancelled=False))[1] == [70]
    assert post(a_round(1, 2, [71]), cancelled=False) is None
    assert post(a_round(9, 3, [71]), cancelled=False) is None  # nobody knows its beginning


def test_giving_up_ends_the_request(post, stopped):
    post(a_round(1, 0, [70]), cancelled=False)
    assert said(post.give_up(a_round(1, 1, [71]))) == ("", [], "error")
    assert stopped == [1]
    assert post(a_round(1, 2, [72]), cancelled=False) is None


def test_log_probs_stay_with_their_tokens(post, alone):
    """Streamed, merged and cut by a stop word: one for each token shown, and their sum so far."""
    ids = alone.chat.encode("log probs of the quick fox, and more")
    every = [-0.5 - 0.25 * k for k in range(len(ids))]  # exact in float32
    used = next(n for n in range(len(ids)) if "fox" in alone.text(ids[:n]))
    for uid, (stream, words, count) in enumerate(((True, [], len(ids)), (True, ["fox"], used), (False, ["fox"], used), (False, [], len(ids)))):
        at, got, cum = 0, [], []
        chunks = cut(ids, uid)
        for index, part in enumerate(chunks):
            r = a_round(
                uid, index, part, "length" if index == len(chunks) - 1 else "", stream=stream, stop_words=words,
                log_probs=every[at : at + len(part)],
            )  # fmt: skip
            at += len(part)
            if response := post(r, cancelled=False):
                assert len(response["output_log_probs"]) == len(response["output_ids"])
                got += response["output_log_probs"]
                cum.append((response["cum_log_probs"], len(got)))
        assert got == every[:count]
        assert all(total == sum(every[:n]) for total, n in cum)
    assert feed(post, 9, [ids])[0]["output_log_probs"] == []


class Tensors:
    """Stands for the python backend: counts the tensors that are made."""

    made = 0

    def Tensor(self, name, array):
        self.made += 1
        return name, array


def test_tensors_of_values_that_come_again_are_made_once(post, alone):
    backend, ids = Tensors(), alone.chat.encode("one two three")
    writer = Writer(backend, USER_OUTPUTS, rare=("text_output", "cum_log_probs"))
    values = post(a_round(1, 0, ids), cancelled=False)
    written = dict(writer(values))
    kinds = {"STRING": object, "INT32": np.int32, "FP32": np.float32}
    for t in USER_OUTPUTS:
        assert written[t.name].dtype == kinds[t.dtype], t.name
        assert len(written[t.name]) == (1 if t.dims == (1,) else len(values[t.name]))
    assert written["text_output"][0].decode() == "one two three" and written["output_ids"].tolist() == ids
    assert written["finish_reason"][0] == b"" and written["output_log_probs"].tolist() == []
    before = backend.made
    again = dict(writer(values))
    assert backend.made == before + 3, "the text, and the two lists that are not empty"
    assert all((again[name] == written[name]).all() for name in written)


def test_a_writer_keeps_a_bounded_number_of_tensors():
    writer = Writer(Tensors(), USER_OUTPUTS)
    for i in range(3 * KEPT):
        (name, array), (_, zero) = writer({"index": i, "acceptance_rate": 0.0})
        assert array.tolist() == [i] and zero.dtype == np.float32
        assert len(writer._made) <= KEPT

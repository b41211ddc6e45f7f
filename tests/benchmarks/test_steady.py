"""The window of a closed loop: when it opens and closes, and what counts."""

import threading

import pytest

from benchmarks.steady import Plan, Window


def test_first_answers_end_one_after_the_other_and_later_ones_are_whole():
    plan = Plan(concurrency=4, tokens=1, max_tokens=64, first=3)
    assert [plan.length(i) for i in range(6)] == [16, 32, 48, 64, 64, 64]
    assert [plan.prompt(i, 5) for i in range(4)] == [3, 4, 0, 1]
    assert [Plan(64, 1, max_tokens=4).length(i) for i in (0, 15, 63)] == [1, 1, 4]


def test_sampled_answers_run_over_the_end_of_sequence():
    assert not Plan(1, 1).ignore_eos and Plan(1, 1, temperature=1.0).ignore_eos


def window(tokens: int = 6) -> Window:
    """Two users, of whom the second gets its first token at 2.0."""
    w = Window(Plan(concurrency=2, tokens=tokens))
    assert [w.submit(0.0), w.submit(0.5)] == [0, 1]
    assert not w.heard(0, 1.0, 1) and w.opened is None
    assert not w.heard(0, 1.5, 3) and not w.heard(1, 2.0, 1)
    return w


def test_it_opens_with_the_last_users_first_token():
    w = window()
    assert w.opened == 2.0
    assert not w.heard(0, 2.0, 5), "what came in the opening step is outside"


def test_it_closes_with_the_last_token_and_takes_all_of_that_step():
    w = window()
    assert w.heard(0, 3.0, 4) and w.closed is None
    assert w.heard(1, 4.0, 2) and w.closed == 4.0
    assert w.heard(0, 4.0, 1), "the same step"
    assert not w.heard(1, 4.1, 1)
    s = w.summary()
    assert s["tokens"] == 7 and s["seconds"] == pytest.approx(2.0) and s["total_tok_s"] == pytest.approx(3.5)


def test_gaps_are_taken_per_token_and_only_inside():
    w = window()
    w.heard(1, 3.0, 4)  # 4 tokens after 1 s: 0.25 s each; user 0's first gap inside began outside
    w.heard(0, 4.0, 2)
    s = w.summary()
    assert s["user_tok_s"] == pytest.approx(4.0) and s["itl_ms"] == pytest.approx(250) == s["itl_p95_ms"]


def test_ttft_is_of_requests_sent_under_load():
    w = window()
    i = w.submit(2.5)
    w.heard(i, 3.5, 1)
    late = w.submit(3.6)
    w.heard(0, 4.0, 6)
    w.heard(late, 9.0, 1)
    assert w.summary()["ttft_ms"] == pytest.approx(1000), "not the first ones, not the one that came after the end"
    w = window()
    w.heard(0, 4.0, 6)
    assert w.summary()["ttft_ms"] == pytest.approx(1250), "without any: the first ones, (1.0 + 1.5) / 2"


def test_rounds_add_up_and_nothing_is_not_a_number():
    w = window()
    w.heard(1, 3.0, 7)
    s = w.summary()
    assert s["acceptance_length"] == 1.0 and s["rejected_share"] == 0.0 == s["verified_per_round"]
    w.rounds(2, 8, 2)
    w.rounds(2, 0, 0, undrafted=2)
    s = w.summary()
    assert s["acceptance_length"] == 1.5 and s["verified_per_round"] == 2.0 and s["rejected_share"] == 0.75


def test_any_threads_may_call():
    w = Window(Plan(concurrency=8, tokens=1600))

    def user():
        while w.closed is None:
            i = w.submit(0.0)
            for now in range(1, 101):
                if w.heard(i, float(now), 1):
                    w.rounds(1, 2, 1)

    threads = [threading.Thread(target=user) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert w.tokens >= 1600 and w.acceptance.verified == 2 * w.acceptance.rounds == 2 * w.acceptance.accepted

"""The measurements on a tiny bundle, in process and on a real server, and the README's client lines as they stand."""

import contextlib
import io
import re
import time
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks import remote
from benchmarks.common import Item, encode
from benchmarks.demo import compare, pooled, summary
from benchmarks.inprocess import Lane, run, together
from benchmarks.remote import Answer, ask
from benchmarks.scheduling import table
from benchmarks.steady import Plan
from client import Client, ClientError
from decoding.schedule import SCHEDULES, make
from engines import load
from tests.triton.support import in_flight, wait_until

ITEMS = [Item(f"p{i}", ({"role": "user", "content": text},)) for i, text in enumerate(("fox", "naïve café 🙂", "x" * 40))]


def test_in_process_runs_give_the_same_tokens_for_every_schedule(bundle, alone):
    prompts = encode(bundle, ITEMS)
    runs = {
        schedule: run(alone.engines, make(schedule), prompts, concurrency=2, max_tokens=9)
        for schedule in ("none", "fixed", "threshold")
    }
    tokens = {schedule: [t.tokens for t in r.timings] for schedule, r in runs.items()}
    assert tokens["none"] == tokens["fixed"] == tokens["threshold"] and all(tokens["none"])
    assert runs["none"].acceptance.verified == 0
    block = alone.engines.bundle.draft.block_size
    assert runs["fixed"].acceptance.verified == block * runs["fixed"].acceptance.rounds


@pytest.mark.parametrize("mode", SCHEDULES)
def test_a_steady_window_in_process(bundle, alone, mode):
    scheduler = make(mode, sps=table())
    for temperature in (0.0, 1.0):  # a scheduler outlives its loop
        plan = Plan(3, 60, max_tokens=9, temperature=temperature)
        (done,) = together([Lane(alone.engines, scheduler, encode(bundle, ITEMS), plan)])
        assert 60 <= done["tokens"] < 60 + 3 * (alone.engines.bundle.draft.block_size + 1)
        assert 0 < done["host_share"] < 1 and done["acceptance_length"] >= 1
        assert done["no_draft_share"] == 1 if mode == "none" else done["no_draft_share"] <= 1
        assert sum(done["split_ms"].values()) == pytest.approx(done["step_ms"])


def test_lanes_take_turns_and_their_clocks_stand_still_between(bundle, alone, monkeypatch):
    prompts, plan = encode(bundle, ITEMS), Plan(2, 48, max_tokens=9)
    with closing(load(bundle)) as other:
        lanes = [Lane(e, make(mode), prompts, plan) for e, mode in ((alone.engines, "fixed"), (other, "none"))]
        order, turn = [], Lane.turn

        def noted(lane, tokens=None):
            order.append(lanes.index(lane))
            turn(lane, tokens)
            time.sleep(0.01)

        with monkeypatch.context() as patch:
            patch.setattr(Lane, "turn", noted)
            started = time.perf_counter()
            fixed, none = together(lanes, turns=4)
            passed = time.perf_counter() - started
    assert order[:4] == [0, 1, 1, 0] and 8 <= len(order) <= 2 + 2 * 4, "opened, then back and forth"
    assert fixed["verified_per_round"] > 0 == none["verified_per_round"]
    assert all(w["tokens"] >= 48 for w in (fixed, none))
    assert fixed["seconds"] + none["seconds"] < passed - 0.01 * (len(order) - 2), "sleep and the other's turns are not theirs"
    (whole,) = together([Lane(alone.engines, make("fixed"), prompts, plan)], turns=1)
    assert whole["acceptance_length"] == fixed["acceptance_length"], "the same requests, whoever else ran"


def test_each_request_of_a_run_has_a_seed_of_its_own(bundle, alone):
    prompts = encode(bundle, [ITEMS[0]] * 3)
    sampled = run(alone.engines, make("fixed"), prompts, concurrency=3, max_tokens=12, temperature=1.0)
    again = run(alone.engines, make("fixed"), prompts, concurrency=1, max_tokens=12, temperature=1.0)
    assert [t.tokens for t in sampled.timings] == [t.tokens for t in again.timings]
    assert len({tuple(t.tokens) for t in sampled.timings}) > 1


def test_demo_row_of_a_served_prompt(server, alone):
    row = compare(Client(server.grpc_url), ITEMS[1], max_tokens=10, repeats=2)
    want = alone.decode(ITEMS[1].messages[0]["content"], max_tokens=10)
    assert row["identical"] and row["first_difference"] is None
    assert row["output_tokens"] == len(want) and row["text"] == alone.text(want)
    assert row["acceptance_length"] >= 1 and len(row["acceptance_per_position"]) == alone.engines.bundle.draft.block_size
    tokens = 2 * (row["output_tokens"] - 1)  # of both runs; the first token is the prefill's
    assert row["rounds"] * row["acceptance_length"] == pytest.approx(tokens, abs=2 * 6)  # an answer may end inside a block
    assert row["rounds"] * row["acceptance_length"] >= tokens - 0.01
    total = summary([row, row | {"identical": False, "first_difference": 4}])
    assert total["output_tokens"] == 2 * row["output_tokens"] and not total["identical"]
    assert total["first_difference"] == 4


def test_acceptance_is_of_all_timed_runs():
    """One run drafted, the other skipped nearly every draft."""
    runs = [
        Answer("", None, 5, rounds, drafted, accepted)
        for rounds, drafted, accepted in ((10, 40, (6, 3, 1)), (30, 3, (1, 0, 0)), (20, 0, (0, 0, 0)))
    ]
    assert pooled(runs) == (60, [7, 3, 1]) and pooled(runs[2:]) == (20, [])


def test_a_steady_window_through_the_server(server):
    plan = Plan(3, 60, max_tokens=9)
    done = remote.steady(server.grpc_url, ITEMS, plan)
    assert done["tokens"] >= 60 and done["verified_per_round"] > 0 and 0 <= done["rejected_share"] <= 1
    plain = remote.steady(server.grpc_url, ITEMS, plan, speculative=False)
    assert plain["verified_per_round"] == 0 and plain["acceptance_length"] == 1
    assert wait_until(lambda: in_flight(server) == 0, "an idle server"), "what was cut off is gone"
    sampled = remote.steady(server.grpc_url, ITEMS, Plan(2, 30, max_tokens=9, temperature=1.0, seed=5))
    assert sampled["tokens"] >= 30


def test_host_share_is_what_two_readings_leave():
    before = {"target": 1.0, "host": 0.5}
    assert remote.host_share(before, {"target": 4.0, "host": 1.0, "schedule": 0.5}) == 0.25
    assert remote.host_share(before, before) is None


def test_a_refused_window_is_the_servers_sentence(server):
    with pytest.raises(ClientError, match="max_tokens is 0"):
        remote.steady(server.grpc_url, ITEMS, Plan(1, 10, max_tokens=0))


def test_a_refused_request_is_the_servers_sentence(server):
    with pytest.raises(ClientError, match="max_tokens is 0"):
        ask(Client(server.grpc_url), ITEMS[0].messages, max_tokens=0)


def test_readme_client_lines_stream_the_answer(server):
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    assert '"127.0.0.1:8001"' in code
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(code.replace("127.0.0.1:8001", server.grpc_url), "README.md", "exec"), {})
    want = Client(server.grpc_url).generate("Why is the sky blue?").text
    assert want and shown.getvalue() == want


def test_even_rate_spreads_a_response_over_the_time_since_the_one_before():
    every_half_second = [(0.0, 1), *[(0.5 * i, 5) for i in range(1, 9)]]  # 10 tokens a second
    assert remote.even_rate([every_half_second], 0.3, 3.7) == pytest.approx(10.0)
    assert remote.even_rate([every_half_second] * 3, 0.5, 2.0) == pytest.approx(30.0)
    begun_inside = [(1.0, 1), (2.0, 8)]
    assert remote.even_rate([begun_inside], 0.0, 1.5) == pytest.approx((1 + 4) / 1.5)
    assert remote.even_rate([[(3.0, 1)], []], 0.0, 2.0) == 0.0

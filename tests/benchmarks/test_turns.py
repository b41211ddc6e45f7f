"""A server that stands still between its turns, and its window beside the loop's in this process, on a tiny bundle."""

import os
import time
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.common import Item, encode
from benchmarks.inprocess import Lane
from benchmarks.steady import Plan
from benchmarks.turns import RemoteLane, beside, engine_processes
from client import Client, ClientError
from decoding.schedule import make
from engines import load
from tests.triton.support import in_flight, wait_until

ITEMS = [Item(f"p{i}", ({"role": "user", "content": text},)) for i, text in enumerate(("fox", "naïve café 🙂", "x" * 40))]


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_between_its_turns_the_server_and_its_clock_stand_still(server):
    (process,) = engine_processes(server.process.pid)
    with RemoteLane(server, ITEMS, Plan(3, 10**6, max_tokens=9)) as lane:
        lane.turn()
        assert lane.window.opened is not None and state(process) == "T"
        tokens, now = lane.window.tokens, lane._now()
        time.sleep(0.2)
        assert (lane.window.tokens, lane._now()) == (tokens, now) and in_flight_users(lane) == 3
        lane.turn(seconds=0.3)
        assert lane.window.tokens > tokens and 0.3 <= lane._now() - now < 0.5 and not lane.over
    assert state(process) != "T"
    assert wait_until(lambda: in_flight(server) == 0, "an idle server"), "what was cut off is gone"
    assert Client(server.grpc_url).generate("still there?", max_tokens=3).num_output_tokens == 3


def in_flight_users(lane: RemoteLane) -> int:
    return sum(user.is_alive() for user in lane._users)


@pytest.mark.parametrize("mode", ["none", "fixed"])
def test_both_windows_hold_the_same_work(bundle, server, mode):
    plan, speculative = Plan(2, 120, max_tokens=9), mode != "none"
    with closing(load(bundle)) as own:
        lane = Lane(own, make(mode), encode(bundle, ITEMS), plan)
        direct, remote = beside(lane, RemoteLane(server, ITEMS, plan, speculative=speculative), turn=0.05)
    assert all(w["tokens"] >= 120 and w["total_tok_s"] > 0 for w in (direct, remote))
    block = own.bundle.draft.block_size if speculative else 0
    assert direct["verified_per_round"] == remote["verified_per_round"] == block
    assert direct["host_share"] > 0 and remote["host_share"] is None and "turns" not in direct
    assert wait_until(lambda: in_flight(server) == 0, "an idle server")


def test_a_refused_request_ends_the_lane_with_the_servers_sentence(server):
    plan = Plan(1, 10, max_tokens=0)
    with pytest.raises(ClientError, match="max_tokens is 0"), RemoteLane(server, ITEMS, plan) as lane:
        lane.turn()  # the first answer of a user has one token at least
        lane.turn(seconds=30.0)
    assert all(state(p) != "T" for p in engine_processes(server.process.pid))


def test_a_process_without_engines_is_refused():
    with pytest.raises(ProcessLookupError, match="has no child that runs the model dspark"):
        engine_processes(os.getpid())

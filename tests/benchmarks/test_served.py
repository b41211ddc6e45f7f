"""The measurements on a tiny bundle, in process and on a real server, and the README's client lines as they stand."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from benchmarks.bench import measure
from benchmarks.common import Item, encode
from benchmarks.demo import compare, summary
from benchmarks.inprocess import run
from benchmarks.remote import ask, load
from client import Client, ClientError
from decoding.schedule import make

ITEMS = [Item(f"p{i}", ({"role": "user", "content": text},)) for i, text in enumerate(("fox", "naïve café 🙂", "x" * 40))]


def test_in_process_runs_give_the_same_tokens_for_every_schedule(bundle, alone):
    prompts = encode(bundle, ITEMS)
    runs = {
        schedule: run(alone.engines, make(schedule), prompts, concurrency=2, max_tokens=9)
        for schedule in ("none", "fixed", "threshold")
    }
    tokens = {schedule: [t.tokens for t in r.timings] for schedule, r in runs.items()}
    assert tokens["none"] == tokens["fixed"] == tokens["threshold"] and all(tokens["none"])
    assert all(0 < r.outside_engines < 1 for r in runs.values())
    assert runs["none"].acceptance.verified == 0
    block = alone.engines.bundle.draft.block_size
    assert runs["fixed"].acceptance.verified == block * runs["fixed"].acceptance.rounds


def test_each_request_of_a_run_has_a_seed_of_its_own(bundle, alone):
    prompts = encode(bundle, [ITEMS[0]] * 3)
    sampled = run(alone.engines, make("fixed"), prompts, concurrency=3, max_tokens=12, temperature=1.0)
    again = run(alone.engines, make("fixed"), prompts, concurrency=1, max_tokens=12, temperature=1.0)
    assert [t.tokens for t in sampled.timings] == [t.tokens for t in again.timings]
    assert len({tuple(t.tokens) for t in sampled.timings}) > 1


def test_measure_interleaves_the_schedules():
    class Fake:
        def __init__(self, value):
            self.value = value

        def summary(self):
            return {"output_tok_s": self.value}

    order = []

    def runner(schedule, items, concurrency):
        order.append((schedule, len(items)))
        return Fake(float(len(order)))

    rows = measure(runner, ITEMS, 2, repeats=3)
    assert [s for s, _ in order] == ["none", "fixed", "threshold"] * 4
    assert [n for _, n in order] == [2] * 3 + [3] * 9  # the warm-up is short
    assert rows[0]["output_tok_s"] == 7.0 and rows[1]["ratio"] == pytest.approx(8 / 7, abs=1e-4)


def test_demo_row_of_a_served_prompt(server, alone):
    row = compare(Client(server.grpc_url), ITEMS[1], max_tokens=10, repeats=1)
    want = alone.decode(ITEMS[1].messages[0]["content"], max_tokens=10)
    assert row["identical"] and row["first_difference"] is None
    assert row["output_tokens"] == len(want) and row["text"] == alone.text(want)
    assert row["acceptance_length"] >= 1 and len(row["acceptance_per_position"]) == alone.engines.bundle.draft.block_size
    assert row["rounds"] * row["acceptance_length"] >= row["output_tokens"] - 1  # the first token is the prefill's
    total = summary([row, row | {"identical": False, "first_difference": 4}])
    assert total["output_tokens"] == 2 * row["output_tokens"] and not total["identical"]
    assert total["first_difference"] == 4


def test_load_answers_every_prompt(server, alone):
    done = load(server.grpc_url, ITEMS, concurrency=3, max_tokens=8, speculative=True)
    want = [alone.decode(i.messages[0]["content"], max_tokens=8) for i in ITEMS]
    assert [t.tokens for t in done.timings] == want
    assert done.acceptance.rounds > 0 and done.outside_engines is None
    plain = load(server.grpc_url, ITEMS, concurrency=1, max_tokens=8, speculative=False)
    assert [t.tokens for t in plain.timings] == want and plain.acceptance.verified == 0


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

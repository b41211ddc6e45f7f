"""Draft, schedule and what a step tells, in the real loop on tiny engines."""

import numpy as np
import pytest

from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from decoding.schedule import Fixed, NoDraft, RoundLoad, Scheduler, Threshold, make
from engines.sps import Sps
from tests.decoding.drive import drive, prompts, requests, tokens

TEXTS = prompts(9, seed=4)


def jagged(G, draft=1.0):
    cost = np.cumsum(np.random.default_rng(1).uniform(0.0, 1.0, 600)) + 5 + 4.0 * (np.arange(600) // 8)
    points = [(r, n, 64, float(cost[n])) for r in (1, 4, 8) for n in range(r, 512)]
    return Sps.from_points(points, [(r, 64, draft) for r in (1, 4, 8)])


class Few(Scheduler):
    """Drafts for `count` requests at a time; takes down what it was asked."""

    uses_confidence = False

    def __init__(self, count):
        self.count, self.loads, self.states, self.seen = count, [], [], []

    def draft(self, load):
        self.loads.append(load)
        return min(self.count(len(self.loads)), load.requests)

    def lengths(self, state):
        self.states.append(state)
        return np.full(*state.confidence.shape)

    def observe(self, verified, accepted):
        self.seen.append((verified, accepted))


class Watch:
    def __init__(self, wants_confidence):
        self.wants_confidence, self.traces = wants_confidence, []

    def round(self, trace):
        self.traces.append(trace)


@pytest.fixture(scope="module")
def plain(tiny):
    return tokens(drive(Loop(tiny, NoDraft(), max_requests=1), requests(TEXTS, max_tokens=24)))


@pytest.mark.parametrize("count", [lambda t: 2, lambda t: t % 4, lambda t: (0, 0, 0, 5)[t % 4]], ids=["two", "varying", "skips"])
def test_a_draft_for_some_rows_changes_no_text(tiny, plain, count):
    """Rounds without a draft leave context waiting; rounds for a few rows hand over only theirs."""
    scheduler = Few(count)
    loop = Loop(tiny, scheduler, max_requests=5)
    assert tokens(drive(loop, requests(TEXTS, max_tokens=24))) == plain
    m = loop.metrics
    assert 0 < m.drafts < m.rounds and m.rounds_without_draft == m.rounds - m.drafts and m.accepted_tokens > 0
    for state, (verified, accepted) in zip(scheduler.states, scheduler.seen, strict=True):
        assert len(state.confidence) == len(verified) == len(accepted) and (accepted <= verified).all()


def test_every_row_gets_its_turn(tiny):
    watch = Watch(False)
    loop = Loop(tiny, Few(lambda t: 1), max_requests=4, observers=(watch,))
    drive(loop, requests(TEXTS[:4], max_tokens=24))
    drafted = {i for trace in watch.traces for i, d in zip(trace.ids, trace.drafted) if d}
    assert drafted == {0, 1, 2, 3} and all(t.drafted.sum() == 1 for t in watch.traces)


def test_loads_and_states_describe_the_step(tiny):
    scheduler = Few(lambda t: 8)
    loop = Loop(tiny, scheduler, max_requests=4, token_budget=64)
    todo = requests(TEXTS[:2], max_tokens=20) + [Request("plain", (1, 2, 3), SamplingParams(20, speculative=False, ignore_eos=True))]
    long = Request("long", tuple(prompts(1, low=200, high=201)[0]), SamplingParams(4, ignore_eos=True))
    drive(loop, todo, join=lambda step: [long] if step == 3 else [])
    seen = [(load, state) for load, state in zip((o for o in scheduler.loads if o.requests), scheduler.states, strict=True)]
    both = [(load, state) for load, state in seen if load.requests == 2 and load.plain == 1]
    assert {load.prefill for load, _ in both} > {0, 61} and {state.prefill for _, state in both} > {0, 61}
    assert all(state.room == 64 - 3 - min(load.prefill, 8) and state.plain == 1 for load, state in both)
    assert scheduler.loads[1].context > 0


@pytest.mark.parametrize("name", ["causal", "lagged"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_greedy_text_is_the_targets_under_load_aware_schedulers(tiny, plain, name, batch):
    scheduler = make(name, sps=jagged(tiny.bundle.draft.block_size))
    for _ in range(2):  # a scheduler outlives a loop
        loop = Loop(tiny, scheduler, max_requests=batch)
        todo = requests(TEXTS, max_tokens=24)
        got = drive(loop, todo[:2], join=lambda step: todo[step + 1 : step + 2])  # R changes between rounds
        assert tokens(got) == plain


def test_lagged_skips_a_draft_that_costs_too_much_and_says_so(tiny, plain):
    watch = Watch(False)
    loop = Loop(tiny, make("lagged", sps=jagged(4, draft=50.0)), max_requests=8, observers=(watch,))
    assert tokens(drive(loop, requests(TEXTS, max_tokens=24))) == plain
    m = loop.metrics
    assert m.probes > 0 and m.rounds_without_draft > m.drafts
    skipped = [t for t in watch.traces if not t.drafted.any()]
    assert skipped and all(t.confidence_logits is None and t.draft_seconds == 0 and t.budget == 0 for t in skipped)


@pytest.mark.parametrize("budget", [1, 6, 24])
def test_nobody_starves_under_a_small_budget(tiny, plain, budget):
    """Prompts and decoding requests advance in every step, drafts give way."""
    watch = Watch(False)
    loop = Loop(tiny, make("lagged", sps=jagged(4)), max_requests=8, token_budget=budget, observers=(watch,))
    todo, got, fed = requests(TEXTS, max_tokens=24), {}, 0
    for request in todo:
        loop.add(request)
    while loop.has_work:
        decoding, waiting, before = len(loop._rows), loop.metrics.prompt_tokens, loop.metrics.rounds
        ready = sum(s.decoding for s in loop._rows)
        unfed = sum(s.prompt_length - s.target_length for s in loop._rows)
        for output in loop.step():
            got.setdefault(output.request_id, []).extend(output.token_ids)
        assert loop.metrics.rounds - before == ready
        if decoding and unfed > 0 and not ready == decoding:
            assert loop.metrics.prompt_tokens > waiting
            fed += 1
    assert got == plain and fed > 0
    assert all(t.budget <= max(budget - len(t.ids), 0) for t in watch.traces)


def test_traces(tiny):
    """What observers see adds up to the metrics; confidences come when an observer asks, whatever the scheduler."""
    G = tiny.bundle.draft.block_size
    quiet, watch = Watch(False), Watch(True)
    silent = Loop(tiny, Fixed(), max_requests=4, observers=(quiet,))
    drive(silent, requests(TEXTS, temperature=1.0))
    assert all(t.confidence_logits is None and t.survival is None for t in quiet.traces)
    loop = Loop(tiny, Fixed(), max_requests=4, observers=(quiet, watch))
    todo = requests(TEXTS, temperature=1.0) + [Request("plain", (3, 1), SamplingParams(30, speculative=False))]
    outputs = drive(loop, todo)
    m, traces = loop.metrics, watch.traces
    assert sum(len(t.ids) for t in traces) == m.rounds and sum(t.verified.sum() for t in traces) == m.verified_tokens
    assert sum(t.accepted.sum() for t in traces) == m.accepted_tokens and sum(t.tokens for t in traces) == m.tokens
    assert sum(t.budget for t in traces) == m.verified_tokens
    by_id = {}
    for t in traces:
        for k, i in enumerate(t.ids):
            by_id.setdefault(i, []).append((int(t.verified[k]), int(t.accepted[k])))
            assert t.drafted[k] == (i != "plain") and (t.temperature[k] > 0) == (i != "plain")
            if t.confidence_logits is None:
                assert t.ids == ["plain"]
                continue
            logits, survival = t.confidence_logits[k], t.survival[k]
            if i == "plain":
                assert np.isnan(logits).all() and np.isnan(survival).all()
            else:
                np.testing.assert_allclose(survival, np.cumprod(1 / (1 + np.exp(-logits))), rtol=1e-5)
        assert t.confidence_logits is None or t.confidence_logits.shape == (len(t.ids), G) and t.draft_seconds > 0
        assert min(t.target_seconds, t.verify_seconds) > 0
        assert t.host_seconds > 0 and t.schedule_seconds >= 0
    for i, each in outputs.items():
        assert by_id[i] == [(o.stats.verified, o.stats.accepted) for o in each if o.stats]


def test_the_split_adds_up(tiny):
    loop = Loop(tiny, Threshold(0.5), max_requests=4)
    drive(loop, requests(TEXTS))
    m = loop.metrics
    assert sum(m.split()) == pytest.approx(sum(m.engine_seconds.values()) + m.host_seconds["schedule"]) and sum(m.split()) < m.seconds
    assert m.as_dict()["split"] == m.split()._asdict()


def test_an_observer_may_come_with_any_scheduler(tiny, plain):
    assert isinstance(Few(lambda t: 1).draft(RoundLoad(3)), int)
    loop = Loop(tiny, NoDraft(), max_requests=4, observers=(Watch(True),))
    assert tokens(drive(loop, requests(TEXTS, max_tokens=24))) == plain and "confidence" not in loop.metrics.engine_calls


@pytest.mark.parametrize("name", ["fixed", "lagged"])
def test_twins_get_numbers_only_where_one_may_steer_the_other(tiny, name):
    loop = Loop(tiny, make(name, sps=jagged(4)), max_requests=4)
    for i in range(3):
        loop.add(Request(i, (1, 2, 3), SamplingParams(12, temperature=1.0, seed=7, ignore_eos=True)))
    got = {}
    while loop.has_work:
        for output in loop.step():
            got.setdefault(output.request_id, []).extend(output.token_ids)
    assert (got[0] == got[1] == got[2]) is (name == "fixed")
    loop.add(Request("later", (1, 2, 3), SamplingParams(12, temperature=1.0, seed=7, ignore_eos=True)))
    loop.step()
    assert (loop._rows[0].twin > 0) is (name == "lagged")  # the pool still remembers the others


class Pause(Fixed):
    """Drafts in the steps before `first` and from `last` on."""

    def __init__(self, first, last):
        super().__init__()
        self.first, self.last, self.steps = first, last, 0

    def draft(self, load):
        self.steps += 1
        return 0 if self.first <= self.steps < self.last else load.requests


class Exact:
    """The real engines, where a pass may write no further than the loop asked for."""

    def __init__(self, engines):
        self.engines, self.length = engines, 0

    def __getattr__(self, name):
        return getattr(self.engines, name)

    def ensure_capacity(self, rows, length):
        self.length = length
        self.engines.ensure_capacity(rows, length)

    def target(self, batch):
        assert batch.write_index.max() + batch.pad_index.shape[1] <= self.length
        return self.engines.target(batch)

    def backbone(self, batch):
        assert batch.write_index.max() + batch.pad_index.shape[1] <= self.length
        return self.engines.backbone(batch)


def test_every_row_has_room_for_the_widest_ones_slots(tiny):
    """Padded slots are written too: a long cache beside much waiting context needs the sum of both."""
    loop, got = Loop(Exact(tiny), Pause(4, 40), max_requests=2), {}
    loop.add(Request(0, (3,) * 58, SamplingParams(90, ignore_eos=True)))
    loop.step()
    loop.step()
    loop.add(Request(1, (4,) * 20, SamplingParams(90, ignore_eos=True)))
    while loop.has_work:
        for output in loop.step():
            got[output.request_id] = output
    assert [got[i].finish_reason for i in (0, 1)] == ["length", "length"], got

"""The engine and sender threads on a real loop: order, cancellation within a round, flow control, failure, draining."""

from __future__ import annotations

import threading

import pytest

from decoding.loop import Loop
from decoding.request import RequestError, SamplingParams
from decoding.schedule import make
from tests.triton.support import wait_until
from triton_repo.ledger import Ledger
from triton_repo.sender import WINDOW
from triton_repo.service import Service

IDS = (5, 6, 7)


class Sink:
    """Remembers what was sent."""

    def __init__(self):
        self.rounds, self.error, self.over = [], None, threading.Event()

    def send(self, response, *, final):
        self.rounds.append(response)
        if final:
            self.over.set()

    def fail(self, message):
        self.error = message
        self.over.set()

    @property
    def ids(self):
        return [t for r in self.rounds for t in r.output_ids]


class Spy:
    """A loop that notes, for each step, which requests it decoded. Between two steps, a cleared gate stops it, and
    before_step(self) may wait for something."""

    before_step = staticmethod(lambda spy: None)

    def __init__(self, loop):
        self.loop, self.steps, self.gate, self.broken = loop, [], threading.Event(), None
        self.gate.set()

    def __getattr__(self, name):
        return getattr(self.loop, name)

    def step(self):
        self.gate.wait()
        self.before_step(self)
        if self.broken:
            raise self.broken
        outputs = self.loop.step()
        self.steps.append({o.request_id for o in outputs if o.token_ids})
        return outputs


@pytest.fixture
def spies():
    return []


@pytest.fixture
def service(alone, spies):
    services = []

    def make_service(**options):
        def make_loop(observer):
            spies.append(Spy(Loop(alone.engines, make("fixed"), max_requests=2, observers=(observer,))))
            return spies[-1]

        services.append(Service(make_loop, block_size=4, **options))
        return services[-1]

    yield make_service
    for spy in spies:
        spy.gate.set()
    for each in services:
        each.close()


def params(max_tokens, **more):
    return SamplingParams(max_tokens, ignore_eos=True, **more)


def test_one_response_a_round_in_order(service, spies):
    sink = Sink()
    service().submit(IDS, params(40), sink)
    assert sink.over.wait(60)
    sent = [r for r in sink.rounds if len(r.output_ids)]
    assert [r.index for r in sink.rounds] == list(range(len(sink.rounds)))
    assert len(sink.ids) == 40 == sent[-1].num_output_tokens
    assert [r.finish_reason for r in sink.rounds] == [""] * (len(sink.rounds) - 1) + ["length"]
    assert sent[-1].num_rounds == sum(bool(s) for s in spies[0].steps) - 1  # the first one is prefill
    assert sent[-1].total_draft_tokens == 4 * sent[-1].num_rounds


def test_an_interval_holds_back_all_but_the_first_and_the_last_tokens(service, spies):
    often, seldom = Sink(), Sink()
    service().submit(IDS, params(60, speculative=False), often)
    assert often.over.wait(60)
    each = service(interval=1000.0)
    spies[-1].before_step = lambda spy: any(spy.steps) and wait_until(lambda: seldom.rounds, "the first response")
    each.submit(IDS, params(60, speculative=False), seldom)
    assert seldom.over.wait(60)
    assert seldom.ids == often.ids and len(seldom.ids) == 60
    first, last = [r for r in seldom.rounds if len(r.output_ids)]
    assert len(first.output_ids) == 1 and last.num_rounds == 59 and last.finish_reason == "length"


def test_the_requests_of_a_burst_get_their_tokens_together(service, spies):
    class Clocked(Sink):
        def send(self, response, *, final):
            log.append((self, len(response.output_ids), final))
            super().send(response, final=final)

    log, sinks = [], [Clocked(), Clocked()]
    each = service(interval=0.02)
    spies[0].gate.clear()  # both begin in one round, and end in one
    for sink in sinks:
        each.submit(IDS, params(1000, speculative=False), sink)
    spies[0].gate.set()
    assert all(sink.over.wait(120) for sink in sinks)
    between = [sink for sink, tokens, final in log if tokens > 1 and not final]
    assert between and all({a, b} == set(sinks) for a, b in zip(between[::2], between[1::2]))


@pytest.mark.parametrize(
    "requests, cores, seconds", [(0, 2, 0.05), (2, 2, 0.05), (8, 2, 0.2), (16, 2, 0.4), (16, 16, 0.05)]
)
def test_the_interval_grows_with_the_requests_a_core(service, requests, cores, seconds):
    assert service(interval=0.05, cores=cores)._sender.pace(requests) == pytest.approx(seconds)


def test_the_sender_sleeps_through_rounds_that_nobody_waits_for(service):
    each, sink, looks = service(interval=1000.0), Sink(), []
    news = each._sender._news
    each._sender._news = lambda wait: looks.append(wait) or news(wait)
    each.submit(IDS, params(400, speculative=False), sink)
    assert sink.over.wait(60) and len(sink.ids) == 400
    assert len(looks) < 100  # 400 rounds; it also looks every LONG_WAIT seconds

def test_stop_frees_the_row_within_a_round(service, spies):
    each = service()
    sink, other = Sink(), Sink()
    uid = each.submit(IDS, params(3000, speculative=False), sink)
    each.submit(IDS, params(200, speculative=False), other)
    wait_until(lambda: sink.ids and other.ids, "tokens of both")
    spies[0].gate.clear()
    steps = len(spies[0].steps) + 1  # the one that may be under way
    each.stop(uid)
    spies[0].gate.set()
    assert sink.over.wait(60) and other.over.wait(60)
    assert sink.rounds[-1].finish_reason == "cancelled"
    assert all(uid not in step for step in spies[0].steps[steps + 1 :])
    assert len(other.ids) == 200


def test_stop_of_a_waiting_or_unknown_request(service):
    each = service()
    sinks = [Sink() for _ in range(3)]
    uids = [each.submit(IDS, params(400, speculative=False), sink) for sink in sinks]
    each.stop(uids[2])
    each.stop(12345)
    each.stop(uids[2])
    assert all(sink.over.wait(60) for sink in sinks)
    assert [sink.rounds[-1].finish_reason for sink in sinks] == ["length", "length", "cancelled"]
    assert sinks[2].ids == []
    assert each.counts() == (0, 0)


def test_a_slow_reader_gets_everything_in_fewer_responses(service, tmp_path):
    ledger, sink, direct = Ledger(tmp_path / "ledger", make=True), Sink(), Sink()
    each = service(progress=ledger)
    uid = each.submit(IDS, params(60, speculative=False), sink, settings="{}")
    each.submit(IDS, params(60, speculative=False), direct)
    assert direct.over.wait(60)  # without settings there is nobody behind: no limit
    assert len(sink.rounds) == WINDOW and not sink.over.is_set()
    assert sink.rounds[0].settings == "{}" and sink.rounds[1].settings == ""
    ledger.write(uid, 1)
    assert sink.over.wait(60)
    assert len(sink.rounds) == WINDOW + 1
    assert sink.ids == direct.ids and len(sink.ids) == 60
    assert sink.rounds[-1].num_rounds == 59


def test_two_instances_answer_control_calls_for_each_other(service, alone, tmp_path):
    first, second = (Ledger(tmp_path / "ledger", make=True) for _ in range(2))
    own = Loop(alone.engines, make("fixed"), max_requests=2)
    asked, other = service(progress=first), Service(lambda traces: own, block_size=4, progress=second)
    sink = Sink()  # engines are not thread safe: only `asked` decodes
    uid = asked.submit(IDS, params(4000, speculative=False), sink)
    assert other.counts() == asked.counts() == (1, 0)
    other.stop(uid)
    assert sink.over.wait(60)
    assert sink.rounds[-1].finish_reason == "cancelled"
    assert other.counts() == (0, 0)
    other.drain()
    with pytest.raises(RequestError, match="draining"):
        asked.submit(IDS, params(4), Sink())
    asked.drain(False)
    again = Sink()
    asked.submit(IDS, params(4), again)
    assert again.over.wait(60) and len(again.ids) == 4
    other.close()


def test_heartbeats_while_waiting(service):
    each, sinks = service(), [Sink() for _ in range(3)]
    for sink in sinks:
        each.submit(IDS, params(4000, speculative=False), sink)  # longer than until the first heartbeat
    wait_until(lambda: sinks[2].rounds, "a heartbeat")
    assert len(sinks[2].rounds[0].output_ids) == 0 and sinks[2].rounds[0].finish_reason == ""
    each.close()
    assert [sink.error for sink in sinks] == ["The model is being unloaded."] * 3


def test_a_failed_round_fails_its_requests_only(service, spies):
    each, sink = service(), Sink()
    spies[0].broken = RuntimeError("no memory\nleft")
    each.submit(IDS, params(10), sink)
    assert sink.over.wait(60)
    assert sink.error == "The decoding round failed: RuntimeError: no memory\nleft"
    again = Sink()
    each.submit(IDS, params(10), again)
    assert again.over.wait(60) and len(again.ids) == 10
    assert len(spies) == 2  # a fresh loop
    assert each.counts() == (0, 0)


def test_refused_requests_do_not_count(service):
    each, sink = service(), Sink()
    each.submit((), params(10), sink)
    assert sink.over.wait(60)
    assert sink.error == "prompt is empty; it must hold at least 1 token."
    assert each.counts() == (0, 0)


def test_draining(service):
    each, sink = service(), Sink()
    each.submit(IDS, params(50), sink)
    each.drain()
    with pytest.raises(RequestError, match="The server is draining and takes no new requests."):
        each.submit(IDS, params(5), Sink())
    assert sink.over.wait(60) and len(sink.ids) == 50
    wait_until(lambda: each.counts() == (0, 0), "the last response")
    each.drain(False)
    late = Sink()
    each.submit(IDS, params(5), late)
    assert late.over.wait(60) and len(late.ids) == 5


def test_a_sink_that_breaks_hurts_nobody_else(service):
    class Broken(Sink):
        def send(self, response, *, final):
            super().send(response, final=final)
            raise OSError("gone")

    each, broken, sink = service(), Broken(), Sink()
    each.submit(IDS, params(20), broken)
    each.submit(IDS, params(20), sink)
    assert sink.over.wait(60) and broken.over.wait(60)
    assert sink.ids == broken.ids


class Notes:
    """An observer that writes down what it is told."""

    def __init__(self):
        self.steps, self.given, self.firsts, self.nexts, self.reasons = [], [], [], [], []

    def step(self, step):
        self.steps.append(step)

    def tokens(self, stats, count):
        self.given.append((stats, count))

    def first_token(self, seconds, prompt_tokens):
        self.firsts.append((seconds, prompt_tokens))

    def next_tokens(self, seconds, count):
        self.nexts.append((seconds, count))

    def ended(self, reason):
        self.reasons.append(reason)


def test_what_the_observer_hears(service):
    notes = Notes()
    each = service(observer=notes)
    sinks = [Sink() for _ in range(3)]
    each.submit(IDS, params(30), sinks[0])
    each.submit(IDS, params(20, speculative=False), sinks[1])
    each.submit((), params(5), sinks[2])
    assert all(sink.over.wait(60) for sink in sinks)
    wait_until(lambda: len(notes.reasons) == 3 and sum(n for _, n in notes.given) == 50, "all notes")
    assert sorted(notes.reasons) == ["length", "length", "refused"]
    assert [prompt for _, prompt in notes.firsts] == [3, 3]
    assert all(seconds > 0 for seconds, _ in notes.firsts + notes.nexts)
    later = [len(r.output_ids) for sink in sinks[:2] for r in [r for r in sink.rounds if r.output_ids][1:]]
    assert sorted(count for _, count in notes.nexts) == sorted(later), "a sample for each response with tokens but the first"
    traced = [trace for step in notes.steps for trace in step.traces]
    verified = sum(int(trace.verified.sum()) for trace in traced)
    assert verified == sum(stats.verified for stats, _ in notes.given if stats) == sum(trace.budget for trace in traced)
    for step in notes.steps:
        for trace in step.traces:
            phases = (trace.draft_seconds, trace.schedule_seconds, trace.target_seconds, trace.verify_seconds, trace.host_seconds)
            assert min(phases) >= 0 and sum(phases) <= step.seconds
    assert notes.steps[0].kv_tokens > 0 and notes.steps[0].kv_bytes > 0 and notes.steps[-1].kv_tokens == 0


def test_a_held_back_response_is_one_sample_of_the_gap(service):
    notes, sink = Notes(), Sink()
    service(observer=notes, interval=30.0).submit(IDS, params(30), sink)
    assert sink.over.wait(60)
    wait_until(lambda: len(notes.nexts) == len([r for r in sink.rounds if r.output_ids]) - 1, "the samples")
    assert len(notes.nexts) <= 2 and sum(count for _, count in notes.nexts) == 30 - len(sink.rounds[0].output_ids)
    decoded = [(step.at, len(output.token_ids)) for step in notes.steps for output in step.outputs]
    told, first = 0, len(sink.rounds[0].output_ids)  # the first response holds each round decoded before the sender woke
    for begin, count in decoded:
        told += count
        if told >= first:
            break
    assert told == first, "a response ends with a round"
    assert sum(seconds for seconds, _ in notes.nexts) == pytest.approx(decoded[-1][0] - begin), "from the first tokens to the last"


def test_a_broken_observer_ends_nothing(service):
    class Broken(Notes):
        def step(self, step):
            raise OSError("the server is gone")

    sink = Sink()
    service(observer=Broken()).submit(IDS, params(10), sink)
    assert sink.over.wait(60) and len(sink.ids) == 10

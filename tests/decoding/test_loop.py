import numpy as np
import pytest

from decoding.loop import Loop, Output
from decoding.request import Request, RequestError, SamplingParams
from decoding.schedule import Fixed, NoDraft, Threshold
from tests.decoding.drive import drive, prompts, requests, tokens

TEXTS = prompts(14)


@pytest.fixture(scope="module")
def alone(tiny):
    """Each request of TEXTS decoded by itself at temperature 1, threshold scheduler."""
    loop = Loop(tiny, Threshold(0.5), max_requests=1)
    return tokens(drive(loop, requests(TEXTS, temperature=1.0)))


def test_some_drafts_are_accepted_and_some_are_not(tiny):
    """Otherwise the tests below would prove nothing."""
    for scheduler in (Fixed(), Threshold(0.5)):
        loop = Loop(tiny, scheduler)
        drive(loop, requests(TEXTS, temperature=1.0))
        m = loop.metrics
        assert 0.1 * m.verified_tokens < m.accepted_tokens < 0.9 * m.verified_tokens
    assert 0 < m.verified_tokens < m.draft_tokens


@pytest.mark.parametrize("max_requests", [2, 3, 8, 14])
def test_a_request_does_not_depend_on_what_it_is_batched_with(tiny, alone, max_requests):
    loop = Loop(tiny, Threshold(0.5), max_requests=max_requests)
    assert tokens(drive(loop, requests(TEXTS, temperature=1.0))) == alone


@pytest.mark.parametrize("budget", [1, 7, 40, 512])
def test_prefill_chunks_do_not_change_output(tiny, alone, budget):
    loop = Loop(tiny, Threshold(0.5), max_requests=4, token_budget=budget)
    assert tokens(drive(loop, requests(TEXTS, temperature=1.0))) == alone


def test_requests_may_join_at_any_step(tiny, alone):
    todo = requests(TEXTS, temperature=1.0)
    loop = Loop(tiny, Threshold(0.5), max_requests=5)
    outputs = drive(loop, todo[:1], join=lambda step: todo[step : step + 1] if step < len(todo) else ())
    assert tokens(outputs) == alone


def test_neighbours_of_other_kinds_change_nothing(tiny, alone):
    """Greedy, plain and differently cut requests in the same batch."""
    todo = requests(TEXTS, temperature=1.0)
    others = [
        Request(
            ("other", i), text, SamplingParams(20, temperature=0.7 * (i % 2), speculative=i % 3 > 0, threshold=i / 10)
        )
        for i, text in enumerate(prompts(9, seed=5))
    ]
    mixed = [r for pair in zip(todo, others + todo[9:]) for r in pair][:18] + todo[9:]
    got = tokens(drive(Loop(tiny, Threshold(0.5), max_requests=6), mixed))
    assert {i: got[i] for i in alone} == alone


def test_long_prompt_beside_decoding_takes_its_own_pass(tiny):
    long, short = prompts(1, low=300, high=301)[0], TEXTS[:4]
    todo = requests([*short, long], temperature=1.0, max_tokens=12)
    want = tokens(drive(Loop(tiny, Fixed(), max_requests=1), todo))
    loop, passes = Loop(tiny, Fixed(), max_requests=8), []
    plan = loop._plan
    loop._plan = lambda draft: passes.append(plan(draft)) or passes[-1]
    assert tokens(drive(loop, todo[:4], join=lambda step: todo[4:] if step == 2 else ())) == want
    assert any([w.first_row for w in p] == [0, 4] for p in passes if len(p) == 2)


def test_prompts_of_unlike_lengths_take_passes_of_their_own(tiny):
    texts = [prompts(1, low=n, high=n + 1, seed=n)[0] for n in (5, 150, 6, 7, 200)]
    todo = requests(texts, temperature=1.0, max_tokens=12)
    want = tokens(drive(Loop(tiny, Fixed(), max_requests=1), todo))
    loop, passes = Loop(tiny, Fixed(), max_requests=8), []
    plan = loop._plan
    loop._plan = lambda draft: passes.append(plan(draft)) or passes[-1]
    assert tokens(drive(loop, todo)) == want
    assert [w.first_row for w in passes[0]] == [0, 1, 2, 4]


def test_a_long_prompt_is_handed_to_the_draft_in_pieces(tiny):
    """Nobody decodes meanwhile: the draft's context must not wait for the end of the prompt."""
    todo = requests(prompts(2, low=300, high=301), temperature=1.0)
    want = tokens(drive(Loop(tiny, Fixed(), max_requests=1), todo))
    loop = Loop(tiny, Fixed(), max_requests=1, token_budget=32)
    assert tokens(drive(loop, todo)) == want
    assert loop.metrics.engine_calls["backbone"] >= loop.metrics.engine_calls["markov"] + 2 * 3


@pytest.mark.parametrize("speculative", [True, False])
def test_tokens_and_rounds_add_up(tiny, speculative):
    outputs = drive(Loop(tiny, Fixed(), max_requests=4), requests(TEXTS, max_tokens=16, speculative=speculative))
    for each in outputs.values():
        assert [o.finish_reason for o in each] == [None] * (len(each) - 1) + ["length"]
        assert each[0].stats is None and len(each[0].token_ids) == 1
        made = sum(o.stats.accepted + 1 for o in each[1:]) + 1
        assert sum(len(o.token_ids) for o in each) == 16 <= made < 16 + 5
        for o in each[1:]:
            assert (o.stats.drafted, o.stats.verified) == ((4, 4) if speculative else (0, 0))
            assert len(o.token_ids) == o.stats.accepted + 1 or o is each[-1]


def test_no_schedule_never_runs_the_draft(tiny):
    loop = Loop(tiny, NoDraft())
    drive(loop, requests(TEXTS[:3]))
    assert (
        set(loop.metrics.engine_calls) == {"target", "verify"}
        and loop.metrics.rounds_without_draft == loop.metrics.rounds
    )


def test_eos_ends_a_request_wherever_it_stands_in_a_block(tiny):
    """End of sequence is token 20; where it falls among accepted tokens the rest of the block is not emitted."""
    todo = [Request(i, t, SamplingParams(80, temperature=1.3, seed=i)) for i, t in enumerate(prompts(24, seed=3))]
    want = drive(Loop(tiny, Fixed(), max_requests=8), [Request(r.id, r.prompt_ids, _ignoring(r.params)) for r in todo])
    outputs, inside = drive(Loop(tiny, Fixed(), max_requests=8), todo), 0
    for i, free in tokens(want).items():
        got = tokens(outputs)[i]
        cut = free.index(20) + 1 if 20 in free else 80
        assert got == free[:cut]
        last = outputs[i][-1]
        assert last.finish_reason == ("stop" if 20 in free else "length")
        inside += last.stats is not None and len(last.token_ids) < last.stats.accepted + 1
    assert inside > 0


def _ignoring(p):
    return SamplingParams(p.max_tokens, p.temperature, p.seed, ignore_eos=True)


def test_cancel_frees_the_row_before_the_next_round(tiny, alone):
    todo = requests(TEXTS, temperature=1.0)
    loop = Loop(tiny, Threshold(0.5), max_requests=3)
    for request in todo[:5]:
        loop.add(request)
    got = {}
    for output in loop.step() + loop.step():
        got.setdefault(output.request_id, []).extend(output.token_ids)
    assert (loop.active, loop.waiting) == (3, 2)
    assert loop.cancel(0) and loop.cancel(4) and not loop.cancel(0) and not loop.cancel("none")
    assert (loop.active, loop.waiting) == (2, 1)
    outputs = loop.step()
    assert loop.active == 3 and loop.waiting == 0, "the next request takes the row in the very next round"
    ended = [o for o in outputs if o.finish_reason == "cancelled"]
    assert sorted(o.request_id for o in ended) == [0, 4] and all(o.token_ids == () for o in ended)
    rest = tokens({o.request_id: [] for o in outputs} | drive(loop, []))
    for output in outputs:
        got.setdefault(output.request_id, []).extend(output.token_ids)
    for i, more in rest.items():
        got.setdefault(i, []).extend(more)
    assert {i: got[i] for i in (1, 2, 3)} == {i: alone[i] for i in (1, 2, 3)}
    assert loop.metrics.finished == {"cancelled": 2, "length": 3}


def test_cancel_of_the_last_request_still_says_so(tiny):
    loop = Loop(tiny, Fixed())
    loop.add(requests(TEXTS[:1])[0])
    loop.step()
    assert loop.cancel(0) and loop.active == 0 and loop.has_work
    assert loop.step() == [Output(0, (), "cancelled")] and not loop.has_work and loop.step() == []


def test_refused_requests_leave_no_trace(tiny):
    loop = Loop(tiny, Fixed())
    request = requests(TEXTS[:1])[0]
    loop.add(request)
    with pytest.raises(RequestError, match="id is 0; it must differ"):
        loop.add(request)
    with pytest.raises(RequestError, match="max_tokens is 0"):
        loop.add(Request(1, (1,), SamplingParams(0)))
    assert loop.waiting == 1 and set(drive(loop, [])) == {0}
    loop.add(request)  # its id is free again
    assert loop.cancel(0)


def test_the_longest_request_fits(tiny):
    """prompt + max_tokens at the limit: positions, caches and rotary tables hold to the end."""
    loop = Loop(tiny, Fixed(), max_requests=2)
    limit = loop.limits.context
    todo = requests(prompts(2, low=30, high=31), max_tokens=limit - 30)
    got = tokens(drive(loop, todo))
    want = tokens(drive(Loop(tiny, NoDraft(), max_requests=2), todo))
    assert got == want and all(len(t) == limit - 30 for t in got.values())


class Failing:
    """The real engines, one of which raises at its n-th call."""

    def __init__(self, engines, name, at):
        self.engines, self.name, self.left = engines, name, at

    def __getattr__(self, name):
        if name == self.name:
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("out of order")
        return getattr(self.engines, name)


@pytest.mark.parametrize("engine", ["target", "backbone", "markov", "confidence", "verify", "ensure_capacity"])
def test_an_engine_that_raises_fails_its_requests_only(tiny, alone, engine):
    todo = requests(TEXTS, temperature=1.0)
    loop = Loop(Failing(tiny, engine, at=3), Threshold(0.5), max_requests=4)
    outputs = drive(loop, todo)
    failed = [i for i, each in outputs.items() if each[-1].finish_reason == "error"]
    assert 1 <= len(failed) <= 4 and all("out of order" in outputs[i][-1].error for i in failed)
    got = tokens(outputs)
    assert {i: got[i] for i in got if i not in failed} == {i: alone[i] for i in got if i not in failed}
    assert loop.active == 0 and len(got) == len(todo)


def test_metrics_count(tiny):
    loop = Loop(tiny, Fixed(), max_requests=4)
    outputs = drive(loop, requests(TEXTS))
    m = loop.metrics
    stats = [o.stats for each in outputs.values() for o in each if o.stats]
    assert m.rounds == m.drafts == len(stats) and m.verified_at == [len(stats)] * 4
    assert m.accepted_at == [sum(s.accepted > k for s in stats) for k in range(4)]
    assert m.prompt_tokens == sum(map(len, TEXTS)) and m.emitted_tokens == 16 * len(TEXTS)
    assert m.acceptance_length == pytest.approx(1 + np.mean([s.accepted for s in stats]))
    assert 0 < m.share_outside_engines < 1 and m.as_dict()["finished"] == {"length": len(TEXTS)}


@pytest.mark.parametrize("field", ["max_requests", "token_budget"])
def test_sizes_out_of_range(tiny, field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        Loop(tiny, Fixed(), **{field: 0})


class Idle(Fixed):
    """Drafts for nobody: all context waits."""

    def draft(self, load):
        return 0


def test_waiting_context_keeps_no_prompt_of_another_alive(tiny):
    """Rows that wait may share memory with those of their own rounds only."""
    loop = Loop(tiny, Idle(), max_requests=3, token_budget=40)
    for request in requests(prompts(9, low=20), max_tokens=12):
        loop.add(request)
    seen, rows = 0, loop.max_requests
    while loop.has_work:
        loop.step()
        for s in loop._rows:
            for piece in s.pending:
                whole = piece if piece.base is None else piece.base
                seen += whole.nbytes > piece.nbytes
                assert whole.nbytes <= max(piece.nbytes, rows * piece.nbytes // len(piece))
    assert seen  # some do

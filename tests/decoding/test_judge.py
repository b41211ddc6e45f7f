"""The accept rules in the loop: coupled text is the target's own, log-probs are the target's, edits and filters hold, and
every feature leaves the exact distribution."""

import numpy as np
import pytest

import engines
from decoding.compare import next_logits
from decoding.judge import Judge
from decoding.loop import Loop
from decoding.metrics import Metrics
from decoding.request import Request, SamplingParams, Sequence
from decoding.schedule import Fixed, NoDraft, Threshold
from export.reference import keep, softmax
from tests.bundles import tiny_bundle
from tests.decoding.drive import drive, prompts, tokens
from tests.decoding.test_sampling import edited


class Jagged(Fixed):
    """A length at random for every request and round; in some rounds no draft at all."""

    def __init__(self, seed=0):
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def draft(self, load):
        return load.requests if self.rng.random() < 0.8 else 0

    def lengths(self, state):
        R, G = state.confidence.shape
        return self.rng.integers(0, G + 1, R)


MIXTURES = (
    {},
    dict(top_k=5),
    dict(top_p=0.7, presence_penalty=0.8),
    dict(min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.2),
    dict(bad_words=((3,), (5, 6), (1, 2, 4)), logit_bias=((9, 2.0),), min_tokens=4),
    dict(top_k=12, top_p=0.9, min_p=0.01, return_log_probs=True),
)


def mixed(count, accept="coupled", temperature=None, **params):
    """Requests of every mixture, greedy ones among them, with different lengths."""
    rng, made = np.random.default_rng(5), []
    for i, text in enumerate(prompts(count, seed=4)):
        own = 0.0 if i % 7 == 6 else float(rng.choice([0.4, 1.0, 1.6]))
        values = {"temperature": own if temperature is None else temperature, **MIXTURES[i % len(MIXTURES)], **params}
        made.append(Request(i, text, SamplingParams(int(rng.integers(3, 28)), seed=100 + i, accept=accept, **values)))
    return made


def finished(outputs):
    """{id: (tokens, finish reason)}, or the error that ended a request."""
    errors = [o.error for each in outputs.values() for o in each if o.error]
    assert not errors, errors[0]
    return {i: ([t for o in each for t in o.token_ids], each[-1].finish_reason) for i, each in outputs.items()}


@pytest.fixture(scope="module")
def alone(tiny):
    """The target alone, one request at a time."""
    return finished(drive(Loop(tiny, NoDraft(), max_requests=1), mixed(30)))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("scheduler", [NoDraft, Fixed, Threshold, Jagged], ids=["none", "fixed", "threshold", "jagged"])
def test_coupled_text_is_the_targets_own(tiny, alone, scheduler, batch):
    todo = mixed(30)
    later = [todo[20 + 2 * k : 22 + 2 * k] for k in range(5)]  # some join while others decode
    loop = Loop(tiny, scheduler(), max_requests=batch, token_budget=24)
    got = finished(drive(loop, todo[:20], lambda step: later.pop() if step % 3 == 0 and later else ()))
    assert got == alone


def test_coupled_accepts_more_than_chance(tiny):
    """Draft and target see the same noise: fewer accepted than by rejection, but far more than by independent draws."""
    length = {}
    for rule in ("rejection", "coupled"):
        loop = Loop(tiny, Fixed(), max_requests=8)
        todo = [
            Request(i, text, SamplingParams(40, 1.0, seed=i, ignore_eos=True, accept=rule))
            for i, text in enumerate(prompts(24))
        ]
        drive(loop, todo)
        length[rule] = loop.metrics.accepted_tokens / loop.metrics.rounds
    assert 0.4 * length["rejection"] < length["coupled"] < length["rejection"]


@pytest.mark.parametrize("batch", [1, 4])
def test_plain_requests_are_judged_as_in_the_company_of_others(tiny, monkeypatch, batch):
    """The short way (every request wants its argmax alone) against that of mixed batches, with prompts in pieces."""
    requests = [Request(i, text, SamplingParams(20)) for i, text in enumerate(prompts(9, seed=8))]
    run = lambda: finished(drive(Loop(tiny, Jagged(), max_requests=batch, token_budget=9), requests))
    calls, short_way, made = [], Judge._plain, Sequence.__post_init__
    monkeypatch.setattr(Judge, "_plain", lambda *args: calls.append(1) or short_way(*args))
    short = run()
    assert len(calls) > 20
    monkeypatch.setattr(Sequence, "__post_init__", lambda s: made(s) or setattr(s, "plain", False))
    calls.clear()
    assert run() == short and not calls


def test_temperature_zero_is_greedy_under_either_rule(tiny):
    runs = [
        finished(drive(Loop(tiny, s(), max_requests=4), mixed(12, rule, temperature=0.0)))
        for s in (NoDraft, Fixed)
        for rule in ("rejection", "coupled")
    ]
    assert all(run == runs[0] for run in runs)


def test_rejection_text_depends_on_seed_and_lengths_alone(tiny):
    """fixed: whatever it is batched with, in whatever order it came."""
    todo = mixed(20, "rejection")
    want = finished(drive(Loop(tiny, Fixed(), max_requests=1), todo))
    assert finished(drive(Loop(tiny, Fixed(), max_requests=6), todo[::-1])) == want


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("accept", ["rejection", "coupled"])
def test_log_probs_are_of_the_raw_target_distribution(tiny, accept, temperature):
    todo = mixed(9, accept, temperature=temperature, return_log_probs=True)
    outputs = drive(Loop(tiny, Fixed(), max_requests=4), todo)
    finished(outputs)
    for request in todo:
        text = list(request.prompt_ids)
        for output in outputs[request.id]:
            assert len(output.log_probs) == len(output.token_ids)
            for token, value in zip(output.token_ids, output.log_probs):
                assert value == pytest.approx(np.log(softmax(next_logits(tiny, text))[token]), abs=1e-4)
                text.append(token)


def test_who_did_not_ask_gets_no_log_probs(tiny):
    outputs = drive(Loop(tiny, Fixed()), [Request(0, (1, 2), SamplingParams(6, return_log_probs=False))])
    assert all(o.log_probs is None for o in outputs[0])


def test_greedy_edits_are_the_argmax_of_the_edited_logits(tiny):
    params = dict(
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.4, logit_bias=((3, 3.0),),
        bad_words=((9,), (3, 3)), min_tokens=20, ignore_eos=True,
    )  # fmt: skip
    todo = [Request(i, text, SamplingParams(24, **params)) for i, text in enumerate(prompts(6, seed=9))]
    got = tokens(drive(Loop(tiny, Fixed(), max_requests=3), todo))
    import tests.decoding.test_sampling as by_the_book

    for request in todo:
        output = []
        for token in got[request.id]:
            row = next_logits(tiny, [*request.prompt_ids, *output])
            banned_eos = by_the_book.EOS  # this bundle's own end-of-sequence token is 20
            want = edited(row, SamplingParams(24, **{**params, "min_tokens": 0}), list(request.prompt_ids), output)
            assert banned_eos and (len(output) >= 20 or token != 20)
            if len(output) < 20:
                want[20] = -np.inf
            assert want[token] >= want.max() - 1e-4
            output.append(token)


def test_min_tokens_holds_the_end_back(tiny):
    todo = [Request(i, t, SamplingParams(30, 1.5, seed=i, logit_bias=((20, 6.0),))) for i, t in enumerate(prompts(20))]
    short = finished(drive(Loop(tiny, Fixed(), max_requests=8), todo))
    held = [Request(r.id, r.prompt_ids, SamplingParams(30, 1.5, seed=r.id, logit_bias=((20, 6.0),), min_tokens=12)) for r in todo]
    long = finished(drive(Loop(tiny, Fixed(), max_requests=8), held))
    assert min(len(t) for t, _ in short.values()) < 12 <= min(len(t) - (r == "stop") for t, r in long.values())


def test_a_nucleus_that_does_not_fit_is_looked_for_again(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr("decoding.judge.TOP_COUNT", 2)
    honest = tiny.verify
    watched = lambda batch: calls.append(int(batch.top_count[0])) or honest(batch)
    monkeypatch.setattr(tiny, "verify", watched)
    params = dict(top_p=0.95, temperature=1.5)
    todo = [Request(i, t, SamplingParams(12, seed=i, ignore_eos=True, **params)) for i, t in enumerate(prompts(8))]
    small = finished(drive(Loop(tiny, Fixed(), max_requests=4), todo))
    assert max(calls) > 2 and 2 in calls
    monkeypatch.setattr("decoding.judge.TOP_COUNT", 64)
    assert finished(drive(Loop(tiny, Fixed(), max_requests=4), todo)) == small


def test_an_unknown_rule_is_refused(tiny):
    with pytest.raises(ValueError, match="accept is 'greedy'; it must be one of rejection, coupled."):
        Judge(tiny, Metrics(4), "greedy")


# -- exact distributions --------------------------------------------------------------------------------------------------

VOCAB, LENGTH, SAMPLES, PROMPT = 8, 3, 3_000, (1, 5, 2)
FEATURES = {
    "temperature": dict(temperature=0.6),
    "top_k": dict(top_k=3),
    "top_p": dict(top_p=0.7),
    "min_p": dict(min_p=0.15),
    "all filters": dict(temperature=1.4, top_k=6, top_p=0.85, min_p=0.05),
    "repetition": dict(repetition_penalty=1.8),
    "presence and frequency": dict(presence_penalty=1.0, frequency_penalty=0.7),
    "bias and bans": dict(logit_bias=((3, 1.5), (4, -2.0)), bad_words=((0,), (2, 6), (6, 6))),
    "everything": dict(temperature=0.9, top_k=5, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.4, bad_words=((2, 6),)),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    loaded = engines.load(tiny_bundle(folder, vocab=VOCAB, depth=2, rank=4, block_size=3, draft_vocab=5), threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def raw(small):
    """Raw logits after every prefix of PROMPT's continuations, {prefix: [V]}."""
    grid = [()]
    for length in range(LENGTH - 1):
        grid += [(*p, t) for p in grid if len(p) == length for t in range(VOCAB)]
    return {prefix: next_logits(small, [*PROMPT, *prefix]) for prefix in grid}


def exact(raw, params):
    """[8^3] probabilities of every continuation under `params`, by enumeration in float64."""
    cells = {(): 1.0}
    for _ in range(LENGTH):
        new = {}
        for prefix, mass in cells.items():
            p = softmax(edited(raw[prefix], params, list(PROMPT), list(prefix)) / params.temperature)
            p = np.where(keep(p, params.top_k, params.top_p, params.min_p), p, 0)
            for token in range(VOCAB):
                new[(*prefix, token)] = mass * p[token] / p.sum()
        cells = new
    return np.array([cells[c] for c in np.ndindex((VOCAB,) * LENGTH)])


def chi_square(loaded, rule, values, want, scheduler=None, samples=SAMPLES):
    """Standardised chi-square (close to a normal variable) of continuations against the exact cells."""
    params = {"temperature": 1.0, **values}
    todo = [
        Request(i, PROMPT, SamplingParams(LENGTH, seed=i * 7919, ignore_eos=True, accept=rule, **params))
        for i in range(samples)
    ]
    got = finished(drive(Loop(loaded, scheduler or Fixed(), max_requests=64), todo))
    drawn = np.array([got[i][0] for i in range(samples)])
    observed = np.bincount(np.ravel_multi_index(drawn.T, (VOCAB,) * LENGTH), minlength=len(want))
    if observed[want == 0].any():  # what the target cannot give
        return np.inf
    expected = want * samples
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    chi, degrees = ((observed - expected)[used] ** 2 / expected[used]).sum(), used.sum() - 1
    return ((chi / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_leaves_the_exact_distribution(small, raw, name, rule):
    params = SamplingParams(LENGTH, **{"temperature": 1.0, **FEATURES[name]})
    assert chi_square(small, rule, FEATURES[name], exact(raw, params)) < 3.7  # p about 1e-4, fixed seeds


class Broken:
    """The real engines with a changed verify batch."""

    def __init__(self, engines, change):
        self.engines, self.change = engines, change

    def __getattr__(self, name):
        return getattr(self.engines, name)

    def verify(self, batch):
        return self.engines.verify(type(batch)(**{**batch.__dict__, **self.change(batch)}))


def later_rows_like_the_first(batch):
    """Edits of row 0 for every row: a slot that does not see its own prefix."""
    at, rows = batch.edit_at, np.unique(batch.edit_at[:, 0])
    add = batch.edit_add.copy()
    for row in rows[1:]:
        if row % 4:
            mine, before = at[:, 0] == row, at[:, 0] == row - 1
            add[mine] = add[before] if mine.sum() == before.sum() else add[mine]
    return {"edit_add": add}


MUTATIONS = {
    "accepts everything": ("all filters", lambda b: {"accept_uniforms": 0 * b.accept_uniforms}),
    "no edits": ("presence and frequency", lambda b: {"edit_add": 0 * b.edit_add}),
    "edits without the block's own prefix": ("presence and frequency", later_rows_like_the_first),
    "no filters": ("top_p", lambda b: {"top_p": np.ones_like(b.top_p)}),
    "temperature twice": ("temperature", lambda b: {"temperature": b.temperature**2}),
    "penalty on the wrong side": ("repetition", lambda b: {"edit_scale": 1 / b.edit_scale}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_rule_is_caught(small, raw, name):
    feature, change = MUTATIONS[name]
    params = SamplingParams(LENGTH, **{"temperature": 1.0, **FEATURES[feature]})
    assert chi_square(Broken(small, change), "rejection", FEATURES[feature], exact(raw, params)) > 3.7


def test_coupled_noise_that_differs_between_passes_is_caught(tiny, alone):
    """Noise that is not keyed by position alone: the text is no longer the target's own."""
    shifted = Broken(tiny, lambda b: {"noise": np.roll(b.noise, 1, axis=1)} if len(b.row_index) % 2 else {})
    assert finished(drive(Loop(shifted, Fixed(), max_requests=3), mixed(30))) != alone

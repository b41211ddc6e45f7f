import itertools

import numpy as np
import pytest

from decoding.schedule import RoundLoad, RoundState, ScheduleError, make
from decoding.schedule_aware import Causal, descending, longest, top_k
from decoding.schedule_lagged import FIRST_WAIT, LONGEST_WAIT, Lagged, affordable, affordable_few, padding, sums
from engines.sps import Sps

G = 4


def table(ms, draft=1.0, G=G, requests=(1, 2, 4, 8), has_confidence=True, slot=0.0):
    """An SPS table of the function ms(tokens) and `slot` ms a padded slot."""
    target = [(r, n, 64, ms(n)) for r in requests for n in range(r, r * (G + 1) + 1 if r > 1 else 129)]
    padded = [(r, r + 1, r * 2, 64, ms(r + 1) + slot * (r - 1)) for r in requests if r > 1 and slot]
    return Sps.from_points(target, [(r, 64, draft) for r in requests], has_confidence, padded)


def state(confidence, **more):
    confidence = np.array(confidence, np.float64)
    R = len(confidence)
    return RoundState(confidence, np.full(R, np.nan), context=64.0, **more)


def conditional(survival):
    """Confidences whose running products are `survival`."""
    survival = np.array(survival, np.float64)
    return survival / np.concatenate([np.ones((len(survival), 1)), survival[:, :-1]], axis=1)


def settled(sps, confidence, rounds=3, scheduler=None):
    """A lagged scheduler that has seen `rounds` rounds of `confidence`, none of which it observed."""
    scheduler = scheduler or Lagged(sps)
    for _ in range(rounds):
        scheduler.draft(RoundLoad(len(confidence), context=64))
        scheduler.lengths(state(confidence))
    return scheduler


# -- top K -------------------------------------------------------------------------------------------------------------


def test_top_k_takes_the_largest_and_breaks_ties_by_slot_then_row():
    s = np.array([[0.9, 0.5, 0.5, 0.0], [0.8, 0.5, 0.1, 0.1]])
    want = [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (3, 4), (3, 4), (3, 4)]
    assert [tuple(top_k(s, K, descending(s)).tolist()) for K in range(10)] == want


def test_top_k_against_a_sort_of_all_candidates():
    rng = np.random.default_rng(0)
    for _ in range(300):
        R, g = rng.integers(1, 7), rng.integers(1, 6)
        s = np.cumprod(rng.choice([0.0, 0.5, 0.9, 1.0], (R, g)), axis=1)
        order = sorted(itertools.product(range(g), range(R)), key=lambda c: (-s[c[1], c[0]], *c))
        order = [c for c in order if s[c[1], c[0]] > 0]
        for K in range(R * g + 1):
            want = np.bincount([r for _, r in order[:K]], minlength=R)
            assert top_k(s, K, descending(s)).tolist() == want.tolist()


def test_longest_is_the_longest_of_top_k():
    rng = np.random.default_rng(1)
    for _ in range(300):
        R, g = rng.integers(1, 7), rng.integers(1, 6)
        s = np.cumprod(rng.choice([0.5, 0.9, 1.0], (R, g)), axis=1)
        want = [int(top_k(s, K, descending(s)).max()) for K in range(R * g + 1)]
        assert longest(s).tolist() == want, "ties and all: it may not look behind a candidate"


def test_sums_and_padding_by_hand():
    s = np.array([[0.9, 0.5], [0.8, 0.1]])
    assert sums(s, depths=False)[0].tolist() == pytest.approx([0, 0.9, 1.7, 2.2, 2.3])
    assert sums(s, depths=True)[0].tolist() == pytest.approx([0, 0.9, 1.7, 1.7, 1.7])
    many = np.cumprod(np.random.default_rng(2).beta(4, 2, (100, 5)), axis=1)  # sorted in 16 bits
    for depths in (False, True):
        np.testing.assert_allclose(sums(many, depths)[-1, 1:], np.cumsum(descending(many)), atol=500 / 65535)
    assert padding(0.5, 3, 2, np.arange(4)).tolist() == [[0, 1.0, 0.5, 0], [0, 2.5, 2.0, 1.5]]


# -- causal ------------------------------------------------------------------------------------------------------------


def test_causal_by_hand():
    """ms = 10 + tokens, the draft 1: Theta 2/13, 2.9/14, 3.7/15, 4.3/16, 4.7/17 = .2765, 4.9/18 = .272: four."""
    sps = table(lambda n: 10.0 + n)
    got = Causal(sps).lengths(state(conditional([[0.9, 0.6, 0.2, 0.1], [0.8, 0.4, 0.1, 0.05]])))
    assert got.tolist() == [2, 2]
    # Theta 2/13, 2.15/14 = .1536 < .1538: the first candidate does not pay, nothing is verified
    assert Causal(sps).lengths(state(conditional([[0.15, 0.1, 0.1, 0.1], [0.1] * 4]))).tolist() == [0, 0]


def test_causal_stops_at_the_first_decline_where_a_search_would_go_on():
    """The 3rd token costs a tile of 4 more: Theta 1/11, 1.9/11, then 2.7/20 and up to 4.3/20 = .215 > .173 behind it."""
    sps = table(lambda n: 10.0 if n <= 2 else 19.0, draft=1.0)
    block = [[0.9, 0.8, 0.8, 0.8]]
    assert Causal(sps).lengths(state(conditional(block))).tolist() == [1]
    lagged = settled(sps, conditional(block))
    assert lagged.lengths(state(conditional(block))).tolist() == [4]


def test_padded_slots_are_paid_for():
    """ms = 10 + tokens + 0.5 a padded slot, the draft 1. Causal: 4/15, 4.9/(16 + 1.5) = .28, 5.6/(17 + 3) = .28: no longer
    alone at that depth. Without padding it goes on to the .6: 6.2/18."""
    lone = conditional([[0.9, 0.7, 0.6, 0.5], [0.1] * 4, [0.1] * 4, [0.1] * 4])
    free, dear = table(lambda n: 10.0 + n), table(lambda n: 10.0 + n, slot=0.5)
    assert Causal(free).lengths(state(lone)).tolist() == [4, 0, 0, 0]
    assert Causal(dear).lengths(state(lone)).tolist() == [1, 0, 0, 0]
    assert settled(free, lone).lengths(state(lone)).tolist() == [4, 0, 0, 0]
    assert settled(dear, lone).lengths(state(lone)).max() <= 1
    even = conditional([[0.9, 0.7, 0.6, 0.1]] * 4)
    assert settled(dear, even).lengths(state(even)).tolist() == [3] * 4, "all go as deep: nothing is padded"
    alone = conditional([[0.9, 0.7, 0.6, 0.5]])
    assert settled(dear, alone).lengths(state(alone)).tolist() == settled(free, alone).lengths(state(alone)).tolist()


@pytest.mark.parametrize("slot", [0.0, 0.4])
def test_a_search_lasts_while_the_draft_is_skipped(slot):
    """Looking again costs time: the same load is searched once in a few rounds, another load at once."""
    scheduler = settled(table(lambda n: 10.0 + 5 * n, slot=slot), conditional([[0.3, 0.1, 0.1, 0.1]] * 2), rounds=6)
    counts, costs = [], scheduler.costs
    scheduler.costs = lambda *load: counts.append(load[:2]) or costs(*load)
    while not scheduler._skipping:
        scheduler.draft(RoundLoad(2, context=64))
    counts.clear()
    drafted = sum(scheduler.draft(RoundLoad(2, context=64)) > 0 for _ in range(32))
    assert drafted <= 4 and len(counts) <= 32 // 4 + 2 * drafted
    counts.clear()
    scheduler.draft(RoundLoad(3, context=64))
    assert (3, 0) in counts


def test_causal_sees_plain_requests_and_room():
    sps = table(lambda n: 10.0 + n, draft=0.001)
    block = conditional([[0.9, 0.3, 0.2, 0.18]])
    assert Causal(sps).lengths(state(block)).tolist() == [4]
    assert Causal(sps).lengths(state(block, room=2)).tolist() == [2]
    # seven plain requests: 8/18 = .444, 8.9/19 = .468, 9.2/20 = .46
    assert Causal(sps).lengths(state(block, plain=7)).tolist() == [1]


def test_a_prompt_in_the_step_changes_the_place_on_the_curve_only():
    line, knee = table(lambda n: 10.0 + n), table(lambda n: 10.0 + max(n - 12, 0) * 3.0)
    block = conditional([[0.9, 0.6, 0.4, 0.3]])
    for prefill in (0, 5, 50):
        assert Causal(line).lengths(state(block, prefill=prefill)).tolist() == Causal(line).lengths(state(block)).tolist()
    assert Causal(knee).lengths(state(block)).tolist() == [4]
    assert Causal(knee).lengths(state(block, prefill=40)).tolist() == [2]  # 3 ms a token there: 1.9/14, 2.5/17 = .147, 2.9/20 = .145


@pytest.mark.parametrize("name", ["causal", "lagged"])
def test_later_confidences_never_change_an_earlier_decision(name):
    """Whether a slot is verified depends on no confidence behind it in the order of survival."""
    rng = np.random.default_rng(0)
    jagged = {n: float(t) for n, t in enumerate(np.cumsum(rng.uniform(0, 0.6, 200)) + rng.uniform(0, 1, 200) + 12)}
    sps = table(jagged.__getitem__)

    def fresh(history):
        scheduler = make(name, sps=sps)
        for past in history:
            scheduler.lengths(state(past))
        return scheduler

    changed = 0
    for _ in range(60):
        R = int(rng.integers(1, 5))
        history = [rng.beta(4, 2, (int(rng.integers(1, 5)), G)) for _ in range(4)]
        now = rng.beta(4, 2, (R, G))
        lengths = fresh(history).lengths(state(now))
        for r, k in itertools.product(range(R), range(G)):
            if k < G - 1:
                other = now.copy()
                other[r, k + 1 :] = rng.uniform(size=G - 1 - k)
                new = fresh(history).lengths(state(other))
                assert (new[r] > k) == (lengths[r] > k)
                changed += new.tolist() != lengths.tolist()
    assert changed > 20  # the confidences do matter


# -- lagged ------------------------------------------------------------------------------------------------------------


def test_affordable_on_a_flat_curve_is_the_budget_and_on_a_line_a_price():
    flat = np.array([10.0, 10, 10, 10, 30, 30, 30])  # three candidates are free, the fourth costs a tile
    sure, unsure = np.array([1.0] * 6), np.array([0.3, 0.2, 0.1, 0.05, 0.02, 0.01])
    assert affordable(sure, 0.1, 3.0, flat) == 3 and affordable(unsure, 0.1, 3.0, flat) == 3
    line = 10.0 + np.arange(7)
    assert affordable(sure, 0.25, 2.0, line) == 6  # each costs .25 tokens
    assert affordable(unsure, 0.25, 2.0, line) == 1


def test_a_search_lasts_until_four_blocks_are_new(monkeypatch):
    scheduler, searched = settled(table(lambda n: 10.0 + 0.01 * n), conditional([[0.9, 0.8, 0.7, 0.6]]), 12), []
    monkeypatch.setattr("decoding.schedule_lagged.sums", lambda *a: searched.append(1) or sums(*a))
    rounds = 16
    for _ in range(rounds):
        scheduler.draft(RoundLoad(1, context=64))
        scheduler.lengths(state(conditional([[0.9, 0.8, 0.7, 0.6]])))
    assert len(searched) in (rounds // 4, rounds // 4 + 1)


def test_a_lone_request_is_decided_like_one_of_many():
    """In numbers instead of arrays: the same K, for zeros among the survivals, any budget and any cost."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 9))
        ordered = np.cumprod(rng.choice([0.0, 0.3, 0.8, 0.99, 1.0], n))
        costs = np.cumsum(rng.random(n + 1))
        theta, budget = float(rng.random() * 2), float(rng.random() * (n + 1))
        want = top_k(ordered[None], affordable(ordered, theta, budget, costs), ordered)[0]
        few = affordable_few(ordered.tolist(), theta, budget, costs.tolist())
        assert min(few, int((ordered > 0).sum())) == want


@pytest.mark.parametrize("room", [0, 2, 9])
def test_a_lone_request_keeps_to_its_room(room):
    sure = conditional([[0.99, 0.98, 0.97, 0.0]])
    scheduler = settled(table(lambda n: 10.0 + 0.01 * n), sure)
    scheduler.draft(RoundLoad(1, context=64))
    assert scheduler.lengths(state(sure, room=room)).tolist() == [min(room, 3)]


def test_lagged_looks_back_two_rounds():
    """The budget of round t does not move with the confidences of round t - 1."""
    good, bad = np.full((8, G), 0.95), np.full((8, G), 0.05)
    cliff = table(lambda n: 10.0 if n <= 24 else 60.0)  # flat up to two slots for each of 8 requests: top K
    a, b = settled(cliff, good), settled(cliff, good)
    a.lengths(state(good)), b.lengths(state(bad))
    now = state(np.full((8, G), 0.9))
    assert a.lengths(now).tolist() == b.lengths(now).tolist() == [2] * 8


def test_lagged_budget_follows_the_number_of_requests():
    steep = table(lambda n: 10.0 + 0.2 * n)
    block = np.full((2, G), 0.9)
    for R in (1, 2, 5, 8, 3):
        scheduler = settled(steep, block)
        assert scheduler.draft(RoundLoad(R, context=64)) == R
        assert scheduler.lengths(state(np.full((R, G), 0.9))).tolist() == [G] * R


def test_one_weak_request_beside_strong_ones_is_not_verified():
    sps = table(lambda n: 4.0 + n, draft=0.5)
    mixed = np.array([[0.95] * G, [0.95] * G, [0.05] * G, [0.95] * G])
    scheduler = settled(sps, mixed)
    assert scheduler.lengths(state(mixed)).tolist() == [4, 4, 0, 4]


def test_room_is_a_bound():
    scheduler = settled(table(lambda n: 10.0 + 0.01 * n), np.full((4, G), 0.9))
    for room in (0, 1, 7, 16):
        assert scheduler.lengths(state(np.full((4, G), 0.9), room=room)).sum() == room


def rounds(scheduler, confidence, count, load=None):
    """[count] what draft() said, with `confidence` seen whenever it drafts."""
    said, R = [], len(confidence)
    for _ in range(count):
        n = scheduler.draft(load or RoundLoad(R, context=64))
        said.append(n)
        if n:
            lengths = scheduler.lengths(state(confidence[:n], plain=R - n))
            scheduler.observe(lengths, np.minimum(lengths, 1))
    return said


COSTLY = table(lambda n: 4.0 + 2.0 * n, draft=3.0)  # a token costs nearly what it may bring, and the draft comes on top
GOOD, BAD = np.full((8, G), 0.97), np.full((8, G), 0.2)


def test_drafts_before_there_is_evidence_and_not_where_it_does_not_pay():
    scheduler = Lagged(COSTLY)
    said = rounds(scheduler, BAD, 400)
    given_up = said.index(0)
    assert said[:given_up] == [8] * given_up and 2 <= given_up < 6 and 8 not in said[given_up:]
    at = [i for i, n in enumerate(said) if n and i > given_up]
    assert {said[i] for i in at} == {2}
    waits = np.diff(at)
    assert waits[0] >= FIRST_WAIT and waits.max() <= LONGEST_WAIT and (np.diff(waits) >= 0).all()
    assert len(at) < 400 / 25


def test_one_request_has_more_patience():
    """Its blocks speak for longer than those of many: a loss of a tenth a round is borne for some rounds more."""
    slow = table(lambda n: 9.0 + 1.0 * n, draft=1.0)
    alone, together = (rounds(Lagged(slow), BAD[:R], 60).index(0) for R in (1, 8))
    assert together < alone < 30


def test_recovers_when_drafts_pay_again():
    scheduler = Lagged(table(lambda n: 10.0 + 0.5 * n, draft=3.0))
    assert rounds(scheduler, BAD, 200)[-10:].count(8) == 0
    for k in range(600):
        if rounds(scheduler, GOOD, 1)[0] == 8:
            break
    assert k < 12 * LONGEST_WAIT and rounds(scheduler, GOOD, 10) == [8] * 10


def test_a_lighter_load_takes_the_draft_up_at_once():
    """Eight requests do not pay, one does, with the same survival: no probe is needed to see it."""
    knee = table(lambda n: 10.0 + 8.0 * max(n - 6, 0), draft=1.0)
    scheduler = Lagged(knee)
    fair = np.full((8, G), 0.6)
    assert rounds(scheduler, fair, 60)[-1] == 0
    assert scheduler.draft(RoundLoad(1, context=64)) == 1 and not scheduler.probing
    scheduler.lengths(state(fair[:1]))
    assert 0 in rounds(scheduler, fair, 30)


def test_observed_acceptance_corrects_promises():
    """Confidences of .9 of which nothing is ever accepted: half of what they promise is believed, and the draft stops."""
    scheduler = Lagged(table(lambda n: 8.0 + 0.9 * n, draft=2.0))
    liars = np.full((4, G), 0.75)
    said = []
    for _ in range(200):
        n = scheduler.draft(RoundLoad(4, context=64))
        said.append(n)
        if n:
            lengths = scheduler.lengths(state(liars[:n], plain=4 - n))
            scheduler.observe(lengths, np.zeros_like(lengths))
    assert said[:3] == [4] * 3 and said[-20:].count(4) == 0


def test_without_a_confidence_head_acceptance_is_learnt():
    sps = table(lambda n: 6.0 + n, draft=0.5, has_confidence=False)
    for name in ("causal", "lagged"):
        scheduler, ones, last = make(name, sps=sps), np.ones((4, G), np.float32), None
        assert scheduler.uses_confidence is False
        for _ in range(40):
            scheduler.draft(RoundLoad(4, context=64))
            last = scheduler.lengths(state(ones))
            scheduler.observe(last, np.minimum(last, 2))  # the third slot never holds
        assert last.tolist() == [2] * 4, name


def test_a_machine_that_drifts_corrects_the_table():
    """Rounds with a draft take three times what the table says, plain ones what it says: the draft is given up."""
    scheduler = Lagged(table(lambda n: 10.0 + 0.5 * n, draft=1.0))
    fair = np.full((4, G), 0.8)
    said = []
    for _ in range(2000):
        n = scheduler.draft(RoundLoad(4, context=64))
        said.append(n)
        if n:
            lengths = scheduler.lengths(state(fair[:n], plain=4 - n))
            scheduler.observe(lengths, (lengths * 0.6).astype(int))
            scheduler.timed(3.0, 3.0 * (10 + 0.5 * (4 + lengths.sum())))
        else:
            scheduler.timed(0.0, 12.0)
    assert said[:10] == [4] * 10 and said.count(0) > 100
    assert 0.2 <= min(scheduler.speed.values()) <= max(scheduler.speed.values()) <= 5


def test_the_same_drift_with_and_without_a_draft_changes_nothing():
    scheduler = settled(table(lambda n: 10.0 + 0.5 * n), np.full((4, G), 0.8))
    now = state(np.full((4, G), 0.7))
    before = scheduler.lengths(now).tolist()
    scheduler.speed = {True: 1.7, False: 1.7}
    assert scheduler.draft(RoundLoad(4, context=64)) == 4 and scheduler.lengths(now).tolist() == before


def test_schedulers_without_their_table():
    for name in ("causal", "lagged"):
        with pytest.raises(ScheduleError, match=f"schedule is '{name}' and needs an SPS table; run make profile"):
            make(name)


def test_no_requests():
    for name in ("causal", "lagged"):
        scheduler = make(name, sps=COSTLY)
        assert scheduler.draft(RoundLoad(0, plain=3, context=64)) == 0
        assert scheduler.lengths(state(np.zeros((0, G)))).tolist() == []


def test_after_a_pause_of_the_traffic_a_skipped_draft_is_looked_at_again():
    """One user whose texts never pay; when the loop has run empty, the next text may be of another kind: it is drafted for at
    once and few old blocks speak. Without the pause the next probe is far away."""
    first = {}
    for paused in (True, False):
        scheduler = Lagged(COSTLY)
        rounds(scheduler, BAD[:1], 400)
        while not rounds(scheduler, BAD[:1], 1)[0]:
            pass  # until a probe: the next one is as far away as can be
        assert scheduler._skipping
        if paused:
            scheduler.idle()
            assert scheduler._pooled <= 2
        first[paused] = rounds(scheduler, GOOD[:1], 100).index(1)
    assert first[True] == 0 and first[False] > 20

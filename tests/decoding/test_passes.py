from itertools import combinations

import numpy as np
import pytest

from decoding.passes import Pass, plan


def cost(passes, capacity, worth):
    return sum(worth + p.slots * capacity for p in passes)


def fed(passes, R):
    """What each row is fed over all passes."""
    total = [0] * R
    for p in passes:
        for i, n in enumerate(p.counts):
            assert not (n and total[p.first_row + i]), "a row is fed once"
            total[p.first_row + i] += n
    return total


def runs(counts):
    """Every way to cut the rows with counts over 0 into runs of neighbours."""
    used = [row for row, n in enumerate(counts) if n]
    for k in range(len(used)):
        for cuts in combinations(range(1, len(used)), k):
            edges = [0, *cuts, len(used)]
            yield [
                Pass(used[i], [counts[r] if r in used[i:] else 0 for r in range(used[i], used[j - 1] + 1)])
                for i, j in zip(edges, edges[1:])
            ]


def every_plan(counts, decode):
    yield from runs(counts)
    own, chunks = ([n if d == kind else 0 for n, d in zip(counts, decode)] for kind in (True, False))
    if any(own) and any(chunks):
        used = [row for row, n in enumerate(own) if n]
        alone = Pass(used[0], own[used[0] : used[-1] + 1])
        yield from ([alone, *rest] for rest in runs(chunks))


@pytest.mark.parametrize("seed", range(40))
def test_no_other_passes_are_cheaper(seed):
    rng = np.random.default_rng(seed)
    R = int(rng.integers(2, 7))
    decode = (rng.random(R) < 0.5).tolist()
    decode[int(rng.integers(R))] = False
    counts = [int(rng.integers(1, 4) if d else rng.integers(0, 40)) for d in decode]
    if not any(counts):
        counts[0] = 5
    capacity, worth = 64 * int(rng.integers(1, 6)), int(rng.choice([200, 2000, 8000, 30000]))
    made = plan(counts, decode, capacity, worth)
    assert fed(made, R) == counts
    assert cost(made, capacity, worth) == min(cost(p, capacity, worth) for p in every_plan(counts, decode))


def test_decode_rows_alone_are_one_pass_however_uneven():
    assert plan([1, 7, 1], [True] * 3, 64, 1) == [Pass(0, [1, 7, 1])]


def test_a_short_prompt_shares_a_pass_and_a_long_one_does_not():
    few, many = [1, 1, 1, 4], [1, 1, 1, 60]
    decode = [True, True, True, False]
    assert plan(few, decode, 128, 7168) == [Pass(0, few)]
    assert plan(many, decode, 128, 7168) == [Pass(0, [1, 1, 1]), Pass(3, [60])]


def test_decode_rows_around_a_long_prompt_are_one_pass():
    assert plan([1, 90, 1], [True, False, True], 128, 7168) == [Pass(0, [1, 0, 1]), Pass(1, [90])]


def test_prompts_of_unlike_lengths_part():
    assert plan([10, 12, 200], [False] * 3, 256, 7168) == [Pass(0, [10, 12]), Pass(2, [200])]
    assert plan([10, 12, 200], [False] * 3, 256, 1 << 30) == [Pass(0, [10, 12, 200])], "where a pass is dear"


def test_a_row_that_feeds_nothing_is_left_out():
    assert plan([0, 5, 0], [False] * 3, 64, 100) == [Pass(1, [5])]

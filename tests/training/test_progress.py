"""Which evaluation is the best so far, and for how many it has not been beaten."""

import math

from training.progress import Progress


def test_an_evaluation_is_judged():
    progress = Progress()
    assert [progress.judge(tau) for tau in (1.5, 1.4, 1.5, 1.6)] == [True, False, False, True]
    assert (progress.best, progress.waited) == (1.6, 0)
    assert not progress.judge(None) and progress.waited == 0, "nothing is held out"
    assert not progress.judge(math.nan) and (progress.best, progress.waited) == (1.6, 1)

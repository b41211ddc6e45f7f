"""Twin numbers: they tell requests with equal seeds apart where one's draft may steer another's schedule.

Knows: which numbers of a seed are taken. Refuses to know: what is drawn with them.

Under a load-aware scheduler the confidences of one request decide how much of another's draft is verified. Two requests
with the same seed and the same text would draw the same draft tokens, so the schedule of the later one would depend on
the very token that it is about to draw. Each request in flight therefore takes the smallest number that no other one
with its seed has, and that number goes into the counter of its uniforms; a request alone with its seed has 0. The
number of a finished request stays taken for the next PATIENCE rounds with a draft: until its blocks have left the
scheduler's memory.
"""

from __future__ import annotations

from collections import deque

PATIENCE = 26  # lagged keeps the blocks of at most POOL = 24 rounds, and the newest one apart from them


class Twins:
    def __init__(self) -> None:
        self._taken: dict[int, set[int]] = {}
        self._ended: deque[tuple[int, int, int]] = deque()  # (rounds with a draft when it ended, seed, number)
        self.drafts = 0

    def take(self, seed: int) -> int:
        """The smallest free number of `seed`."""
        taken = self._taken.setdefault(seed, set())
        number = next(i for i in range(len(taken) + 1) if i not in taken)
        taken.add(number)
        return number

    def end(self, seed: int, number: int) -> None:
        """The request is over; its number is free after PATIENCE more rounds with a draft."""
        self._ended.append((self.drafts, seed, number))

    def drafted(self) -> None:
        """A round with a draft has gone by."""
        self.drafts += 1
        while self._ended and self._ended[0][0] + PATIENCE <= self.drafts:
            self._free()

    def _free(self) -> None:
        _, seed, number = self._ended.popleft()
        taken = self._taken[seed]
        taken.discard(number)
        if not taken:
            del self._taken[seed]

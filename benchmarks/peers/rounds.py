"""Workers that take turns: every competitor is loaded once and stopped (SIGSTOP) unless it is its turn.

Knows: processes, whose turn it is. Refuses to know: what a worker runs, what its numbers mean.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LOAD_SECONDS, TURN_SECONDS = 300, 240


class WorkerError(RuntimeError):
    """One sentence: what a worker said, or that it is gone."""


@dataclass(frozen=True)
class Competitor:
    """One engine in one variant. precision: "fp32", "int8" or "bf16". schedule: of ours, else "". command, environment:
    how its worker is started."""

    peer: str
    variant: str
    precision: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    schedule: str = ""

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.peer, self.variant, self.schedule)))


class Worker:
    """A process that answers requests; asleep between turns, so that threads waiting for work cannot spin."""

    def __init__(self, competitor: Competitor, log: Path):
        self.competitor, self.log, self.version = competitor, log, ""
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as handle:
            self.process = subprocess.Popen(
                competitor.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=handle,
                text=True,
                env=os.environ | dict(competitor.environment),
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it is loaded; then it sleeps. Raises WorkerError."""
        self.version = self._read(LOAD_SECONDS)["version"]
        self._signal(signal.SIGSTOP)

    @contextmanager
    def turn(self):
        """Awake inside."""
        self._signal(signal.SIGCONT)
        try:
            yield self
        finally:
            self._signal(signal.SIGSTOP)

    def ask(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict:
        """workers/protocol.py's reply. Raises WorkerError."""
        try:
            self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise WorkerError(f"{self.competitor.label} is gone; see {self.log}.") from None
        return self._read(TURN_SECONDS)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _read(self, seconds: float) -> dict:
        timer = threading.Timer(seconds, self._signal, [signal.SIGKILL])
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(f"{self.competitor.label} ended or took more than {seconds} s; see {self.log}.")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.competitor.label}: {reply['error']}")
        return reply

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass


@dataclass(frozen=True)
class Turn:
    """One competitor's sums over the groups of prompts of one round.

    new: tokens made in all; seconds: for them, prompts included; after, after_seconds: those made once every prompt of
    their group had its first token, and their time. tokens: what was made, a list a prompt.
    """

    new: int
    seconds: float
    after: int
    after_seconds: float
    tokens: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, replies: Sequence[dict]) -> Turn:
        tokens = tuple(tuple(made) for reply in replies for made in reply["tokens"])
        return cls(
            new=sum(map(len, tokens)),
            seconds=sum(r["seconds"] for r in replies),
            after=sum(r["after"] for r in replies),
            after_seconds=sum(r["seconds"] - r["first_seconds"] for r in replies),
            tokens=tokens,
        )


def play(
    workers: Sequence[Worker],
    groups: Sequence[Sequence[Sequence[int]]],
    *,
    tokens: int,
    rounds: int,
    failed: Callable[[Worker, WorkerError], None],
    seconds: float = float("inf"),
    progress: Callable[[], None] = lambda: None,
) -> dict[Competitor, list[Turn]]:
    """Each round gives every worker one turn: all groups of prompts, one group at a time, its prompts together.

    The order moves on by one each round. A turn starts with a short untimed answer (the first one with a whole group:
    buffers grow then). No round begins that would not end within `seconds`, the first one apart. A worker that
    fails is reported once and left out of what is returned.
    """
    found: dict[Competitor, list[Turn]] = {w.competitor: [] for w in workers}
    out: set[Competitor] = set()
    started, longest = time.monotonic(), 0.0
    for number in range(rounds):
        begun = time.monotonic()
        if number and begun - started + longest > seconds:
            break
        shift = number % max(1, len(workers))
        for worker in [*workers[shift:], *workers[:shift]]:
            if worker.competitor not in out:
                try:
                    with worker.turn():
                        worker.ask(groups[0] if number == 0 else groups[0][:1], tokens if number == 0 else 8)
                        replies = [worker.ask(group, tokens) for group in groups]
                    found[worker.competitor].append(Turn.of(replies))
                except WorkerError as error:
                    out.add(worker.competitor)
                    failed(worker, error)
            progress()
        longest = max(longest, time.monotonic() - begun)
    return {c: turns for c, turns in found.items() if c not in out}

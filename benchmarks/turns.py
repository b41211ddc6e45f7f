"""A server and the loop in process under the same load, in short turns: what the way through Triton costs.

Knows: how a server stands still for a while. Refuses to know: which modes, engines and cells there are.

Two windows of a few seconds one after the other differ by 10% on a shared machine, whatever ran in them. Here both
loads stay up from the first token to the last and take turns of TURN seconds: a slow moment hits both. At the end of
the server's turn the processes that hold its engines are stopped (SIGSTOP), and the clock of its load with them. The
round that is interrupted looks long to the server: its phase metrics are of no use then, and `lagged` sees a slow round.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from client import Client, ClientError
from triton_repo.description import DSPARK

from .common import Item
from .inprocess import Lane
from .remote import answer, even_rate
from .steady import Plan, Window

# Seconds. tritonserver gives a model up that has not taken a message for 1 s; and since what is held back is due when
# the server goes on, a turn should hold as many bursts as that time does (one each 50 ms x users / cores: 0.4, 0.2, ..).
TURN = 0.75
TAIL = 0.02  # seconds after a stop: what was on its way to the users has come


class RemoteLane:
    """The load of benchmarks/steady.py on a server of this machine, over gRPC. Its clock stands still between its
    turns, and its users send nothing then.

    server: triton_repo.server.TritonServer. Raises ClientError when a request failed, ProcessLookupError when the
    server has no process with engines.
    """

    def __init__(self, server, items: Sequence[Item], plan: Plan, *, speculative: bool = True):
        self.items, self.plan, self.speculative = items, plan, speculative
        self.window = Window(plan)
        self._engines = engine_processes(server.process.pid)
        self._client = Client(server.grpc_url)
        self._users = [threading.Thread(target=self._use, daemon=True) for _ in range(plan.concurrency)]
        self._running, self._moved, self._failures = threading.Event(), threading.Event(), []
        self._rested, self._stopped = 0.0, time.perf_counter()

    @property
    def over(self) -> bool:
        return self.window.closed is not None

    def __enter__(self) -> "RemoteLane":
        self._client.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._go()
        self._failures.append(None)  # whoever still runs ends with its next response
        for user in self._users:
            if user.ident is not None:
                user.join()
        self._client.__exit__()

    def turn(self, seconds: float | None = None) -> None:
        """Runs until the window is open (None), or for so many seconds, or to the window's end; then stands still."""
        until = None if seconds is None else self._now() + seconds
        self._go()
        for user in self._users:
            if user.ident is None:
                user.start()
        while not self.over and (self.window.opened is None if until is None else self._now() < until):
            self._moved.wait(0.1 if until is None else min(0.1, max(until - self._now(), 0.0)))
            self._moved.clear()
            if self._failures:
                raise self._failures[0]
        self._halt()

    def _go(self) -> None:
        if not self._running.is_set():
            self._rested += time.perf_counter() - self._stopped
            self._signal(signal.SIGCONT)
            self._running.set()

    def _halt(self) -> None:
        self._running.clear()
        self._signal(signal.SIGSTOP)
        self._stopped = time.perf_counter()
        time.sleep(TAIL)

    def _signal(self, number: int) -> None:
        for process in self._engines:
            os.kill(process, number)

    def _now(self) -> float:
        return (time.perf_counter() if self._running.is_set() else self._stopped) - self._rested

    def _use(self) -> None:
        try:
            while not self.over and not self._failures:
                self._running.wait()
                answer(self._client, self.items, self.window, self.plan, self.speculative, self._now)
                self._moved.set()
        except ClientError as error:
            self._failures.append(error)
            self._moved.set()

    def summary(self) -> dict:
        """Window.summary() with even_rate as total_tok_s; no host_share: the stops lie in the server's rounds."""
        window = self.window
        rate = even_rate(window.arrivals, window.opened, window.closed)
        return window.summary() | {"total_tok_s": rate, "host_share": None}


def engine_processes(server: int) -> list[int]:
    """The children of process `server` that hold engines: the stubs of the model dspark. Raises ProcessLookupError."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == server and f"/{DSPARK}/" in folder.joinpath("cmdline").read_text():
                found.append(int(folder.name))
        except (OSError, ValueError, IndexError):  # it has ended
            continue
    if not found:
        raise ProcessLookupError(f"Process {server} has no child that runs the model {DSPARK}.")
    return found


def beside(direct: Lane, remote: RemoteLane, turn: float = TURN) -> tuple[dict, dict]:
    """The windows of the two lanes, taken in turns of `turn` seconds: their summaries."""
    direct.turn()
    with remote:
        remote.turn()
        while not (direct.over and remote.over):
            for lane in (remote, direct):
                if not lane.over:
                    lane.turn(seconds=turn)
        done = direct.summary()
        del done["turns"]  # of seconds, not of tokens
        return done, remote.summary()

"""Who runs the windows of benchmarks/bench.py: engines in this process, servers over gRPC, or both in turns.

Knows: which engines and servers a mode needs, all opened once. Refuses to know: which cells are measured, and in which
order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from .common import Item, encode
from .steady import Plan

Runner = Callable[[Sequence[str], str, Plan], list[dict]]  # (modes, kind, plan) -> what their windows measured


class InProcess:
    """Engines in this process, of every mode its own. A mode keeps its scheduler through a group, as a server does."""

    def __init__(
        self, bundle: Path, items: dict[str, list[Item]], modes: Sequence[str], threshold: float, stack: ExitStack,
        device: str | None = None,
    ):  # fmt: skip
        import engines

        self.opened = {mode: engines.load(bundle, device=device) for mode in modes}
        for own in self.opened.values():
            stack.callback(own.close)
        self.prompts = {kind: encode(bundle, chosen) for kind, chosen in items.items()}
        self.threshold, self.schedulers = threshold, {}

    def __call__(self, modes: Sequence[str], kind: str, plan: Plan) -> list[dict]:
        from .inprocess import together

        return together([self.lane(mode, kind, plan) for mode in modes])

    def lane(self, mode: str, kind: str, plan: Plan):
        from decoding.schedule import for_engines

        from .inprocess import Lane

        group = (mode, kind, plan.concurrency)
        if group not in self.schedulers:
            self.schedulers[group] = for_engines(self.opened[mode], mode, self.threshold)
        return Lane(self.opened[mode], self.schedulers[group], self.prompts[kind], plan)


class OverGrpc:
    """A Triton server for each mode that drafts, idle while it is not asked; `none` is speculative = false at one."""

    def __init__(
        self, bundle: Path, items: dict[str, list[Item]], modes: Sequence[str], threshold: float, slots: int,
        stack: ExitStack, device: str | None = None,
    ):  # fmt: skip
        from triton_repo.placement import Placement
        from triton_repo.repository import Settings
        from triton_repo.runtime import Ports
        from triton_repo.server import TritonServer

        self.items, self.servers = items, {}
        for mode in [m for m in modes if m != "none"] or ["none"]:
            settings = Settings(schedule=mode, threshold=threshold, max_requests=slots)
            where = dict(placement=Placement.of(device or "cpu"), ports=Ports(0, 0, 0))
            server = TritonServer(bundle, settings=settings, **where, say=lambda sentence: None)
            self.servers[mode] = stack.enter_context(server)
        self.servers.setdefault("none", next(iter(self.servers.values())))

    def __call__(self, modes: Sequence[str], kind: str, plan: Plan) -> list[dict]:
        return [self.window(mode, kind, plan) for mode in modes]

    def window(self, mode: str, kind: str, plan: Plan) -> dict:
        from .remote import host_share, phases, settle, steady

        server = self.servers[mode]
        before = phases(server.metrics_url)
        done = steady(server.grpc_url, self.items[kind], plan, speculative=mode != "none")
        settle(server.grpc_url)
        return done | {"host_share": host_share(before, phases(server.metrics_url, before))}


def at_url(url: str, items: dict[str, list[Item]]) -> Runner:
    """Any running server: `none` asks it not to draft, the other mode is whatever it was started with."""
    from .remote import settle, steady

    def window(mode: str, kind: str, plan: Plan) -> dict:
        done = steady(url, items[kind], plan, speculative=mode != "none")
        settle(url)
        return done

    return lambda modes, kind, plan: [window(mode, kind, plan) for mode in modes]


def in_turns(direct: InProcess, served: OverGrpc) -> Callable[[str, str, Plan], dict[str, dict]]:
    """(mode, kind, plan) -> {path: window} of the two paths in turns (turns.py)."""
    from .remote import settle
    from .turns import RemoteLane, beside

    def windows(mode: str, kind: str, plan: Plan) -> dict[str, dict]:
        server = served.servers[mode]
        remote = RemoteLane(server, served.items[kind], plan, speculative=mode != "none")
        found = beside(direct.lane(mode, kind, plan), remote)
        settle(server.grpc_url)
        return dict(zip(("in_process", "grpc"), found))

    return windows

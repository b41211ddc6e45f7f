"""Opens the decoding loop that the model `dspark` serves: bundle -> engines -> SPS table -> scheduler -> Loop ->
Service.

Knows: which packages to call with which setting. Refuses to know: requests, Triton (pb_utils comes in).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .ledger import Ledger, ledger_file, life_of
from .metrics import Metrics
from .repository import Settings
from .service import Service, Traces

AT_ONCE = 64  # with engines that leave the CPU alone: requests that the sender answers at full pace (0.3 ms each)
PROFILE_SECONDS = 30.0  # of a profile at the start, about


def open_service(
    bundle: Path, settings: Settings, pb_utils, server_pid: int, say: Callable[[str], None], device: str | None = None
) -> Service:
    """server_pid names the ledger that postprocessing writes; say(sentence) hears what takes time; device: of
    engines.load (None: the bundle's own).

    Raises BundleError or ScheduleError, in one sentence, for a bundle that does not fit the settings.
    """
    from decoding.loop import Loop
    from decoding.monitor import CalibrationMonitor
    from decoding.schedule import make
    from engines import load

    engines = load(bundle, threads=settings.threads or None, device=device)
    block_size = engines.bundle.draft.block_size
    sps = speed_table(engines, settings, say) if settings.needs_table else None
    scheduler = make(settings.schedule, settings.threshold, sps)
    monitor = CalibrationMonitor(block_size)

    def make_loop(traces: Traces) -> Loop:
        return Loop(
            engines,
            scheduler,
            max_requests=settings.max_requests,
            token_budget=settings.token_budget,
            accept=settings.accept,
            observers=(monitor, traces),
        )

    ledger = Ledger(ledger_file(server_pid), make=True, life=life_of(server_pid))
    metrics = Metrics(pb_utils, block_size, monitor)

    def close() -> None:
        metrics.close()
        engines.close()
        ledger.close()

    interval = settings.response_ms / 1e3
    cores = len(os.sched_getaffinity(0)) if engines.provider == "CPUExecutionProvider" else AT_ONCE
    options = dict(observer=metrics, progress=ledger, interval=interval, cores=cores, on_close=close)
    return Service(make_loop, block_size=block_size, **options)


def speed_table(engines, settings: Settings, say: Callable[[str], None]):
    """engines.sps.Sps of this machine and these engines: the bundle's own, or measured now where settings.profile
    allows.

    Measured in this process, whose threads are those that will decode. A bundle in a folder that cannot be
    written keeps its old table, the new one is used until the server ends. Raises BundleError.
    """
    from engines import BundleError
    from engines.profile import profile
    from engines.sps import Sps

    reason = "the setting profile is always"
    if settings.profile != "always":
        try:
            return Sps.of(engines)
        except BundleError as error:
            if settings.profile == "never":
                raise
            reason = str(error)
    say(f"measuring step times, about {PROFILE_SECONDS:g} s, because {reason}")
    requests = {r for r in (1, 4, 16, 64) if r < settings.max_requests} | {settings.max_requests}
    folder = engines.bundle.folder
    options = dict(requests=tuple(requests), contexts=(128, 512), quick=True, seconds=PROFILE_SECONDS)
    table = profile(engines, **options, write=os.access(folder, os.W_OK))
    engines.bundle = replace(engines.bundle, sps=table)
    return Sps.of(engines)

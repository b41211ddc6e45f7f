"""Opens the decoding loop that the model `dspark` serves: bundle -> engines -> scheduler -> Loop -> Service.

Knows: which packages to call with which setting. Refuses to know: requests, Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .ledger import Ledger, ledger_file
from .repository import Settings
from .service import Observer, Service


def open_service(
    bundle: Path, settings: Settings, make_observer: Callable[[int], Observer], server_pid: int
) -> Service:
    """make_observer(block_size) is told what rounds do; server_pid names the ledger that postprocessing writes.

    Raises BundleError, in one sentence, for a bundle that does not fit.
    """
    from decoding.loop import Loop
    from decoding.schedule import make
    from engines import load

    engines = load(bundle, threads=settings.threads or None)
    block_size = engines.bundle.draft.block_size

    def make_loop() -> Loop:
        scheduler = make(settings.schedule, settings.threshold)
        return Loop(engines, scheduler, max_requests=settings.max_requests, token_budget=settings.token_budget)

    ledger = Ledger(ledger_file(server_pid), make=True)

    def close() -> None:
        engines.close()
        ledger.close()

    observer = make_observer(block_size)
    return Service(make_loop, block_size=block_size, observer=observer, progress=ledger, on_close=close)

"""Opens the decoding loop that the model `dspark` serves: bundle -> engines -> scheduler -> Loop -> Service.

Knows: which packages to call with which setting. Refuses to know: requests, Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .repository import Settings
from .service import Observer, Service


def open_service(bundle: Path, settings: Settings, make_observer: Callable[[int], Observer]) -> Service:
    """make_observer(block_size). Raises BundleError, in one sentence, for a bundle that does not fit."""
    from decoding.loop import Loop
    from decoding.schedule import make
    from engines import load

    engines = load(bundle, threads=settings.threads or None)
    block_size = engines.bundle.draft.block_size

    def make_loop() -> Loop:
        scheduler = make(settings.schedule, settings.threshold)
        return Loop(engines, scheduler, max_requests=settings.max_requests, token_budget=settings.token_budget)

    return Service(make_loop, block_size=block_size, observer=make_observer(block_size), on_close=engines.close)

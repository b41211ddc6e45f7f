"""`python -m engines`: what a bundle is and whether it is sound (info), its step times (profile), its temperatures
(calibrate)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import typer

from .bundle import Bundle, BundleError

app = typer.Typer(help="Compiled engines.", no_args_is_help=True, add_completion=False)


@app.callback()
def _main() -> None:
    """Compiled engines."""


@app.command()
def info(bundle: Annotated[Path, typer.Option(help="Folder that holds manifest.json.")]) -> None:
    """Checks a bundle's manifest, files and hashes, and prints what it is."""
    try:
        b = Bundle.load(bundle)
    except BundleError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    t, d = b.target, b.draft
    head = f"Markov {d.markov_head_type} rank {d.markov_rank}" if d.markov_rank else "no Markov head (DFlash)"
    print(f"bundle      {b.folder}  ({b.backend}, {b.dtype}, made {b.created})")
    print(
        f"target      {t.name}: {t.model_type}, {t.num_layers} layers, hidden {t.hidden_size}, "
        f"vocabulary {t.vocab_size}"
    )
    print(
        f"draft       block {d.block_size}, {d.depth} layers on target layers {list(d.layer_ids)}, {head}, "
        f"vocabulary {d.vocab_size}, confidence {'yes' if d.has_confidence else 'no'}"
    )
    print(f"context     {b.max_context} positions; tokenizer {'yes' if b.tokenizer_file else 'no'}")
    for name, spec in b.engines.items():
        path = b.folder / spec.path
        data = path.with_name(path.name + ".data")
        size = path.stat().st_size + (data.stat().st_size if data.is_file() else 0)
        print(f"{name:11} {size / 1e6:8.1f} MB  {spec.path}  sha256 {spec.sha256[:12]}")
        for capability, plan in spec.plans.items():
            nodes, unfused = plan["attention"]["nodes"], len(plan["attention"]["unfused"])
            what = f"{plan['kernels']} kernels" + (f", {nodes - unfused} of {nodes} attentions fused" if nodes else "")
            print(f"  for {capability:5} {plan['bytes'] / 1e6:8.1f} MB  {plan['path']}  {what}")
    if b.tensorrt:
        print(f"compiled by {b.tensorrt.get('backend')} {b.tensorrt.get('version')}")
    if b.sps:
        taken = b.sps.get("hardware", {})
        print(f"profile     {b.sps.get('date')}  on {taken.get('cpu')}, {b.sps.get('threads')} threads")
    for row in b.parity:
        print("parity      " + ", ".join(f"{k} {v}" for k, v in row.items()))


@app.command()
def calibrate(
    bundle: Annotated[Path, typer.Option(help="Folder that holds manifest.json.")],
    calibration: Annotated[Path, typer.Option(help="calibration.json of `python -m training calibrate`.")],
) -> None:
    """Writes the fitted temperatures of the confidence head into the bundle's manifest."""
    from .calibration import store

    try:
        stored = store(bundle, calibration)
    except BundleError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{bundle}: calibration of {stored['date']}, {stored['rounds']:,} rounds, is in its manifest")


@app.command()
def profile(
    bundle: Annotated[Path, typer.Option(help="Folder that holds manifest.json.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points and samples: under a minute.")] = False,
    requests: Annotated[Optional[str], typer.Option(help="Requests a step, with commas: 1,2,4,8,16,32.")] = None,
    contexts: Annotated[Optional[str], typer.Option(help="Cached tokens a request, with commas: 128,512,1024.")] = None,
    seconds: Annotated[
        Optional[float], typer.Option(help="Time for the measuring, about (200; with --quick 25).")
    ] = None,
    threads: Annotated[Optional[int], typer.Option(help="Threads of an engine; default: physical cores.")] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda or cuda:N; default: the bundle's own.")] = None,
) -> None:
    """Measures what a step costs here and writes it into the manifest, for the schedulers causal and lagged.

    Exit code 0, or 1 when the bundle or an option does not fit.
    """
    from . import load
    from .curve import draw
    from .profile import CONTEXTS, QUICK_CONTEXTS, QUICK_REQUESTS, REQUESTS
    from .profile import profile as measured

    try:
        loaded = load(bundle, threads=threads, device=device)
        options = dict(
            requests=_numbers("requests", requests, QUICK_REQUESTS if quick else REQUESTS),
            contexts=_numbers("contexts", contexts, QUICK_CONTEXTS if quick else CONTEXTS),
            seconds=seconds or (25.0 if quick else 200.0),
            quick=quick,
        )
        with _bar("profile") as advance:
            sps = measured(loaded, progress=advance, **options)
    except ValueError as error:  # BundleError is one
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    picture = bundle / "sps.png"
    try:
        draw(sps, picture, f"{loaded.bundle.target.name} {loaded.bundle.dtype}")
    except ImportError:
        print("matplotlib is not installed, so the curve is not drawn (the table is stored).", file=sys.stderr)
        picture = None
    samples = sorted(p["samples"] for p in sps["target"])
    print(
        f"{len(sps['target'])} points of target + verify and {len(sps['draft'])} of the draft, "
        f"{samples[0]} to {samples[-1]} samples each, in {bundle / 'manifest.json'}"
        + (f"; the curve: {picture}" if picture else "")
    )


def _numbers(name: str, text: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    try:
        numbers = default if text is None else tuple(int(n) for n in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{name} is {text!r}; it must be whole numbers of 1 or more with commas.")
    return numbers


@contextmanager
def _bar(text: str) -> Iterator[Callable[[float], None]]:
    """A bar with the time left on stderr; is told the share that is done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(text, total=1.0)
        yield lambda share: bar.update(task, completed=share)


if __name__ == "__main__":
    app()

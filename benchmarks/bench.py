"""Throughput and latency by number of users and by schedule, in this process and through Triton.

Knows: which runs are compared and in which order. Refuses to know: how a request is decoded or sent.

Runs of one level are interleaved (none, fixed, threshold, none, ...), so that a slow minute of the machine hits all of them;
medians are taken over repeats. Requests stop where the model stops; greedy, so every schedule gives the same text.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from . import bundle as bundles
from .common import console_for_tables, encode, Item, median, OWN_PROMPTS, read_items, write_result
from .inprocess import Run, run

SCHEDULES = ("none", "fixed", "threshold")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Runner = Callable[[str, list[Item], int], Run]  # (schedule, items, concurrency) -> Run


def in_process(bundle: Path, max_tokens: int, threshold: float, stack: ExitStack) -> Runner:
    """Engines in this process, one loop a run."""
    import engines
    from decoding.schedule import make

    opened = engines.load(bundle)
    stack.callback(opened.close)

    def runner(schedule: str, items: list[Item], concurrency: int) -> Run:
        scheduler = make(schedule, threshold)
        return run(opened, scheduler, encode(bundle, items), concurrency=concurrency, max_tokens=max_tokens)

    return runner


def over_grpc(bundle: Path, max_tokens: int, threshold: float, stack: ExitStack) -> Runner:
    """A Triton server for each schedule that drafts; `none` is a request with speculative = false to the first."""
    from triton_repo.repository import Settings
    from triton_repo.runtime import Ports
    from triton_repo.server import TritonServer

    from .remote import load

    urls = {}
    for schedule in ("fixed", "threshold"):
        settings = Settings(schedule=schedule, threshold=threshold)
        server = stack.enter_context(TritonServer(bundle, settings=settings, ports=Ports(0, 0, 0), say=lambda sentence: None))
        urls[schedule] = server.grpc_url

    def runner(schedule: str, items: list[Item], concurrency: int) -> Run:
        return load(urls.get(schedule, urls["fixed"]), items, concurrency=concurrency, max_tokens=max_tokens,
                    speculative=schedule != "none")

    return runner


def measure(runner: Runner, items: list[Item], concurrency: int, repeats: int, advance=lambda: None) -> list[dict]:
    """One row a schedule: medians over interleaved repeats after one warm-up run each."""
    found: dict[str, list[dict]] = {s: [] for s in SCHEDULES}
    for number in range(repeats + 1):
        for schedule in SCHEDULES:
            chosen = items if number else items[:concurrency]
            summary = runner(schedule, chosen, concurrency).summary()
            if number:
                found[schedule].append(summary)
            advance()
    rows = []
    for schedule, runs in found.items():
        row = {key: round(median(r[key] for r in runs), 4) for key in runs[0]}
        rows.append({"concurrency": concurrency, "schedule": schedule, **row})
    plain = rows[0]["output_tok_s"]
    return [row | {"ratio": round(row["output_tok_s"] / plain, 4)} for row in rows]


def table(rows: list[dict], where: str) -> Table:
    shown = Table(title=f"{where}: output tokens only, medians of interleaved runs")
    for name in ("users", "schedule", "tok/s", "ratio", "tok/s/user", "TTFT ms", "ITL ms", "acceptance length", "verified/round",
                 "outside engines %"):
        shown.add_column(name, justify="left" if name == "schedule" else "right")
    for r in rows:
        outside = f"{100 * r['outside_engines']:.1f}" if "outside_engines" in r else ""
        shown.add_row(str(r["concurrency"]), r["schedule"], f"{r['output_tok_s']:.1f}", f"{r['ratio']:.2f}", f"{r['user_tok_s']:.1f}",
                      f"{r['ttft_ms']:.0f}", f"{r['itl_ms']:.1f}", f"{r['acceptance_length']:.2f}", f"{r['verified_per_round']:.2f}",
                      outside, end_section=r["schedule"] == SCHEDULES[-1])
    return shown


@app.command()
def main(
    target: bundles.TargetOption = bundles.TARGET,
    draft: bundles.DraftOption = bundles.DRAFT,
    bundle: bundles.BundleOption = bundles.BUNDLE,
    dtype: bundles.DtypeOption = "int8",
    prompts: Annotated[Path, typer.Option(help="JSONL with prompt, messages or turns; default: the repository's own")] = OWN_PROMPTS,
    concurrency: Annotated[str, typer.Option(help="comma-separated numbers of users")] = "1,2,4,8,16",
    full: Annotated[bool, typer.Option("--full/--quick", help="more requests, longer answers, more repeats")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="of each answer; 48 quick, 128 full")] = None,
    threshold: Annotated[float, typer.Option(help="of the threshold schedule")] = 0.5,
    grpc: Annotated[bool, typer.Option("--grpc/--no-grpc", help="also through Triton")] = True,
    out: Path = Path("build/bench.json"),
) -> None:
    """Runs none, fixed and threshold in turn at each number of users."""
    manifest, console = bundles.ensure(target, draft, bundle, dtype), console_for_tables()
    levels = [int(level) for level in concurrency.split(",")]
    max_tokens, repeats = max_tokens or (128 if full else 48), 5 if full else 3
    items, rows = load_items(prompts, max(8, 4 * max(levels))), []
    places = {"in process": in_process} | ({"gRPC": over_grpc} if grpc else {})
    for where, make in places.items():
        with ExitStack() as stack:
            with console.status(f"opening the engines, {where}"):
                runner = make(bundle, max_tokens, threshold, stack)
            bar = stack.enter_context(Progress(console=console, transient=True, disable=not console.is_terminal))
            for level in levels:
                task = bar.add_task(f"{where}, {level} users", total=(repeats + 1) * len(SCHEDULES))
                if not console.is_terminal:
                    console.print(f"{where}, {level} users")
                chosen = items[: max(4, level) * (4 if full else 1)]
                found = measure(runner, chosen, level, repeats, lambda: bar.advance(task))
                bar.remove_task(task)
                rows += [{"where": where, **row} for row in found]
                write_result(out, {"target": manifest["target"]["name"], "dtype": dtype, "max_tokens": max_tokens,
                                   "repeats": repeats, "threshold": threshold, "rows": rows})
        console.print(table([r for r in rows if r["where"] == where], where))
    console.print(f"written: {out}", soft_wrap=True)


def load_items(prompts: Path, count: int) -> list[Item]:
    """`count` prompts: the file's, or for the default the file's and then seeded ones of training/prompts.py."""
    items = read_items(prompts, count)
    if prompts == OWN_PROMPTS and len(items) < count:
        from training.prompts import prompts as generated

        more = generated(count - len(items), seed=20261122)
        items += [Item(f"{p.kind}-{i}", ({"role": "user", "content": p.text},)) for i, p in enumerate(more)]
    return [items[i % len(items)] for i in range(count)]


if __name__ == "__main__":
    app()

"""Throughput and latency by number of users and by schedule, in this process and through Triton.

Knows: which runs are compared and in which order. Refuses to know: how a request is decoded or sent.

Runs of one level are interleaved (none, fixed, threshold, none, ...), so that a slow minute of the machine hits all of
them; medians are taken over repeats. Requests stop where the model stops; greedy, so every schedule gives the same
text.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from . import bundle as bundles
from .common import OWN_PROMPTS, Item, console_for_tables, encode, median, read_items, rich_table, write_result
from .inprocess import run
from .timing import Run

SCHEDULES = ("none", "fixed", "threshold")
COLUMNS = (
    ("where", lambda r: r["where"]),
    ("users", lambda r: str(r["concurrency"])),
    ("schedule", lambda r: r["schedule"]),
    ("tok/s", lambda r: f"{r['output_tok_s']:.1f}"),
    ("ratio", lambda r: f"{r['ratio']:.2f}"),
    ("per user", lambda r: f"{r['user_tok_s']:.1f}"),
    ("TTFT ms", lambda r: f"{r['ttft_ms']:.0f}"),
    ("ITL ms", lambda r: f"{r['itl_ms']:.1f}"),
    ("accepted", lambda r: f"{r['acceptance_length']:.2f}"),
    ("verified", lambda r: f"{r['verified_per_round']:.2f}"),
    ("outside %", lambda r: f"{100 * r['outside_engines']:.1f}" if "outside_engines" in r else ""),
)
LEGEND = (
    "tok/s: output tokens of all users; ratio: to `none` in the same runs; per user: 1 / ITL; accepted: tokens a "
    "target pass, bonus included; verified: draft tokens a round; outside: share of the time without a running engine."
)
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
        server = stack.enter_context(
            TritonServer(bundle, settings=settings, ports=Ports(0, 0, 0), say=lambda sentence: None)
        )
        urls[schedule] = server.grpc_url

    def runner(schedule: str, items: list[Item], concurrency: int) -> Run:
        return load(
            urls.get(schedule, urls["fixed"]),
            items,
            concurrency=concurrency,
            max_tokens=max_tokens,
            speculative=schedule != "none",
        )

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


@app.command()
def main(
    target: bundles.TargetOption = bundles.TARGET,
    draft: bundles.DraftOption = bundles.DRAFT,
    bundle: bundles.BundleOption = bundles.BUNDLE,
    dtype: bundles.DtypeOption = "int8",
    prompts: Annotated[
        Path, typer.Option(help="JSONL with prompt, messages or turns; default: the repository's own")
    ] = OWN_PROMPTS,
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
                write_result(
                    out,
                    {
                        "target": manifest["target"]["name"],
                        "dtype": dtype,
                        "max_tokens": max_tokens,
                        "repeats": repeats,
                        "threshold": threshold,
                        "rows": rows,
                    },
                )
        console.print(
            rich_table(f"{where}, medians of interleaved runs", COLUMNS[1:], [r for r in rows if r["where"] == where])
        )
    console.print(LEGEND, style="dim")
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

"""`python -m benchmarks.peers install|run`: other CPU engines beside ours on the same weights."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from .. import bundle as bundles
from ..common import OWN_PROMPTS, Item, console_for_tables, encode, machine, read_items, rich_table
from .catalogue import FOLDER, OURS, PEERS, WORKERS, Peer, chosen
from .figures import rows
from .install import InstallError, competitors, install, missing
from .rounds import Competitor, Worker, WorkerError, play

COLUMNS = (
    ("engine", lambda r: " ".join(filter(None, (r["peer"], r["variant"], r["schedule"])))),
    ("tok/s", lambda r: f"{r['total_tok_s']:.1f}"),
    ("decode", lambda r: f"{r['decode_tok_s']:.1f}"),
    ("/ alone", lambda r: share(r["ratio_to_ours_same_precision"])),
    ("dec.", lambda r: share(r["decode_ratio_to_ours_same_precision"])),
    ("/ best", lambda r: share(r["ratio_to_ours_best"])),
    ("dec.", lambda r: share(r["decode_ratio_to_ours_best"])),
    ("spread", lambda r: f"{r['spread']:.2f}"),
    ("agree", lambda r: share(r["agreement"])),
)
LEGEND = (
    "tok/s: new tokens of all streams, prompts' time included; decode: once every stream has its first token; / "
    "alone: over our target alone at the same precision (int8: the faster of our two forms); / best: over the fastest of "
    "ours (under 1 = ours is faster); "
    "dec.: that ratio in decode; agree: share of the answers before the first token unlike our fp32 answers."
)
SEED = 20261123  # of the prompts for many streams
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
ThreadsOption = Annotated[int | None, typer.Option(help="of every engine; default: the physical cores")]


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


@app.command("install")
def install_command(
    names: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(PEERS)}; default: all")] = None,
    again: Annotated[bool, typer.Option("--again", help="also what is in place")] = False,
    target: bundles.TargetOption = bundles.TARGET,
    folder: Annotated[Path, typer.Option(help="where the peers live")] = FOLDER,
    torch_index: Annotated[str, typer.Option(help="extra package index URL for a CPU-only torch")] = "",
    threads: ThreadsOption = None,
) -> None:
    """Makes a venv and converted weights for each peer; what is in place is kept."""
    peers, bad = pick(names or list(PEERS)), False
    for peer in peers:
        reason = missing(peer, folder / peer.name, target)
        if reason is None and not again:
            print(f"{peer.name}: in place")
            continue
        print(f"{peer.name}: {peer.cost}")
        try:
            made = install(
                peer, folder / peer.name, target, threads=threads or physical_cores(), torch_index=torch_index
            )
            print(f"{peer.name}: {made['minutes']} minutes, {made['megabytes']} MB")
        except InstallError as error:
            print(error, file=sys.stderr)
            bad = True
    if bad:
        raise typer.Exit(1)


@app.command("run")
def run_command(
    streams: Annotated[str, typer.Option(help="comma-separated numbers of streams")] = "1,16",
    peers: Annotated[str, typer.Option(help="comma-separated; default: all that are installed")] = "",
    variants: Annotated[str, typer.Option(help="only these variants of the peers")] = "",
    ours: Annotated[str, typer.Option(help="dtypes of our bundles")] = "int8,int8-block64,fp32",
    schedules: Annotated[str, typer.Option(help="of our int8 bundles; fp32 runs `none`")] = "none,fixed,lagged",
    tokens: Annotated[int, typer.Option(help="of each answer")] = 96,
    rounds: Annotated[int, typer.Option(help="turns of each engine at each level")] = 3,
    minutes: Annotated[float, typer.Option(help="no round begins that would not end by then, loading included")] = 11,
    target: bundles.TargetOption = bundles.TARGET,
    draft: bundles.DraftOption = bundles.DRAFT,
    folder: Annotated[Path, typer.Option(help="where the peers live")] = FOLDER,
    threads: ThreadsOption = None,
    out: Path = Path("build/peers.json"),
) -> None:
    """Runs ours and the peers in turns and writes medians and ratios."""
    started = time.monotonic()
    console, threads = console_for_tables(), threads or physical_cores()
    levels, only = [int(level) for level in streams.split(",")], set(filter(None, variants.split(",")))
    wanted, entered = pick(peers.split(",") if peers else list(PEERS)), []
    for peer in wanted:
        reason = missing(peer, folder / peer.name, target)
        if reason is None:
            entered += [c for c in competitors(peer, folder / peer.name, threads) if not only or c.variant in only]
        elif peers:
            fail(f"{reason}; run python -m benchmarks.peers install {peer.name}.")
        else:
            console.print(f"left out: {reason}")
    dtypes = ours.split(",")
    entered = our_competitors(target, draft, dtypes, schedules.split(","), threads) + entered
    tokenizer = target_bundle(target, dtypes[0])
    errors: dict[str, str] = {}
    with ExitStack() as stack:
        workers = []
        for competitor in entered:
            workers.append(Worker(competitor, folder / "logs" / f"{competitor.label.replace(' ', '-')}.log"))
            stack.callback(workers[-1].close)
        with console.status("loading the engines"):
            workers = [worker for worker in workers if loaded(worker, errors)]
        for sentence in errors.values():
            console.print(sentence)
        versions, table = {w.competitor: w.version for w in workers}, []
        settings: dict = {}
        bar = stack.enter_context(Progress(console=console, transient=True, disable=not console.is_terminal))
        for number, level in enumerate(levels):
            groups = [[ids] for ids in own_prompts(tokenizer)] if level == 1 else [equal_prompts(tokenizer, level)]
            task = bar.add_task(f"{level} streams", total=rounds * len(workers))

            def failed(worker: Worker, error: WorkerError) -> None:
                errors[f"{worker.competitor.label}, {level} streams"] = str(error)
                console.print(str(error))

            turns = play(
                workers,
                groups,
                tokens=tokens,
                rounds=rounds,
                failed=failed,
                seconds=(60 * minutes - (time.monotonic() - started)) / (len(levels) - number),
                progress=lambda: bar.advance(task),
            )
            bar.remove_task(task)
            found = rows(turns, versions, level)
            table += found
            played = max((row["runs"] for row in found), default=0)
            console.print(rich_table(f"{level} streams, medians of {played} interleaved rounds", COLUMNS, found))
            lengths = [len(ids) for group in groups for ids in group]
            prompts = {"count": len(lengths), "shortest": min(lengths), "longest": max(lengths)}
            settings |= {"tokens": tokens, "threads": threads, f"prompts_{level}": prompts}
            settings["minutes"] = round((time.monotonic() - started) / 60, 1)
            write(out, table, settings, errors)
    console.print(LEGEND, style="dim")
    console.print(f"written: {out}", soft_wrap=True)


def our_competitors(
    target: Path, draft: Path, dtypes: list[str], schedules: list[str], threads: int
) -> list[Competitor]:
    """The int8 bundles under each schedule, the fp32 one under `none`. Exports and profiles what is missing or stale."""
    found = []
    for dtype in dtypes:
        under, precision = (["none"], dtype) if dtype == "fp32" else (schedules, "int8")
        bundle = target_bundle(target, dtype)
        bundles.ensure(target, draft, bundle, dtype)
        if {"causal", "lagged"} & set(under):
            bundles.ensure_profile(bundle)
        for schedule in under:
            command = (sys.executable, str(WORKERS / "ours.py"), "serve", str(bundle), schedule, str(threads))
            root = str(Path(__file__).parents[2])
            found.append(Competitor(OURS, dtype, precision, command, (("PYTHONPATH", root),), schedule))
    return found


def target_bundle(target: Path, dtype: str) -> Path:
    return Path("build/bundles") / f"{target.name}-{dtype}"


def loaded(worker: Worker, errors: dict[str, str]) -> bool:
    try:
        worker.wait()
        return True
    except WorkerError as error:
        errors[worker.competitor.label] = str(error)
        return False


def own_prompts(bundle: Path) -> list[list[int]]:
    """The repository's five prompts, one after the other."""
    return encode(bundle, read_items(OWN_PROMPTS))


def equal_prompts(bundle: Path, count: int) -> list[list[int]]:
    """`count` seeded prompts of ONE length, the nearest to 78 tokens that has so many: no engine needs padding then."""
    from training.prompts import prompts as generated

    items = [Item(p.kind, ({"role": "user", "content": p.text},)) for p in generated(40 * count + 400, SEED)]
    by_length: dict[int, list[list[int]]] = {}
    for ids in encode(bundle, items):
        by_length.setdefault(len(ids), []).append(ids)
    long_enough = [length for length, members in by_length.items() if len(members) >= count]
    return by_length[min(long_enough, key=lambda length: abs(length - 78))][:count]


def write(out: Path, table: list[dict], settings: dict, errors: dict[str, str]) -> None:
    """The rows, and beside them what they were taken on and with."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(table, indent=1) + "\n")
    meta = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        "machine": machine(),
        **settings,
        "errors": errors,
    }
    out.with_suffix(".meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def physical_cores() -> int:
    from engines.onnxruntime import physical_cores as cores

    return cores()


def pick(names: list[str]) -> list[Peer]:
    try:
        return chosen(",".join(names))
    except ValueError as error:
        fail(str(error))


def fail(text: str) -> None:
    """One sentence on stderr, exit status 1."""
    print(text, file=sys.stderr)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()

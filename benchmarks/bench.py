"""Throughput and latency by mode, number of users and kind of prompt, in this process and through Triton.

Knows: which runs are compared and in which order. Refuses to know: how a request is decoded or sent.

A group is one kind of prompt at one number of users. In process every mode has engines and a loop of its own, which
take short turns (a sixteenth of a window): a slow second of the machine hits all modes alike. Over gRPC the modes'
windows follow each other, in an order that rotates with every repeat, next to the window of the loops in process. With
`--turns` the server and the loop in process of one mode take turns (benchmarks/turns.py), mode after mode: the ratio of
the two is to be read from such a run. Each mode is warmed up first; that run also says how many tokens make
`--seconds`, the same number for every mode.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from client import ClientError
from decoding.request import RequestError
from engines import BundleError
from triton_repo.runtime import ServerError

from . import bundle as bundles
from .cells import MODES, PATHS, Grid, fingerprint, make_row
from .common import KINDS, console_for_tables, median, provenance, read_items, rich_table
from .runners import InProcess, OverGrpc, Runner, at_url, in_turns
from .steady import Plan

LEVELS, GRPC_LEVELS = (1, 2, 4, 8, 16, 32), (1, 8, 16)
WARM_TOKENS = 6  # of each user
COLUMNS = (
    ("kind", lambda r: r["kind"]),
    ("users", lambda r: str(r["concurrency"])),
    ("path", lambda r: {"in_process": "direct", "grpc": "gRPC"}[r["path"]]),
    ("mode", lambda r: r["mode"]),
    ("tok/s", lambda r: f"{r['total_tok_s']:.1f}"),
    ("to none", lambda r: number(r["ratio_to_none"], 2)),
    ("per user", lambda r: number(r["user_tok_s"], 1)),
    ("TTFT", lambda r: f"{r['ttft_ms']:.0f}"),
    ("ITL", lambda r: number(r["itl_ms"], 1)),
    ("p95", lambda r: number(r["itl_p95_ms"], 0)),
    ("acc.", lambda r: f"{r['acceptance_length']:.2f}"),
    ("ver.", lambda r: f"{r['verified_per_round']:.2f}"),
    ("rej. %", lambda r: f"{100 * r['rejected_share']:.0f}"),
    ("host %", lambda r: "" if r["host_share"] is None else f"{100 * r['host_share']:.1f}"),
)
LEGEND = (
    "direct: in process; tok/s: output tokens of all users while all are busy; to none: ratio to mode `none` in the same "
    "run; per user: tokens a second after the first; TTFT: ms, median of requests sent under load; ITL: ms per token, median "
    "and 95th percentile; acc.: tokens a target pass, bonus included (acceptance length); ver.: draft tokens verified in a "
    "round of a request; rej.: share of those that were rejected; host: share of the loop's time outside the engines (over "
    "gRPC: of the server's, with the start of the load)."
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def measure(
    runners: dict[str, Runner],
    modes: Sequence[str],
    kind: str,
    plan: Plan,
    *,
    prompts: int,
    repeats: int,
    seconds: float,
    pair: Callable[[str, str, Plan], dict[str, dict]] | None = None,
) -> list[dict]:
    """The rows of one group. runners: by path; plan.tokens is ignored; repeat r starts at another of the `prompts`.
    pair: takes the windows of both paths (runners.in_turns), where there are two."""
    found: dict[tuple, list[dict]] = {(mode, path): [] for mode in modes for path in runners}
    warm = change(plan, tokens=WARM_TOKENS * plan.concurrency + 24)
    rates = [window["total_tok_s"] for runner in runners.values() for window in runner(modes, kind, warm)]
    # Every user is to come far enough that answers end and begin in the window.
    tokens = max(round(seconds * median(rates)), 32 + 8 * plan.concurrency)
    for r in range(repeats):
        turn = [*modes[r % len(modes) :], *modes[: r % len(modes)]]
        chosen = change(plan, tokens=tokens, first=plan.first + r * prompts // repeats, seed=plan.seed + 1000 * r)
        for mode in turn if pair else ():
            for path, window in pair(mode, kind, chosen).items():
                found[mode, path].append(window)
        for path in list(runners)[:: -1 if r % 2 else 1] if not pair else ():
            for mode, window in zip(turn, runners[path](turn, kind, chosen)):
                found[mode, path].append(window)
    cell = {"kind": kind, "concurrency": plan.concurrency, "temperature": plan.temperature}
    return [make_row({"mode": mode, **cell, "path": path}, windows) for (mode, path), windows in found.items()]


def change(plan: Plan, **changes) -> Plan:
    return Plan(**{**plan.__dict__, **changes})


def chosen_kinds(kinds: str | None, prompts: Sequence[str]) -> dict[str, Path]:
    """Prompt file of each kind: the repository's three, or those of `prompts` (KIND=FILE, or FILE under its own name);
    `kinds` picks and orders. Raises ValueError, one sentence."""
    files = dict(KINDS)
    if prompts:
        files = {}
        for given in prompts:
            kind, equals, file = given.partition("=")
            files[kind if equals else Path(given).stem] = Path(file if equals else given)
        if kinds:
            files = KINDS | files
    for kind in (names := kinds.split(",") if kinds else list(files)):
        if kind not in files:
            raise ValueError(f"kinds names {kind!r}; it must be of {', '.join(files)}, or come with --prompts {kind}=FILE.")
        if not files[kind].is_file():
            raise ValueError(f"The prompts of {kind} are not there: {files[kind]} is no file.")
    return {kind: files[kind] for kind in names}


def chosen_modes(modes: str, url: str | None) -> list[str]:
    """Raises ValueError, one sentence, for an unknown mode or two drafting modes at one address."""
    names = modes.split(",")
    for name in names:
        if name not in MODES:
            raise ValueError(f"modes names {name!r}; it must be of {', '.join(MODES)}.")
    if url and len([n for n in names if n != "none"]) > 1:
        raise ValueError(f"modes is {modes}; at --url it is none, the server's own schedule, or both (none,lagged).")
    return names


def chosen_levels(text: str, name: str) -> list[int]:
    levels = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if not all(1 <= level <= 1024 for level in levels):
        raise ValueError(f"{name} is {text}; it must be numbers of users in 1..1024, separated by commas.")
    return levels


@app.command()
def main(
    target: bundles.TargetOption = bundles.TARGET,
    draft: bundles.DraftOption = bundles.DRAFT,
    bundle: bundles.BundleOption = bundles.BUNDLE,
    dtype: bundles.DtypeOption = "int8",
    modes: Annotated[str | None, typer.Option(help="default: all five; at --url none,lagged")] = None,
    kinds: Annotated[str | None, typer.Option(help="default: maths,code,chat (quick: maths,chat)")] = None,
    concurrency: Annotated[str | None, typer.Option(help="numbers of users; default: 1,2,4,8,16,32 (quick: 1,8)")] = None,
    paths: Annotated[str, typer.Option(help="in_process, grpc or both")] = "in_process,grpc",
    grpc_concurrency: Annotated[
        str | None, typer.Option(help="numbers of users at which gRPC is measured too; default: 1,8,16")
    ] = None,
    repeats: int = 3,
    seconds: Annotated[float | None, typer.Option(help="of one window; default 3 (quick: 1.2)")] = None,
    max_tokens: Annotated[int, typer.Option(help="of each answer")] = 64,
    temperature: float = 0.0,
    seed: int = 0,
    threshold: Annotated[float, typer.Option(help="of the threshold mode")] = 0.5,
    prompts: Annotated[
        list[str] | None, typer.Option(help="KIND=FILE or FILE, JSONL; repeat; default: the repository's own")
    ] = None,
    url: Annotated[str | None, typer.Option(help="host:port of a running server (gRPC); no bundle is opened")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="1 and 8 users, two kinds, short windows")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: the bundle's own")] = None,
    turns: Annotated[bool, typer.Option("--turns", help="a mode's two paths in turns, for their ratio")] = False,
    out: Path = Path("build/bench.json"),
) -> None:
    """Measures the chosen cells and puts them into `out` (what is not per cell: the .meta.json beside it)."""
    console = console_for_tables()
    try:
        names = chosen_modes(modes or ("none,lagged" if url else ",".join(MODES)), url)
        files = chosen_kinds(kinds or ("maths,chat" if quick and not prompts else None), prompts or ())
        levels = chosen_levels(concurrency or ",".join(map(str, (1, 8) if quick else LEVELS)), "concurrency")
        default = levels if url or paths == "grpc" else (1, 8) if quick else GRPC_LEVELS
        grpc_levels = chosen_levels(grpc_concurrency or ",".join(map(str, default)), "grpc_concurrency")
        wanted = ["grpc"] if url else paths.split(",")
        if not set(wanted) <= set(PATHS):
            raise ValueError(f"paths is {paths}; it must be in_process, grpc or both.")
        if turns and (url or set(wanted) != set(PATHS)):
            raise ValueError("turns is for both paths, in_process,grpc, of servers that this command starts (no --url).")
        if repeats < 1 or (seconds is not None and seconds <= 0):
            raise ValueError(f"repeats is {repeats} and seconds is {seconds}; they must be at least 1, and above 0.")
        items = {kind: read_items(file) for kind, file in files.items()}
    except ValueError as error:
        bundles.fail(str(error))
    seconds = seconds or (1.2 if quick else 3.0)
    run = {**provenance(), "device": device or "", "max_tokens": max_tokens, "seconds": seconds, "repeats": repeats, "threshold": threshold}
    run["prompts"] = {kind: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for kind, file in files.items()}
    same = {"machine": run["machine"], "url": url} | ({"device": device} if device else {})
    if not url:
        manifest = bundles.ensure(target, draft, bundle, dtype)
        if set(names) & set(bundles.LOAD_AWARE):
            bundles.ensure_profile(bundle, device)
            manifest = json.loads((bundle / "manifest.json").read_text())
        run |= {name: (manifest.get(key) or {}).get("date") for name, key in (("profile", "sps"), ("calibration",) * 2)}
        same["bundle"] = fingerprint(manifest)
    grid = Grid(out, same, run, say=lambda sentence: console.print(sentence, soft_wrap=True))
    try:
        with ExitStack() as stack:
            runners: dict[str, Runner] = {}
            with console.status("opening the engines"):
                if "in_process" in wanted:
                    runners["in_process"] = InProcess(bundle, items, names, threshold, stack, device)
                served = [level for level in levels if "grpc" in wanted and level in grpc_levels]
                if served and url:
                    runners["grpc"] = at_url(url, items)
                elif served:
                    runners["grpc"] = OverGrpc(bundle, items, names, threshold, max(served), stack, device)
            for level in levels:
                here = {path: runners[path] for path in runners if path == "in_process" or level in served}
                pair = in_turns(here["in_process"], here["grpc"]) if turns and len(here) == 2 else None
                options = dict(repeats=repeats, seconds=seconds, pair=pair)
                for kind in files if here else ():
                    plan = Plan(level, 0, max_tokens, temperature=temperature, seed=seed)
                    with console.status(f"{kind}, {level} user{'s' * (level > 1)}"):
                        rows = measure(here, names, kind, plan, prompts=len(items[kind]), **options)
                    console.print(rich_table(f"{kind}, {level} user{'s' * (level > 1)}", COLUMNS[2:], grid.put(rows)))
    except (BundleError, ClientError, ServerError, RequestError) as error:
        bundles.fail(str(error))
    console.print(LEGEND, style="dim")
    console.print(f"written: {out}", soft_wrap=True)


if __name__ == "__main__":
    app()

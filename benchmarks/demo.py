"""The demo: a real model, its DSpark head, a real Triton server, streamed text, and what the draft brings.

Knows: what a newcomer is shown and in which order. Refuses to know: how the server starts, how text is streamed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress
from rich.text import Text

from client import Client, ClientError
from triton_repo.repository import Settings
from triton_repo.runtime import Ports, ServerError
from triton_repo.server import TritonServer

from . import bundle as bundles
from .common import OWN_PROMPTS, Item, console_for_tables, median, percent, read_items, rich_table, write_result
from .remote import Answer, ask

COLUMNS = (
    ("prompt", lambda r: r["name"]),
    ("output tokens", lambda r: str(r["output_tokens"])),
    ("acceptance length", lambda r: f"{r['acceptance_length']:.2f}"),
    ("per position %", lambda r: percent(r.get("acceptance_per_position", ()))),
    ("DSpark tok/s", lambda r: f"{r['tok_s_dspark']:.1f}"),
    ("target tok/s", lambda r: f"{r['tok_s_target']:.1f}"),
    ("ratio", lambda r: f"{r['speed_ratio']:.2f}"),
    ("identical", lambda r: "yes" if r["identical"] else f"no, from token {r['first_difference']}"),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def compare(client: Client, item: Item, *, max_tokens: int, repeats: int, progress=lambda: None) -> dict:
    """One prompt, greedy, with and without the draft in turn: `repeats` runs each after one warm-up each."""
    runs: dict[bool, list[Answer]] = {True: [], False: []}
    for number in range(repeats + 1):
        for speculative in (True, False):
            answer = ask(client, item.messages, max_tokens=max_tokens, speculative=speculative)
            if number:  # the first is the warm-up
                runs[speculative].append(answer)
            progress()
    dspark, target = runs[True][0], runs[False][0]
    same = {tuple(a.timing.tokens) for answers in runs.values() for a in answers}
    speed = {side: median(a.tok_s for a in runs[side]) for side in runs}
    rounds, accepted = pooled(runs[True])
    return {
        "name": item.name,
        "prompt": item.messages[-1]["content"],
        "text": dspark.text,
        "finish_reason": dspark.timing.finish_reason,
        "num_input_tokens": dspark.num_input_tokens,
        "output_tokens": len(dspark.timing.tokens),
        "rounds": rounds,
        "acceptance_length": round(1 + sum(accepted) / rounds, 4) if rounds else 1.0,
        "acceptance_per_position": [round(n / rounds, 4) for n in accepted],
        "tok_s_dspark": round(speed[True], 2),
        "tok_s_target": round(speed[False], 2),
        "speed_ratio": round(speed[True] / speed[False], 4),
        "ttft_ms_dspark": round(1e3 * median(a.timing.first_token for a in runs[True]), 2),
        "ttft_ms_target": round(1e3 * median(a.timing.first_token for a in runs[False]), 2),
        "identical": len(same) == 1,
        "first_difference": None if len(same) == 1 else first_difference(dspark.timing.tokens, target.timing.tokens),
        "runs_tok_s": {
            "dspark": [round(a.tok_s, 2) for a in runs[True]],
            "target": [round(a.tok_s, 2) for a in runs[False]],
        },
    }


def pooled(answers: Sequence[Answer]) -> tuple[int, list[int]]:
    """Target passes after the prefill, and draft tokens accepted at each position, of the runs together: a scheduler
    may draft in one run and skip in the next. No positions when nothing was drafted."""
    accepted = [sum(n) for n in zip(*(a.accepted_per_position for a in answers))]
    return sum(a.num_rounds for a in answers), accepted if any(a.drafted for a in answers) else []


def first_difference(a: list[int], b: list[int]) -> int:
    """Index of the first token in which two outputs differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def summary(rows: list[dict]) -> dict:
    """Over all prompts: rounds pooled for the acceptance length, the median of the speed ratios."""
    rounds = sum(r["rounds"] for r in rows)
    pooled = sum(r["acceptance_length"] * r["rounds"] for r in rows) / rounds if rounds else 1.0
    return {
        "name": "all",
        "output_tokens": sum(r["output_tokens"] for r in rows),
        "acceptance_length": round(pooled, 4),
        "tok_s_dspark": round(median(r["tok_s_dspark"] for r in rows), 2),
        "tok_s_target": round(median(r["tok_s_target"] for r in rows), 2),
        "speed_ratio": round(median(r["speed_ratio"] for r in rows), 4),
        "identical": all(r["identical"] for r in rows),
        "first_difference": min((r["first_difference"] for r in rows if not r["identical"]), default=None),
    }


def stream_all(console: Console, client: Client, items: list[Item], max_tokens: int) -> None:
    """Every answer as it comes."""
    for item in items:
        console.print(
            Panel(Text(item.messages[-1]["content"]), title=item.name, title_align="left", border_style="cyan")
        )
        show = lambda text: console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
        answer = ask(client, item.messages, max_tokens=max_tokens, speculative=True, on_text=show)
        console.print(
            f"\n[dim]{len(answer.timing.tokens)} tokens, {answer.timing.finish_reason}, "
            f"{answer.acceptance_length:.2f} tokens a target pass[/]\n"
        )


def measure_all(console: Console, client: Client, items: list[Item], max_tokens: int, repeats: int) -> list[dict]:
    """A row for each prompt."""
    said, rows = "measuring, with and without the draft in turn", []
    if not console.is_terminal:
        console.print(said)
    with Progress(console=console_for_tables(), transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(said, total=len(items) * 2 * (repeats + 1))
        for item in items:
            row = compare(client, item, max_tokens=max_tokens, repeats=repeats, progress=lambda: bar.advance(task))
            rows.append(row)
    return rows


@app.command()
def main(
    target: bundles.TargetOption = bundles.TARGET,
    draft: bundles.DraftOption = bundles.DRAFT,
    bundle: bundles.BundleOption = bundles.BUNDLE,
    dtype: bundles.DtypeOption = "int8",
    prompts: Annotated[Path, typer.Option(help="JSONL with prompt, messages or turns")] = OWN_PROMPTS,
    limit: Annotated[int, typer.Option(help="prompts to use")] = 5,
    max_tokens: Annotated[int, typer.Option(help="of each answer")] = 160,
    repeats: Annotated[int, typer.Option(help="measured runs of each kind")] = 3,
    schedule: Annotated[str, typer.Option(help="of the server: none, fixed, threshold, causal or lagged")] = "lagged",
    out: Path = Path("build/demo.json"),
) -> None:
    """Streams a few answers from a Triton server and measures them with the draft and without."""
    items = read_items(prompts, limit)
    manifest = bundles.ensure(target, draft, bundle, dtype)
    if schedule in bundles.LOAD_AWARE:
        bundles.ensure_profile(bundle)
    name, block = manifest["target"]["name"], manifest["draft"]["block_size"]
    console = console_for_tables(record=True)
    try:
        settings = Settings(schedule=schedule)
    except ValueError as error:
        bundles.fail(str(error))
    server = TritonServer(bundle, settings=settings, ports=Ports(0, 0, 0), say=lambda sentence: None)
    try:
        started = time.perf_counter()
        with console.status("starting tritonserver"):
            server.start()
        seconds = time.perf_counter() - started
        console.print(f"tritonserver is ready after {seconds:.1f} s, gRPC on {server.grpc_url}", soft_wrap=True)
        console.print(f"{name} {dtype}, a draft of {block} tokens a block, schedule {schedule}\n", soft_wrap=True)
        with Client(server.grpc_url) as client:
            stream_all(console, client, items, max_tokens)
            rows = measure_all(console, client, items, max_tokens, repeats)
    except (ServerError, ClientError) as error:
        bundles.fail(str(error))
    finally:
        with console.status("stopping tritonserver"):
            server.stop()
    shutil.rmtree(server.folder, ignore_errors=True)  # its log is kept when something went wrong
    total = summary(rows)
    title = "Greedy, one stream, through Triton; medians of interleaved runs, their acceptance pooled"
    console.print(rich_table(title, COLUMNS, [*rows, total]))
    described = {"target": name, "dtype": dtype, "schedule": schedule, "block_size": block}
    described |= {"max_tokens": max_tokens, "repeats": repeats}
    result = {**described, "temperature": 0.0, "identical": total["identical"], "summary": total, "prompts": rows}
    write_result(out, result)
    console.print(f"written: {out}", soft_wrap=True)
    out.with_suffix(".txt").write_text(console.export_text())


if __name__ == "__main__":
    app()

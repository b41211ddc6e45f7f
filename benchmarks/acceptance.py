"""Acceptance length and acceptance per position of a bundle on prompt files, greedy and at temperature 1.

Knows: prompt files, the fixed schedule. Refuses to know: servers, training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from decoding.schedule import Fixed

from . import bundle as bundles
from .common import OWN_PROMPTS, console_for_tables, encode, percent, read_items, rich_table, write_result
from .inprocess import run

TITLE = "Acceptance: tokens per target pass (bonus included); per position, % of the rounds"
COLUMNS = (
    ("prompts", lambda r: r["name"]),
    ("rule", lambda r: r.get("accept") or ""),
    ("temperature", lambda r: f"{r['temperature']:g}"),
    ("n", lambda r: str(r["prompts"])),
    ("output tokens", lambda r: str(r["output_tokens"])),
    ("acceptance length", lambda r: f"{r['acceptance_length']:.2f}"),
    ("per position %", lambda r: percent(r["per_position"])),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(
    opened,
    prompts: list[list[int]],
    *,
    temperature: float,
    max_tokens: int,
    concurrency: int,
    seed: int,
    accept: str = "rejection",
    progress=lambda done: None,
) -> dict:
    """One row: acceptance over all rounds of all prompts, and what the answers were like. A greedy row has no rule."""
    done = run(
        opened,
        Fixed(),
        prompts,
        concurrency=concurrency,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        accept=accept,
        progress=progress,
    )
    rule = {"accept": accept} if temperature else {}
    tokens = sum(len(t.tokens) for t in done.timings)
    return {
        "temperature": temperature,
        **rule,
        "prompts": len(prompts),
        "output_tokens": tokens,
        **done.acceptance.as_json(),
    }


@app.command()
def main(
    target: bundles.TargetOption = bundles.TARGET,
    draft: bundles.DraftOption = bundles.DRAFT,
    bundle: bundles.BundleOption = bundles.BUNDLE,
    dtype: bundles.DtypeOption = "int8",
    prompts: Annotated[list[Path], typer.Option(help="JSONL with turns, prompt or messages; repeat for more files")] = [
        OWN_PROMPTS
    ],
    limit: Annotated[int, typer.Option(help="prompts of each file")] = 40,
    max_tokens: Annotated[int, typer.Option(help="of each answer")] = 256,
    concurrency: Annotated[int, typer.Option(help="requests decoded together")] = 8,
    accept: Annotated[list[str], typer.Option(help="rule of the sampled rows; repeat to compare")] = ["rejection"],
    temperature: Annotated[str, typer.Option(help="one row each")] = "0,1",
    seed: int = 0,
    out: Path = Path("build/acceptance.json"),
) -> None:
    """Decodes every prompt with the whole block verified and counts what is accepted."""
    manifest, console = bundles.ensure(target, draft, bundle, dtype), console_for_tables()
    opened = bundles.load(bundle)
    longest = opened.bundle.max_context - opened.bundle.draft.block_size - max_tokens
    settings = {"target": manifest["target"]["name"], "dtype": dtype, "max_tokens": max_tokens}
    settings["draft_hash"] = manifest["draft"]["hash"]
    rows = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        for path in prompts:
            encoded = [ids for ids in encode(bundle, read_items(path, limit)) if len(ids) <= longest]
            for degree, rule in (
                (t, a) for t in map(float, temperature.split(",")) for a in (accept if t else accept[:1])
            ):
                task = bar.add_task(f"{path.stem} T={degree:g}", total=len(encoded))
                row = measure(
                    opened,
                    encoded,
                    temperature=degree,
                    max_tokens=max_tokens,
                    concurrency=concurrency,
                    seed=seed,
                    accept=rule,
                    progress=lambda done: bar.update(task, completed=done),
                )
                rows.append({"name": path.stem, **row})
                bar.remove_task(task)
                if not console.is_terminal:
                    console.print(f"{path.stem} T={degree:g} {row.get('accept', '')}: {row['acceptance_length']:.3f}")
                write_result(out, {**settings, "rows": rows})
    console.print(rich_table(TITLE, COLUMNS, rows))
    console.print(f"written: {out}", soft_wrap=True)


if __name__ == "__main__":
    app()

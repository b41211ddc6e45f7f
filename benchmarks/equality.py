"""Greedy output with the draft against the target alone: many prompts of mixed length, batches of several sizes.

Knows: which prompts. Refuses to know: how two outputs are compared (it runs `python -m decoding compare`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from training.prompts import prompts as generated

from . import bundle as bundles
from .common import console_for_tables, read_items, rich_table, write_result

SEED = 41
COLUMNS = (
    ("batch", lambda r: str(r["batch"])),
    ("identical", lambda r: str(r["equal"])),
    ("near-ties", lambda r: str(r["near_ties"])),
    ("different", lambda r: str(len(r["differences"]) - r["near_ties"])),
    ("acceptance length", lambda r: f"{r['acceptance_length']:.2f}"),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    target: bundles.TargetOption = bundles.TARGET,
    draft: bundles.DraftOption = bundles.DRAFT,
    bundle: bundles.BundleOption = bundles.BUNDLE,
    dtype: bundles.DtypeOption = "int8",
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL with turns, prompt or messages; default: seeded ones of this repository")
    ] = None,
    count: Annotated[int, typer.Option(help="prompts")] = 200,
    batch: str = "1,3,8",
    max_tokens: int = 64,
    out: Path = Path("build/equality.json"),
) -> None:
    """Exit status 1 when an output differs by more than a near-tie."""
    manifest = bundles.ensure(target, draft, bundle, dtype)
    if prompts:
        chats = [list(item.messages) for item in read_items(prompts, count)]
    else:
        chats = [[{"role": "user", "content": p.text}] for p in generated(count, SEED)]
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen, report = out.with_suffix(".prompts.jsonl"), out.with_suffix(".report.json")
    chosen.write_text(
        "".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats), encoding="utf-8"
    )
    report.unlink(missing_ok=True)
    options = {"bundle": bundle, "prompts": chosen, "batch": batch, "max-tokens": max_tokens, "report": report}
    command = [sys.executable, "-m", "decoding", "compare"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if not report.is_file():
        raise typer.Exit(done.returncode or 1)
    result = json.loads(report.read_text())
    report.unlink()
    write_result(out, {"target": manifest["target"]["name"], "dtype": dtype, "max_tokens": max_tokens, **result})
    title = f"With the draft against the target alone, greedy: {result['prompts']} prompts, {result['tokens']} tokens"
    console_for_tables().print(rich_table(title, COLUMNS, result["runs"]))
    print(f"written: {out}")
    raise typer.Exit(done.returncode)


if __name__ == "__main__":
    app()

"""Greedy output with the draft against the target alone, over many prompts of mixed length, in batches of several sizes.

Knows: which prompts. Refuses to know: how two outputs are compared (it runs `python -m decoding compare`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from training.prompts import prompts as generated

from . import bundle as bundles
from .common import console_for_tables, read_items, write_result

SEED = 41
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def table(result: dict) -> Table:
    shown = Table(title=f"Greedy outputs with the draft against the target alone, {result['prompts']} prompts, {result['tokens']} tokens")
    for name in ("batch", "identical", f"near-ties (< {result['near_tie_bound']:g})", "different", "acceptance length"):
        shown.add_column(name, justify="right")
    for r in result["runs"]:
        shown.add_row(str(r["batch"]), str(r["equal"]), str(r["near_ties"]), str(len(r["differences"]) - r["near_ties"]),
                      f"{r['acceptance_length']:.2f}")
    return shown


@app.command()
def main(
    target: bundles.TargetOption = bundles.TARGET,
    draft: bundles.DraftOption = bundles.DRAFT,
    bundle: bundles.BundleOption = bundles.BUNDLE,
    dtype: bundles.DtypeOption = "int8",
    prompts: Annotated[Path | None, typer.Option(help="JSONL with turns, prompt or messages; default: seeded ones of this repository")] = None,
    count: Annotated[int, typer.Option(help="prompts")] = 200,
    batch: str = "1,3,8",
    max_tokens: int = 64,
    out: Path = Path("build/equality.json"),
) -> None:
    """Exit status 1 when an output differs by more than a near-tie."""
    bundles.ensure(target, draft, bundle, dtype)
    lines = [{"messages": list(i.messages)} for i in read_items(prompts, count)] if prompts else [
        {"messages": [{"role": "user", "content": p.text}]} for p in generated(count, SEED)]
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen, report = out.with_suffix(".prompts.jsonl"), out.with_suffix(".report.json")
    chosen.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    command = [sys.executable, "-m", "decoding", "compare", "--bundle", str(bundle), "--prompts", str(chosen), "--batch", batch,
               "--max-tokens", str(max_tokens), "--report", str(report)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if not report.is_file():
        raise typer.Exit(done.returncode or 1)
    result = json.loads(report.read_text())
    report.unlink()
    write_result(out, {"dtype": dtype, "max_tokens": max_tokens, **result})
    console_for_tables().print(table(result))
    raise typer.Exit(done.returncode)


if __name__ == "__main__":
    app()

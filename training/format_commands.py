"""`convert` and `check` of `python -m training`: a draft in another trainer's layout, a draft against its target.

Knows: their options and what they print. Refuses to know: how either works.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="folder of a draft, in any of the layouts")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    to: Annotated[str, typer.Option(help="deepspec, specforge, speculators or modelopt; eagle3; mtp")],
    target: Annotated[Path | None, typer.Option(help="folder of the target, which some layouts borrow of")] = None,
    verifier: Annotated[str | None, typer.Option(help="the target's name in a speculators config")] = None,
) -> None:
    """Writes a draft in another trainer's layout; no stored value changes."""
    from training.formats.layouts import convert

    try:
        notes = convert(source, out, to, target=target, verifier=verifier)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print("\n".join([*(f"note: {note}" for note in notes), f"wrote {out} ({to})"]))


def check(
    target: Annotated[Path, typer.Option(help="Hugging Face folder of the target")],
    draft: Annotated[Path, typer.Option(help="folder of the draft, in any of the layouts")],
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL with turns, prompt, messages or input_ids; default: our own")
    ] = None,
    limit: Annotated[int, typer.Option(help="prompts used")] = 4,
    max_tokens: Annotated[int, typer.Option(help="answer tokens of each")] = 56,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to PyTorch")] = 0,
) -> None:
    """Verifies that a draft fits a target, measures acceptance, and names the change that repairs a wrong reading."""
    import torch

    from training.check import check, table

    if threads:
        torch.set_num_threads(threads)
    try:
        report = check(target, draft, prompts, limit, max_tokens)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(table(report))
    raise typer.Exit(1 if report.failed else 0)

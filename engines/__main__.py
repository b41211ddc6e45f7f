"""`python -m engines info --bundle B`: what a bundle is, and whether it is sound."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

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
        f"target      {t.name}: {t.model_type}, {t.num_layers} layers, hidden {t.hidden_size}, vocabulary {t.vocab_size}"
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
    for row in b.parity:
        print("parity      " + ", ".join(f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    app()

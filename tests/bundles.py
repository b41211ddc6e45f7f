"""Tiny exported bundles for the tests of the rooms behind export/."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from export.__main__ import export
from tests.tiny import make_draft, make_target

ORACLE = Path(__file__).parent / "oracle"


def tiny_bundle(
    folder: Path, *, vocab: int = 64, depth: int = 3, eos: int | None = None, family: str = "llama", **draft
) -> Path:
    """folder/bundle: a random target of `depth` layers with a random draft (keyword arguments of tests.tiny.make_draft)."""
    target = make_target(folder / "target", vocab=vocab, layers=depth, eos=eos, family=family)
    return exported(target, make_draft(folder / "draft", target, **draft), folder / "bundle")


def oracle_bundle(folder: Path, draft: str) -> Path:
    """The reference models of tests/oracle, exported."""
    return exported(ORACLE / "target_qwen3", ORACLE / draft, folder / "bundle")


def exported(target: Path, draft: Path, out: Path) -> Path:
    export(target, draft, out, console=Console(file=io.StringIO()))
    return out

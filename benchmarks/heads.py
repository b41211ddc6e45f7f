"""Drafts of several kinds, depths or block sizes, trained on the same tokens and compared in the compiled loop.

Knows: the order of the commands (train, export, record, evaluation) and what makes the comparison fair: one data folder,
one seed, the same number of optimiser steps. Refuses to know: how any of them works; it runs the project's own commands.

A draft is NAME or NAME=OPTIONS, the options of `python -m training train`. What is there already is kept: a run goes on
from its last checkpoint, a bundle or a recording is made once.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .bundle import stale
from .common import KINDS

KNOWN = {
    "dspark": "--kind dspark",
    "dflash": "--kind dflash",
    "eagle3": "--kind eagle3 --depth 1",
    "mtp": "--kind mtp --depth 1",
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Entry:
    """One draft to make. options: of `python -m training train`, beside those that all drafts share."""

    name: str
    options: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Entry:
        """NAME (one of KNOWN) or NAME=OPTIONS. Raises ValueError for another."""
        name, equals, options = text.partition("=")
        if not name or not all(c.isalnum() or c in "-_." for c in name):
            raise ValueError(f"draft {text!r} has no plain name; write NAME or NAME=OPTIONS.")
        if not equals and name not in KNOWN:
            names = ", ".join(KNOWN)
            raise ValueError(f"draft {name!r} is none of {names}; name its options: {name}='--depth 3'.")
        return cls(name, tuple(shlex.split(options if equals else KNOWN[name])))


@dataclass(frozen=True)
class Family:
    """What all drafts share. `out` holds a folder a draft (run/, bundle/, rollouts.npz) and the report."""

    target: Path
    data: Path
    out: Path
    steps: int
    dtype: str
    shared: tuple[str, ...]
    record: tuple[str, ...]
    prompts: tuple[Path, ...]

    def make(self, entry: Entry) -> Path:
        """Trains, compiles and records one draft; gives its recording. Raises RuntimeError naming what failed."""
        folder = self.out / entry.name
        run, bundle, rollouts = folder / "run", folder / "bundle", folder / "rollouts.npz"
        folder.mkdir(parents=True, exist_ok=True)
        self.check_recipe(folder / "recipe.json", entry)
        if not finished(run, self.steps):
            resume = ["--resume"] if (run / "state.pt").exists() else []
            call("training", "train", "--target", self.target, "--data", self.data, "--out", run, "--steps", self.steps,
                 *self.shared, *entry.options, *resume)
        if stale(self.target, run / "latest", bundle, self.dtype):
            call("export", "--target", self.target, "--draft", run / "latest", "--out", bundle, "--dtype", self.dtype)
            rollouts.unlink(missing_ok=True)
        if not rollouts.exists():
            files = [x for file in self.prompts for x in ("--prompts", file)]
            call("decoding", "record", "--bundle", bundle, "--output", rollouts, *files, *self.record)
        return rollouts

    def check_recipe(self, file: Path, entry: Entry) -> None:
        """Refuses a folder that was begun with another recipe: figures of two recipes are not compared."""
        recipe = {"options": [*self.shared, *entry.options], "steps": self.steps, "data": str(self.data)}
        if not file.exists():
            file.write_text(json.dumps(recipe, indent=2) + "\n")
        elif (before := json.loads(file.read_text())) != recipe:
            odd = next(key for key in recipe if before.get(key) != recipe[key])
            raise ValueError(f"{file.parent} was begun with {odd} {before.get(odd)}, now {recipe[odd]}; name another --out.")


def finished(run: Path, steps: int) -> bool:
    """Whether the log's last line is of the last step, and the head is there."""
    log = run / "log.jsonl"
    if not log.is_file() or not any((run / "latest").glob("*.safetensors")):
        return False
    numbers = [json.loads(line).get("step", 0) for line in log.read_text().splitlines() if line.startswith("{")]
    return bool(numbers) and max(numbers) >= steps


def call(module: str, *arguments: object) -> None:
    """`python -m module arguments`, its output shown. Raises RuntimeError when it fails."""
    words = [str(a) for a in arguments]
    print(f"\n$ python -m {module} {shlex.join(words)}", flush=True)
    if subprocess.run([sys.executable, "-m", module, *words]).returncode:
        raise RuntimeError(f"`python -m {module} {words[0]}` failed; its message is above.")


@app.command()
def main(
    target: Annotated[Path, typer.Option(help="Hugging Face folder of the target")],
    data: Annotated[Path, typer.Option(help="training data, the same for all (`python -m training data | generate`)")],
    draft: Annotated[list[str], typer.Option(help="NAME (dspark, dflash, eagle3, mtp) or NAME=OPTIONS of `training train`")],
    out: Annotated[Path, typer.Option(help="a folder a draft, and the report")] = Path("build/heads-compared"),
    steps: Annotated[int, typer.Option(help="optimiser steps of each draft")] = 400,
    train: Annotated[str, typer.Option(help="further options of `training train`, for all")] = "--seed 1",
    dtype: Annotated[str, typer.Option(help="of the bundles: fp32, int8 or int8-block64")] = "int8",
    record: Annotated[str, typer.Option(help="options of `python -m decoding record`")] = "--max-tokens 96 --minutes 1.5 --least 1500",
    prompts: Annotated[list[Path], typer.Option(help="prompts that no draft was trained on; again for more files")] = list(KINDS.values()),
) -> None:
    """Trains, compiles and records each draft, then one report with all of them: OUT/report.md."""
    try:
        entries = [Entry.of(text) for text in draft]
        if len({e.name for e in entries}) < len(entries):
            raise ValueError("two drafts have the same name.")
        family = Family(target, data, out, steps, dtype, tuple(shlex.split(train)), tuple(shlex.split(record)), tuple(prompts))
        recordings = [(entry.name, family.make(entry)) for entry in entries]
        call("benchmarks.evaluation", "--out", out, *(x for name, file in recordings for x in ("--rollouts", f"{name}={file}")))
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    app()

"""Whether a bundle still fits its two checkpoints, and the export when it does not.

Knows: the hashes in a bundle's manifest. Refuses to know: how an export works (it runs `python -m export`).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

TARGET = Path("build/models/smollm2-135m-instruct")
DRAFT = Path("training/heads/smollm2-135m-instruct")
BUNDLE = Path("build/bundles/smollm2-135m-instruct-int8")

TargetOption = Annotated[Path, typer.Option(help="Hugging Face folder of the target model")]
DraftOption = Annotated[Path, typer.Option(help="DeepSpec folder of the draft head")]
BundleOption = Annotated[Path, typer.Option(help="folder of the compiled bundle; made when it is missing or stale")]
DtypeOption = Annotated[str, typer.Option(help="fp32 or int8")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def ensure(target: Path, draft: Path, bundle: Path, dtype: str) -> dict:
    """The manifest of `bundle`, exported first when it does not fit the checkpoints, the dtype or this format.

    Raises typer.Exit after one sentence when a checkpoint is missing or the export fails.
    """
    for name, folder in (("target", target), ("draft", draft)):
        if not any(folder.glob("*.safetensors")):
            fail(f"The {name} folder {folder} holds no *.safetensors file.")
    reason = stale(target, draft, bundle, dtype)
    if reason:
        print(f"export: {reason}; compiling {bundle}", flush=True)
        command = [
            sys.executable,
            "-m",
            "export",
            "--target",
            target,
            "--draft",
            draft,
            "--out",
            bundle,
            "--dtype",
            dtype,
        ]
        if subprocess.run([str(part) for part in command]).returncode:
            fail(f"The export of {bundle} failed; its message is above.")
        reason = stale(target, draft, bundle, dtype)
        if reason:
            fail(f"The export of {bundle} ended well, but {reason}.")
    return json.loads((bundle / "manifest.json").read_text())


def stale(target: Path, draft: Path, bundle: Path, dtype: str) -> str | None:
    """Why `bundle` cannot be used for these checkpoints; None when it can."""
    path = bundle / "manifest.json"
    if not path.is_file():
        return "there is no bundle yet"
    try:
        manifest = json.loads(path.read_text())
        version, made_as = manifest["format_version"], manifest["dtype"]
        hashes = {"target": manifest["target"]["hash"], "draft": manifest["draft"]["hash"]}
    except (ValueError, KeyError, TypeError):
        return "its manifest cannot be read"
    if version != 1:
        return f"it has format version {version}, not 1"
    if made_as != dtype:
        return f"it was made as {made_as}, not {dtype}"
    for name, folder in (("draft", draft), ("target", target)):
        if checkpoint_hash(folder) != hashes[name]:
            return f"it was made from another {name}"
    return None


def checkpoint_hash(folder: Path) -> str:
    """sha256 of the folder's *.safetensors files in name order, as the manifest has it."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def fail(sentence: str) -> None:
    """One sentence on stderr, exit status 1."""
    print(sentence, file=sys.stderr)
    raise typer.Exit(1)


@app.command()
def main(
    target: TargetOption = TARGET,
    draft: DraftOption = DRAFT,
    bundle: BundleOption = BUNDLE,
    dtype: DtypeOption = "int8",
) -> None:
    """Makes the bundle when it is missing or does not fit."""
    ensure(target, draft, bundle, dtype)


if __name__ == "__main__":
    app()

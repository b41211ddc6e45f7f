"""Whether a bundle still fits its two checkpoints and this machine; the export, the profile when it does not.

Knows: the hashes in a bundle's manifest. Refuses to know: how an export or a profile works (it runs `python -m export`,
`python -m engines profile`).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import engines
from decoding.schedule import LOAD_AWARE as LOAD_AWARE  # the schedulers that need the bundle's profile
from engines import BundleError, Engines
from engines.bundle import FORMAT_VERSION
from engines.sps import Sps

TARGET = Path("build/models/smollm2-135m-instruct")
DRAFT = Path("training/heads/smollm2-135m-instruct")
BUNDLE = Path("build/bundles/smollm2-135m-instruct-int8")

TargetOption = Annotated[Path, typer.Option(help="Hugging Face folder of the target model")]
DraftOption = Annotated[Path, typer.Option(help="DeepSpec folder of the draft head")]
BundleOption = Annotated[Path, typer.Option(help="folder of the compiled bundle; made when it is missing or stale")]
DtypeOption = Annotated[str, typer.Option(help="fp32, int8 or int8-block64")]

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
        options = ["--target", target, "--draft", draft, "--out", bundle, "--dtype", dtype]
        if subprocess.run([sys.executable, "-m", "export", *map(str, options)]).returncode:
            fail(f"The export of {bundle} failed; its message is above.")
        reason = stale(target, draft, bundle, dtype)
        if reason:
            fail(f"The export of {bundle} ended well, but {reason}.")
    return json.loads((bundle / "manifest.json").read_text())


def ensure_profile(bundle: Path, device: str | None = None) -> None:
    """Profiles `bundle` when it has no profile that holds for this machine, these engines and their default threads.

    Raises typer.Exit after one sentence when the engines cannot be opened or the profile fails.
    """
    reason = unprofiled(bundle, device)
    if not reason:
        return
    print(f"profile: {reason} Measuring the engines of {bundle} now, a minute or two.", flush=True)
    command = [sys.executable, "-m", "engines", "profile", "--bundle", str(bundle), "--quick"]
    command += ["--device", device] if device else []
    if subprocess.run(command).returncode:
        fail(f"The profile of {bundle} failed; its message is above.")
    reason = unprofiled(bundle, device)
    if reason:
        fail(f"The profile of {bundle} ended well, but it is refused: {reason}")


def load(bundle: Path, device: str | None = None) -> Engines:
    """The engines of `bundle`; device: of engines.load. Raises typer.Exit after one sentence when they cannot be opened."""
    try:
        return engines.load(bundle, device=device)
    except ValueError as error:  # BundleError is one
        fail(str(error))


def unprofiled(bundle: Path, device: str | None = None) -> str | None:
    """Why the load-aware schedulers cannot run on `bundle` here, one sentence; None when they can."""
    opened = load(bundle, device)
    try:
        Sps.of(opened)
    except BundleError as error:
        return str(error)
    finally:
        opened.close()
    return None


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
    if version != FORMAT_VERSION:
        return f"it has format version {version}, not {FORMAT_VERSION}"
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
    """Makes the bundle when it is missing or does not fit, and its profile likewise."""
    ensure(target, draft, bundle, dtype)
    ensure_profile(bundle)


if __name__ == "__main__":
    app()

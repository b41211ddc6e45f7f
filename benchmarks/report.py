"""Fills the marked sections of README.md and docs/results.md from the result files in build/: numbers are never typed in.

Knows: the result files and the markers `<!-- name:begin -->`, `<!-- name:end -->`. Refuses to know: how a result is measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from .common import percent

SHOWN_ANSWERS = 1  # streamed answers that the README shows; the rest is left out
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def fill(text: str, name: str, body: str) -> str:
    """`text` with the section `name` replaced. Raises ValueError when it has no such section."""
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"There is no section {name!r} to fill.")
    return pattern.sub(lambda m: f"{m[1]}\n{body.strip(chr(10))}\n\n{m[2]}", text)


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table whose columns but the first are right-aligned."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(result: dict) -> str:
    m = result["machine"]
    versions = ", ".join(f"{name} {m[name]}" for name in ("onnxruntime", "nvidia-pytriton") if name in m)
    return f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']:g} GiB; Python {m['python']}, {versions}; {result['date'][:10]}.\n`{result['command']}`"


def demo(result: dict) -> str:
    rows = [[r["name"], str(r["output_tokens"]), f"{r['acceptance_length']:.2f}", percent(r["acceptance_per_position"]),
             f"{r['tok_s_dspark']:.1f}", f"{r['tok_s_target']:.1f}", f"{r['speed_ratio']:.2f}", "yes" if r["identical"] else "no"]
            for r in result["prompts"]]
    s = result["summary"]
    rows.append(["all", "", f"{s['acceptance_length']:.2f}", "", f"{s['tok_s_dspark']:.1f}", f"{s['tok_s_target']:.1f}",
                 f"{s['speed_ratio']:.2f}", "yes" if s["identical"] else "no"])
    columns = ["prompt", "output tokens", "acceptance length", "per position %", "DSpark tok/s", "target tok/s", "ratio", "identical"]
    return (f"{result['target']} {result['dtype']}, greedy, one stream through Triton, {result['max_tokens']} tokens at most, medians of "
            f"{result['repeats']} interleaved runs. {source(result)}\n\n{markdown(columns, rows)}")


def acceptance(result: dict) -> str:
    rows = [[r["name"], f"{r['temperature']:g}", str(r["prompts"]), str(r["output_tokens"]), f"{r['acceptance_length']:.2f}",
             percent(r["per_position"])] for r in result["rows"]]
    columns = ["prompts", "temperature", "n", "output tokens", "acceptance length", "per position %"]
    return (f"Whole block verified, {result['bundle']['dtype']}, {result['max_tokens']} tokens at most. {source(result)}\n\n"
            f"{markdown(columns, rows)}")


def bench(result: dict) -> str:
    rows = [[r["where"], str(r["concurrency"]), r["schedule"], f"{r['output_tok_s']:.1f}", f"{r['ratio']:.2f}", f"{r['user_tok_s']:.1f}",
             f"{r['ttft_ms']:.0f}", f"{r['itl_ms']:.1f}", f"{r['acceptance_length']:.2f}", f"{r['verified_per_round']:.2f}",
             f"{100 * r['outside_engines']:.1f}" if "outside_engines" in r else ""] for r in result["rows"]]
    columns = ["where", "users", "schedule", "tok/s", "ratio to none", "tok/s/user", "TTFT ms", "ITL ms", "acceptance length",
               "verified/round", "outside engines %"]
    return (f"{result['target']} {result['dtype']}, greedy, {result['max_tokens']} tokens at most, threshold {result['threshold']:g}, output tokens "
            f"only, medians of {result['repeats']} interleaved runs. {source(result)}\n\n{markdown(columns, rows)}")


def equality(result: dict) -> str:
    rows = [[str(r["batch"]), str(r["equal"]), str(r["near_ties"]), str(len(r["differences"]) - r["near_ties"]),
             f"{r['acceptance_length']:.2f}"] for r in result["runs"]]
    columns = ["batch", "identical", f"near-ties below {result['near_tie_bound']:g}", "different", "acceptance length"]
    return (f"{result['prompts']} prompts, {result['tokens']} tokens, {result['dtype']}; the reference is the target alone, one request at a time. "
            f"{source(result)}\n\n{markdown(columns, rows)}")


def shown_demo(text: str) -> str:
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
        raise ValueError("build/ci.log holds no closing line of pytest.")
    return f"```text\n$ make test\n{found[-1].strip('= ')}\n```"


@app.command()
def main(
    build: Annotated[Path, typer.Option(help="folder of the result files")] = Path("build"),
    root: Annotated[Path, typer.Option(help="folder of README.md and docs/")] = Path("."),
) -> None:
    """Fills what there are results for, and says what it filled."""
    pages = {
        "docs/results.md": {name: (f"{name}.json", lambda raw, make=make: make(json.loads(raw)))
                            for name, make in (("demo", demo), ("acceptance", acceptance), ("bench", bench), ("equality", equality))},
        "README.md": {"demo": ("demo.txt", shown_demo), "test": ("ci.log", closing_line)},
    }
    for page, sections in pages.items():
        path = root / page
        text = path.read_text(encoding="utf-8")
        for name, (file, make) in sections.items():
            if (build / file).is_file():
                text = fill(text, name, make((build / file).read_text(encoding="utf-8")))
                print(f"{page}: {name} from {build / file}")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app()

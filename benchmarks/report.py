"""Fills the marked sections of README.md and docs/results.md from the files in build/: numbers are never typed in.

Knows: the result files and the markers `<!-- name:begin -->`, `<!-- name:end -->`.
Refuses to know: how a result is measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from . import acceptance, bench, cells, demo, equality, evaluation, findings, simulate, training
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
    schedule = f", schedule {result['schedule']}" if "schedule" in result else ""
    return section(f"{what(result)}, one stream through Triton{schedule}", result, demo.COLUMNS, rows)


def acceptance_section(result: dict) -> str:
    return section(f"{what(result)}, whole block verified", result, acceptance.COLUMNS, result["rows"])


def bench_sections(make: Callable[[list[dict]], str]) -> Callable[[list[Path]], str]:
    """A section of build/bench.json: where and how its rows were measured, then make(rows)."""

    def section_of(files: list[Path]) -> str:
        rows, meta = cells.read(files[0])
        return f"{bench_origin(rows, meta)}\n\n{make(rows)}" if rows else ""

    return section_of


def grpc_section(files: list[Path]) -> str:
    """The newest of the files that has gRPC rows: they may come from a run of their own (`--out build/bench-grpc.json`)."""
    for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
        rows, meta = cells.read(file)
        if any(r["path"] == "grpc" for r in rows):
            return f"{bench_origin(rows, meta)}\n\n{judged(findings.grpc(rows))}"
    return ""


def bench_origin(rows: list[dict], meta: dict) -> str:
    """The runs that the rows come from."""
    bundle, runs = meta.get("bundle"), [meta["runs"][name] for name in dict.fromkeys(r["run"] for r in rows)]
    what = f"{bundle['target']} {bundle['dtype']}" if bundle else "A running server"
    said = []
    for run in runs:
        how = f"answers of at most {run['max_tokens']} tokens, {run['repeats']} interleaved windows of about {run['seconds']:g} s"
        said.append(f"{run['date'][:10]}, {how}:\n`{run['command']}`")
    return f"{what}. {machine_line(meta['machine'])}.\n" + "\n".join(said)


def throughput(rows: list[dict]) -> str:
    grid, detail = findings.throughput(rows), findings.latency(rows)
    said = "Output tok/s of all users, in process, greedy; in brackets the ratio to none in the same run."
    pictures = "![tok/s of one user against tok/s of all](images/pareto.png)\n\n![budget and acceptance by users](images/budget.png)"
    return f"{pictures}\n\n{said}\n\n{grid}\n\nWhat `lagged` does, and what its users see:\n\n{detail}\n\n{bench.LEGEND}"


def in_short(rows: list[dict]) -> str:
    picture = "![tok/s of one user against tok/s of all users](docs/images/pareto.png)"
    served = f"\n{findings.grpc(rows)[0]}" if any(r.get("grpc_ratio") for r in rows) else ""
    return f"{picture}\n\n{findings.short(rows)}\n\n{findings.claim(rows)[0]}{served}"


def judged(said_and_table: tuple[str, str]) -> str:
    said, table = said_and_table
    return f"{said}\n\n{table}"


def with_origin(make: Callable[[dict], tuple[str, str]]) -> Callable[[dict], str]:
    """A judged section of a result file that names its machine and command."""

    def section_of(result: dict) -> str:
        said, table = make(result)
        where = machine_line(result["machine"]) + ", " if "machine" in result else ""
        return f"{said}\n{where}{result['date'][:10]}:\n`{result['command']}`\n\n{table}"

    return section_of


def accept_section(results: list[dict]) -> str:
    """What each accept rule costs in acceptance: one table over all result files that name their rule."""
    rows = [{"accept": r["accept"], **row} for r in results for row in r["rows"] if row.get("accept") is None and "accept" in r]
    rows += [row for r in results for row in r["rows"] if row.get("accept") is not None]
    if not rows:
        return ""
    rows.sort(key=lambda r: (r["name"], r["temperature"], r["accept"]))
    columns = acceptance.COLUMNS
    named = next(r for r in reversed(results) if "accept" in r or any(row.get("accept") for row in r["rows"]))
    return section(what(named), named, columns, rows)


def peers_section(files: list[Path]) -> str:
    """A table a run (`--out build/peers-16.json` and the like): loading every engine at once takes memory and time."""
    return "\n\n".join(map(peers_run, (file for file in files if not file.name.endswith(".meta.json"))))


def peers_run(file: Path) -> str:
    rows, meta = cells.read(file)
    rows = rows or json.loads(file.read_text())
    where = f"{machine_line(meta['machine'])}, {meta['date'][:10]}:\n`{meta['command']}`\n\n" if "machine" in meta else ""
    return where + findings.peers(rows)


def equality_section(result: dict) -> str:
    said = (
        f"{what(result)}: {result['prompts']} prompts, {result['tokens']} tokens. The reference is the target "
        f"alone, one request at a time; in a near-tie the top two logits lie within {result['near_tie_bound']:g}"
    )
    return section(said, result, equality.COLUMNS, result["runs"])


def heads_section(result: dict) -> str:
    """Drafts of one `make heads`, side by side."""
    said = "Whole blocks verified; acceptance length counts the bonus token"
    return section(said, result, evaluation.COLUMNS, evaluation.side_by_side(result["drafts"]))


def simulation_section(result: dict) -> str:
    """Closed loop: total tok/s of every mode, and lagged's budget."""
    said = f"Simulated, {result['seconds']:g} s a cell; acceptance: {result['rollouts']}. `budget`: tokens verified a request and step"
    return f"{said}.\n`{result['command']}`\n\n{markdown_table(simulate.COLUMNS, result['rows'])}"


def poisson_section(result: dict) -> str:
    """Arrivals at a share of lagged's best closed-loop throughput."""
    return markdown_table(simulate.POISSON, result["poisson"])


def what(result: dict) -> str:
    return f"{result['target']} {result['dtype']}, at most {result['max_tokens']} tokens an answer"


def section(said: str, result: dict, columns: tuple, rows: list[dict]) -> str:
    """What was measured, where, when and by which command; then the table."""
    machine = machine_line(result["machine"])
    head = f"{said}.\n{machine}, {result['date'][:10]}:\n`{result['command']}`"
    return f"{head}\n\n{markdown_table(columns, rows)}"


def machine_line(m: dict) -> str:
    versions = ", ".join(f"{name} {m[name]}" for name in ("onnxruntime", "nvidia-pytriton") if name in m)
    return f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']:g} GiB, Python {m['python']}, {versions}"


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


def from_json(make: Callable[[dict], str]) -> Callable[[list[Path]], str]:
    return lambda files: make(json.loads(files[0].read_text(encoding="utf-8")))


def from_text(make: Callable[[str], str]) -> Callable[[list[Path]], str]:
    return lambda files: make(files[0].read_text(encoding="utf-8"))


def from_all(make: Callable[[list[dict]], str]) -> Callable[[list[Path]], str]:
    return lambda files: make([json.loads(file.read_text(encoding="utf-8")) for file in files])


SECTIONS = {  # page: {section: (result files in build/, files -> section; "" leaves the section as it is)}
    "docs/results.md": {
        "demo": ("demo.json", from_json(demo_section)),
        "acceptance": ("acceptance.json", from_json(acceptance_section)),
        "bench": ("bench.json", bench_sections(throughput)),
        "claim": ("bench.json", bench_sections(lambda rows: judged(findings.claim(rows)))),
        "grpc": ("bench*.json", grpc_section),
        "scheduling": ("scheduling.json", from_json(with_origin(findings.scheduling))),
        "calibration": ("calibration/*.json", from_json(with_origin(findings.calibration))),
        "accept": ("acceptance*.json", from_all(accept_section)),
        "peers": ("peers*.json", peers_section),
        "equality": ("equality.json", from_json(equality_section)),
        "training": ("training.json", from_json(with_origin(training.said))),
        "heads": ("heads-compared/eval.json", from_json(heads_section)),
    },
    "docs/simulation.md": {
        "simulation": ("simulation.json", from_json(simulation_section)),
        "poisson": ("simulation.json", from_json(poisson_section)),
    },
    "README.md": {
        "demo": ("demo.txt", from_text(demo_output)),
        "bench": ("bench.json", bench_sections(in_short)),
        "test": ("ci.log", from_text(closing_line)),
    },
    "training/heads/smollm2-135m-instruct/README.md": {
        "training": ("heads/smollm2/log.jsonl", from_text(training_section)),
        "acceptance": ("acceptance.json", from_json(acceptance_section)),
    },
}


@app.command()
def main(
    build: Annotated[Path, typer.Option(help="folder of the result files")] = Path("build"),
    root: Annotated[Path, typer.Option(help="folder of README.md and docs/")] = Path("."),
) -> None:
    """Draws the pictures and fills the sections that there are results for, and says which."""
    if rows := findings.select(cells.read(build / "bench.json")[0]):
        from .pictures import draw

        draw(rows, root / "docs/images")
    for page, sections in SECTIONS.items():
        path = root / page
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        for name, (pattern, make) in sections.items():
            files = sorted(build.glob(pattern))
            if files and (body := make(files)):
                text = fill(text, name, body)
                print(f"{page}: {name} from {', '.join(map(str, files))}")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app()

"""`python -m benchmarks.simulate`: where each schedule wins on cards that are not here. Figures, pictures, tables.

Knows: which cells are simulated and how they are shown. Refuses to know: how a step is simulated (simulation.py) or how
long it takes (roofline.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import typer
from decoding.schedule import make
from engines.sps import Sps
from rich.progress import Progress

from . import roofline, traces
from .common import console_for_tables, rich_table, write_result
from .simulation import Traffic, simulate

MODES = ("none", "mtp1", "fixed", "threshold", "causal", "lagged")
USERS = (1, 4, 16, 64, 128, 256, 512, 1000)
CELLS = (
    ("Qwen3-4B", "H100"), ("Qwen3-4B", "B200"), ("Qwen3-8B", "H100"), ("Qwen3-8B", "H200"), ("Qwen3-14B", "H200"),
    ("Gemma4-12B", "B200"), ("DeepSeek-V4-Flash", "H200"), ("DeepSeek-V4-Flash", "B200"),
)  # fmt: skip
BLOCKS = {"DeepSeek-V4-Flash": 5}  # the paper's production setting; 7 elsewhere
CONTEXTS = (256, 1024, 4096, 8192)
COLUMNS = (
    ("model", lambda r: r["model"]),
    ("card", lambda r: r["gpu"]),
    ("users", lambda r: f"{r['users']}"),
    *(
        (mode, lambda r, mode=mode: f"{r[mode]['total_tok_s']:,.0f}" if mode in r else "")
        for mode in MODES
    ),
    ("lagged / best of none, fixed", lambda r: f"{r['ratio']:.2f}"),
    ("budget", lambda r: f"{1 + r['lagged']['verified_per_round']:.2f}"),
    ("accepted", lambda r: f"{r['lagged']['acceptance_length']:.2f}"),
)
POISSON = (
    ("model", lambda r: r["model"]),
    ("card", lambda r: r["gpu"]),
    ("load", lambda r: f"{r['load']:.0%}"),
    ("requests/s", lambda r: f"{r['rate']:.1f}"),
    *(
        (f"{mode}: {title}", lambda r, mode=mode, key=key, form=form: form.format(r[mode][key]))
        for title, key, form in (("tok/s a user", "user_tok_s", "{:,.0f}"), ("TTFT p95 ms", "ttft_p95_ms", "{:,.0f}"))
        for mode in ("none", "fixed", "lagged")
    ),
    ("budget", lambda r: f"{1 + r['lagged']['verified_per_round']:.2f}"),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def table(gpu: roofline.Gpu, model: roofline.Model, block: int, slots: int, token_budget: int = 2048) -> Sps:
    """The roofline as the scheduler's cost table: points on both sides of every CUDA-graph bucket."""
    target, draft = [], []
    requests = [r for r in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if r <= slots]
    sizes = np.unique(roofline.bucket(np.arange(1, max(requests) * (1 + block) + token_budget)).astype(int))
    sizes = np.unique(np.concatenate([sizes, sizes[:-1] + 1]))
    for context in CONTEXTS:
        for r in requests:
            most = r * (1 + block) + token_budget
            tokens = np.unique(np.concatenate([[r, most], sizes[(sizes > r) & (sizes < most)]]))
            ms = roofline.target_ms(gpu, model, r, tokens, context)
            target += [(r, int(n), context, float(t)) for n, t in zip(tokens, ms)]
            draft.append((r, context, roofline.draft_ms(gpu, model, r, context, block)))
    return Sps.from_points(target, draft)


def cell(
    name: str,
    card: str,
    users: int,
    rollouts: Path,
    seconds: float,
    modes=MODES,
    rate: float = 0.0,
    token_budget: int = 2048,
) -> dict:
    """One row: every mode under the same load and seed."""
    model, gpu = roofline.MODELS[name], roofline.GPUS[card]
    block = BLOCKS.get(name, traces.PAPER_BLOCK)
    pool = traces.shifted(rollouts, block)
    slots = min(1024, roofline.capacity(gpu, model, 1024))
    sps = table(gpu, model, block, slots, token_budget)
    row: dict = {"model": name, "gpu": card, "users": users, "rate": rate, "slots": slots, "cards": model.cards}
    for mode in modes:
        if mode == "mtp1":
            from decoding.schedule import Fixed

            factory = lambda: Fixed(1)
        else:
            factory = lambda mode=mode: make(mode, threshold=0.5, sps=sps)
        traffic = Traffic(users=users, rate=rate)
        row[mode] = simulate(
            factory, sps, pool, traffic, seconds=seconds, slots=slots, token_budget=token_budget
        )
    best = max(row[m]["total_tok_s"] for m in ("none", "fixed") if m in row)
    row["ratio"] = row["lagged"]["total_tok_s"] / best if best else float("nan")
    return row


@app.command()
def main(
    rollouts: Annotated[Path, typer.Option(help="npz of `python -m decoding record`")] = Path(
        "benchmarks/rollouts.npz"
    ),
    only: Annotated[Optional[str], typer.Option(help="one model's name")] = None,
    users: Annotated[str, typer.Option(help="comma-separated closed-loop users")] = ",".join(map(str, USERS)),
    rates: Annotated[
        str, typer.Option(help="shares of lagged's closed-loop peak that Poisson arrivals offer")
    ] = "0.3,0.6,0.9",
    seconds: Annotated[float, typer.Option(help="simulated seconds of a cell")] = 120.0,
    token_budget: Annotated[int, typer.Option(help="tokens of a step, prompts included")] = 2048,
    out: Path = Path("build/simulation.json"),
    images: Path = Path("docs/images"),
) -> None:
    """Simulates closed-loop users and Poisson arrivals for every model and card of the list."""
    console = console_for_tables()
    cells = [c for c in CELLS if only in (None, c[0])]
    if not cells:
        raise SystemExit(f"--only is {only!r}; it must be one of {', '.join(roofline.MODELS)}.")
    try:
        what = traces.shifted(rollouts, traces.PAPER_BLOCK).what
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    levels, shares = [int(u) for u in users.split(",")], [float(r) for r in rates.split(",") if r]
    rows, open_loop = [], []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("simulating", total=len(cells) * (len(levels) + len(shares)))
        for name, card in cells:
            for level in levels:
                rows.append(cell(name, card, level, rollouts, seconds, token_budget=token_budget))
                bar.advance(task)
            peak = max(r["lagged"]["total_tok_s"] for r in rows if (r["model"], r["gpu"]) == (name, card))
            for share in shares:
                rate = share * peak / Traffic().answer
                row = cell(name, card, 0, rollouts, seconds, ("none", "fixed", "lagged"), rate, token_budget)
                open_loop.append({**row, "load": share})
                bar.advance(task)
            write_result(out, {"rollouts": what, "seconds": seconds, "rows": rows, "poisson": open_loop})
    console.print(rich_table("closed loop: output tok/s of all users (simulated)", COLUMNS, rows))
    for path in draw(json.loads(out.read_text()), images):
        console.print(f"drawn: {path}")


def draw(result: dict, folder: Path) -> list[Path]:
    """Two pictures: throughput and budget against users (the paper's Figure 8), and the Pareto frontier (Figure 7)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    colours = dict(zip(MODES, ("#777777", "#CC79A7", "#D55E00", "#E69F00", "#56B4E9", "#0072B2")))
    groups: dict[tuple, list] = {}
    for row in result["rows"]:
        groups.setdefault((row["model"], row["gpu"]), []).append(row)
    chosen = [g for g in (("Qwen3-8B", "H100"), ("Gemma4-12B", "B200"), ("DeepSeek-V4-Flash", "H200")) if g in groups]
    chosen = chosen or list(groups)[:3]
    figure, axes = plt.subplots(2, len(chosen), figsize=(4 * len(chosen), 6.4), squeeze=False)
    for column, key in zip(axes.T, chosen):
        rows, per = groups[key], groups[key][0]["cards"]
        users = [r["users"] for r in rows]
        for mode in MODES:
            column[0].plot(
                users, [r[mode]["total_tok_s"] / per for r in rows], "o-", ms=3, color=colours[mode], label=mode
            )
            if mode != "none":
                column[1].plot(
                    users, [1 + r[mode]["verified_per_round"] for r in rows], "o-", ms=3, color=colours[mode]
                )
        column[0].set(title=f"{key[0]}, {key[1]}" + (f" x {per}" if per > 1 else ""), xscale="log", yscale="log")
        column[1].set(xlabel="concurrent requests", xscale="log")
    axes[0][0].set_ylabel("output tok/s a card (simulated)")
    axes[1][0].set_ylabel("tokens verified a request and step")
    axes[0][0].legend(fontsize=8)
    paths = [_save(figure, folder / "simulated-load.png")]
    figure, axes = plt.subplots(1, len(chosen), figsize=(4 * len(chosen), 3.6), squeeze=False)
    for axis, key in zip(axes[0], chosen):
        rows, per = groups[key], groups[key][0]["cards"]
        for mode in MODES:
            x, y = ([r[mode][k] for r in rows] for k in ("user_tok_s", "total_tok_s"))
            axis.plot(x, [v / per for v in y], "o-", ms=3, color=colours[mode], label=mode)
        axis.set(title=f"{key[0]}, {key[1]}", xlabel="tok/s a user", xscale="log", yscale="log")
    axes[0][0].set_ylabel("output tok/s a card (simulated)")
    axes[0][0].legend(fontsize=8)
    return [*paths, _save(figure, folder / "simulated-pareto.png")]


def _save(figure, path: Path) -> Path:
    for axis in figure.axes:
        axis.grid(alpha=0.3, which="both", lw=0.4)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    app()

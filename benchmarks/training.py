"""Training on the fly against the reference's cached recipe: tokens a second, memory and disk, in turns in one run.

Knows: the setting, processes, clocks. Refuses to know: how a step is made (training/), what the cache holds
(cached_recipe.py). Every measurement is a process of its own; its clock starts when the models are loaded. The cached
recipe is two: one that runs the target and writes, one that trains without the target's layers in memory.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import markdown_table, rich_table, write_result

WAYS = {  # name: (arguments of its processes)
    "cached recipe": (("cache",), ("train", "cached")),
    "on the fly, nothing kept": (("train", "fly", "0"),),
    "on the fly, kept in memory": (("train", "fly", "8"),),
}
COLUMNS = (  # in brackets the ratio to the cached recipe
    ("way", lambda r: r["way"]),
    ("tokens/s", lambda r: f"{r['tokens_per_second']:,.0f} ({r['ratio']:.2f})"),
    ("s to cache", lambda r: f"{r['cache_seconds']:.1f}"),
    ("s an epoch", lambda r: f"{r['epoch_seconds']:.1f}"),
    ("peak MB", lambda r: f"{r['peak_mb']:,.0f} ({r['peak_ratio']:.2f})"),
    ("disk MB", lambda r: f"{r['disk_bytes'] / 1e6:,.2f} ({r['disk_ratio']:.2%})"),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def median_of(rows: list[dict], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def summary(measured: dict[str, list[dict]], epochs: int) -> list[dict]:
    """One row a way: medians over its repeats; ratios are medians of the ratios of each repeat to the cached recipe."""
    rows, base = [], measured["cached recipe"]
    speed = lambda r: epochs * r["tokens"] / (r["cache_seconds"] + epochs * r["epoch_seconds"])
    for way, own in measured.items():
        ratio = lambda of: statistics.median(of(mine) / of(theirs) for mine, theirs in zip(own, base))
        rows.append({
            "way": way,
            "tokens_per_second": statistics.median(map(speed, own)),
            "ratio": ratio(speed),
            "cache_seconds": median_of(own, "cache_seconds"), "epoch_seconds": median_of(own, "epoch_seconds"),
            "peak_mb": median_of(own, "peak_mb"), "peak_ratio": ratio(lambda r: r["peak_mb"]),
            "disk_bytes": own[0]["disk_bytes"], "disk_ratio": own[0]["disk_bytes"] / base[0]["disk_bytes"],
            "loss": own[0]["loss"],
        })  # fmt: skip
    return rows


def said(result: dict) -> tuple[str, str]:
    """For docs/results.md: what was measured, and the table."""
    same = "the same last loss (five digits)" if len({r["loss"] for r in result["rows"]}) == 1 else "losses that differ"
    text = (
        f"{result['target']}, {result['sequences']} sequences ({result['tokens']:,} tokens), {result['epochs']} epochs, "
        f"interleaved repeats: {result['repeats']}, a process each; {same} in all ways. In brackets the ratio to the "
        "cached recipe; its tokens/s include the caching. Seconds an epoch: the mean over these epochs. Peak: resident "
        "memory after the models are loaded. Disk: token ids, and what is cached."
    )
    return text, markdown_table(COLUMNS, result["rows"])


@app.command()
def main(
    target: Annotated[Path, typer.Option(help="Hugging Face folder of the target")] = Path(
        "build/models/smollm2-135m-instruct"
    ),
    data: Annotated[Path, typer.Option(help="folder that `generate` wrote")] = Path(
        "training/heads/smollm2-135m-instruct/data"
    ),
    sequences: Annotated[int, typer.Option(help="of the data, from the first")] = 24,
    epochs: int = 2,
    repeats: int = 2,
    out: Annotated[Path, typer.Option(help="result file")] = Path("build/training.json"),
) -> None:
    """Trains the shipped head's shape both ways in turn."""
    measured: dict[str, list[dict]] = {way: [] for way in WAYS}
    ways = list(WAYS)
    for repeat in range(repeats):
        for way in ways[repeat % len(ways) :] + ways[: repeat % len(ways)]:
            with tempfile.TemporaryDirectory(dir=out.parent, prefix="training-") as scratch:
                got = [child([str(target), str(data), str(sequences), str(epochs), scratch, *a]) for a in WAYS[way]]
            measured[way].append({**got[0], **got[-1], "cache_seconds": sum(g.get("cache_seconds", 0.0) for g in got),
                                  "peak_mb": max(g["peak_mb"] for g in got),
                                  "disk_bytes": max(g["disk_bytes"] for g in got)})  # fmt: skip
    rows = summary(measured, epochs)
    Console().print(rich_table("Training: on the fly and from a cache", COLUMNS, rows))
    write_result(out, {
        "target": target.name, "sequences": sequences, "tokens": measured["cached recipe"][0]["tokens"],
        "epochs": epochs, "repeats": repeats, "rows": rows, "measured": measured,
    })  # fmt: skip
    print(f"written: {out}")


def child(arguments: list[str]) -> dict:
    """One measurement in a process of its own; single-threaded operators, as the trainer's workers have."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", "--one", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def one(
    target: str, data: str, sequences: str, epochs: str, scratch: str, what: str, how: str = "", gb: str = "0"
) -> dict:  # fmt: skip
    """cache: write the features; train cached: train from them; train fly GB: our way, so much kept in memory."""
    from training.generate import load_sequences
    from training.initialisation import HeadShape, new_draft
    from training.settings import TrainSettings
    from training.target import TargetModel
    from training.trainer import Trainer

    from .cached_recipe import CachedPass

    layer_ids = layer_ids_of(Path(target))
    chosen = load_sequences(Path(data), 1.0)[: int(sequences)]
    model = TargetModel.from_pretrained(target, layer_ids)
    model = model.bfloat16()
    shape = HeadShape(depth=2, block_size=6, rank=64, draft_vocab=8192, layer_ids=layer_ids)
    settings = TrainSettings(steps=10**6, tokens_per_batch=1024, feature_cache_gb=float(gb))
    trainer = Trainer(model, new_draft(model, chosen, shape, 1), lambda: chosen, Path(scratch), settings)
    tokens = sum(sum(b.lengths) for b in trainer.batches)
    cache = CachedPass(Path(scratch) / "cache")
    if how == "cached":
        trainer.target_pass = trainer.batch_pass.target_pass = cache
        del model.layers
    reset_peak()
    began, taken, disk, loss = time.perf_counter(), {}, 0, None
    if what == "cache":
        disk = cache.write(trainer.target_pass, trainer.batches, trainer.workers)
        taken["cache_seconds"] = time.perf_counter() - began
    else:
        steps = int(epochs) * -(-len(trainer.batches) // settings.batches_per_step)
        for _ in range(steps):
            loss = trainer.step()["total"]
        taken["epoch_seconds"] = (time.perf_counter() - began) / int(epochs)
    return {**taken, "tokens": tokens, "peak_mb": peak_mb(), "disk_bytes": disk + 4 * tokens, "loss": loss}


def layer_ids_of(target: Path) -> tuple[int, ...]:
    from training.initialisation import default_layer_ids

    return default_layer_ids(int(json.loads((target / "config.json").read_text())["num_hidden_layers"]))


def reset_peak() -> None:
    """From here on VmHWM is the peak of what comes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:])))
    else:
        app()

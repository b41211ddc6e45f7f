"""Where a pass of the target or of the draft backbone spends its time: ONNX Runtime's own profile, summed by operator
or node.

    python -m benchmarks.profile_ops --bundle B [--engine target] [--case 1x1@128 ...] [--by op|node] [--threads 1]

A case RxQ@C is R requests that feed Q tokens each behind C cached ones. The runtime times every node, which itself
costs some microseconds a node: compare rows of one table, and take whole passes from `wall ms`, measured without the
profile.
Knows: the graphs' index tensors, through engines.pack. Refuses to know: models, schedules.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
import typer

from engines.base import additive_mask
from engines.bundle import Bundle, BundleError
from engines.onnxruntime import physical_cores, session_options
from engines.pack import pack_draft, pack_target
from engines.specs import masks_of

CASES = ("1x1@128", "1x7@128", "16x1@128", "16x4@128")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def parse_case(text: str) -> tuple[int, int, int]:
    """"RxQ@C" -> (R, Q, C). Raises ValueError, one sentence."""
    match = re.fullmatch(r"(\d+)x(\d+)@(\d+)", text)
    if not match or not (int(match[1]) and int(match[2])):
        raise ValueError(f"case is {text!r}; it must be RxQ@C, for example 16x4@128, with R and Q of 1 or more.")
    return int(match[1]), int(match[2]), int(match[3])


def feeds(bundle: Bundle, engine: str, R: int, Q: int, context: int) -> tuple[dict[str, np.ndarray], int]:
    """Random inputs of one pass by name, and the cache capacity they need. Q: tokens fed, or new context rows of the
    backbone."""
    G, rng = bundle.draft.block_size, np.random.default_rng(0)
    lengths = np.full(R, context, np.int64)
    if engine == "target":
        capacity = -(-(context + Q) // 64) * 64
        tokens = rng.integers(0, bundle.target.vocab_size, (R, Q)).tolist()
        batch = pack_target(tokens, lengths, np.full(R, Q, np.int64), capacity, bundle.max_context)[0]
    else:
        capacity = -(-(context + Q + G) // 64) * 64
        width = len(bundle.draft.layer_ids) * bundle.target.hidden_size
        features = [[rng.standard_normal((Q, width), dtype=np.float32)] for _ in range(R)]
        following, zeros = rng.integers(0, bundle.target.vocab_size, (R, Q)).tolist(), np.zeros(R, np.int64)
        counts = np.full(R, Q, np.int64)
        batch = pack_draft(bundle.draft, features, following, counts, lengths, zeros, capacity, bundle.max_context)
    masks = masks_of(bundle.engines[engine]).items()
    masks = {name: additive_mask(getattr(batch, name), dtype) for name, dtype in masks}
    return {**batch.__dict__, **masks}, capacity


def bind(session: ort.InferenceSession, values: dict[str, np.ndarray], rows: int, capacity: int) -> ort.IOBinding:
    """Caches as input and output on the same memory, as the engines bind them."""
    binding = session.io_binding()
    for node in session.get_inputs():
        if node.name.startswith("past_key_values."):
            shape = [{"R": rows, "C": capacity}.get(n, n) for n in node.shape]
            cache = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            binding.bind_ortvalue_input(node.name, cache)
            binding.bind_ortvalue_output(node.name.replace("past_key_values.", "present."), cache)
        else:
            binding.bind_cpu_input(node.name, np.ascontiguousarray(values[node.name]))
    for node in session.get_outputs():
        if not node.name.startswith("present."):
            binding.bind_output(node.name)
    return binding


def aggregate(events: list[dict], by: str, skip: int) -> list[tuple[str, int, float]]:
    """ONNX Runtime's trace -> (operator or node, nodes, us a pass), the dearest first; medians over the passes after
    `skip`."""
    durations, kind = defaultdict(list), {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            durations[name].append(event["dur"])
            kind[name] = event["args"]["op_name"]
    rows: dict[str, list] = defaultdict(lambda: [0, 0.0])
    for name, samples in durations.items():
        row = rows[kind[name] if by == "op" else f"{kind[name]} {name}"]
        row[0] += 1
        row[1] += float(np.median(samples[skip:] or samples))
    return sorted(((name, n, us) for name, (n, us) in rows.items()), key=lambda row: -row[2])


def measure(
    bundle: Bundle, engine: str, case: tuple[int, int, int], *, threads: int, passes: int, by: str
) -> tuple[float, list]:
    """(median ms of a pass without the profile, the profile's rows)."""
    values, capacity = feeds(bundle, engine, *case)
    path, rows, wall = str(bundle.folder / bundle.engines[engine].path), [], 0.0
    for profiled in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            options = session_options(threads, library=bundle.library)
            options.enable_profiling = profiled
            options.profile_file_prefix = str(Path(folder) / "trace")
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            binding, seconds = bind(session, values, case[0], capacity), []
            for _ in range(3 + passes):
                started = time.perf_counter()
                session.run_with_iobinding(binding)
                seconds.append(time.perf_counter() - started)
            if profiled:
                rows = aggregate(json.loads(Path(session.end_profiling()).read_text()), by, skip=3)
            else:
                wall = 1e3 * float(np.median(seconds[3:]))
    return wall, rows


@app.command()
def main(
    bundle: Annotated[Path, typer.Option(help="Folder that holds manifest.json.")],
    engine: Annotated[str, typer.Option(help="target or backbone.")] = "target",
    case: Annotated[
        list[str], typer.Option(help="RxQ@C: requests, tokens of each, cached tokens; may be repeated.")
    ] = list(CASES),
    by: Annotated[str, typer.Option(help="op: sum by operator; node: every node.")] = "op",
    threads: Annotated[int, typer.Option(help="Intra-op threads; 0 = the physical cores.")] = 0,
    passes: Annotated[int, typer.Option(help="Timed passes of each case.")] = 20,
    top: Annotated[int, typer.Option(help="Rows shown.")] = 15,
) -> None:
    """Profiles an engine's passes and prints where their time goes."""
    try:
        if engine not in ("target", "backbone") or by not in ("op", "node"):
            raise ValueError(f"engine is {engine!r} and by is {by!r}; they must be target or backbone, and op or node.")
        opened, cases = Bundle.load(bundle), [parse_case(text) for text in case]
        for text, parsed in zip(case, cases):
            wall, rows = measure(opened, engine, parsed, threads=threads or physical_cores(), passes=passes, by=by)
            total = sum(us for *_, us in rows)
            print(
                f"\n{engine} {text}: {wall:.2f} wall ms a pass, {sum(n for _, n, _ in rows)} nodes; "
                f"profiled {total / 1e3:.2f} ms"
            )
            for name, nodes, us in rows[:top]:
                print(f"  {name:44} {nodes:5} x {us / nodes:9.1f} us = {us / 1e3:8.3f} ms {us / total:6.1%}")
    except (ValueError, BundleError) as error:
        print(f"profile_ops: {error}")
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()

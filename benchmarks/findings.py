"""Tables that say whether a claim holds: what lagged is worth, gRPC, the host, calibration, accept rules, peers.

Knows: the result files and the claims with their bounds. Refuses to know: how a result is measured; it only states.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .cells import BASELINES, MODES, ratio
from .common import KINDS, Columns, markdown_table
from .scheduling import DECISIONS, HOST

LAGGED_BOUND, GRPC_BOUND, HOST_BOUND, ECE_BOUND = 0.97, 0.93, 0.08, 0.02
COMPARED = (8, 64, 256)  # requests whose decision times the page shows


def select(rows: Iterable[dict], *, path: str = "in_process", temperature: float = 0.0) -> list[dict]:
    """One path at one temperature, kinds in the repository's order, then levels, then modes."""
    kinds = list(KINDS)
    place = lambda kind: (kinds.index(kind) if kind in kinds else len(kinds), kind)
    found = [r for r in rows if r["path"] == path and r["temperature"] == temperature]
    return sorted(found, key=lambda r: (*place(r["kind"]), r["concurrency"], MODES.index(r["mode"])))


def cells_of(rows: Sequence[dict]) -> list[dict[str, dict]]:
    """For each kind and level, in the rows' order, {mode: row}."""
    found: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        found.setdefault((r["kind"], r["concurrency"]), {})[r["mode"]] = r
    return list(found.values())


def first(cell: dict[str, dict]) -> dict:
    return next(iter(cell.values()))


def throughput(rows: Sequence[dict]) -> str:
    """Total tok/s of every mode in process, with the ratio to none."""
    cells = cells_of(select(rows))
    modes = [m for m in MODES if any(m in cell for cell in cells)]
    show = lambda m: lambda cell: (
        "" if m not in cell else f"{cell[m]['total_tok_s']:.0f}{_times(cell[m]['ratio_to_none'] if m != 'none' else None)}"
    )
    columns = (*WHERE, *((m, show(m)) for m in modes))
    return markdown_table(columns, cells)


def latency(rows: Sequence[dict], mode: str = "lagged") -> str:
    """What users and the verifier see of one mode; none beside it where it is worth a comparison."""
    cells = [cell for cell in cells_of(select(rows)) if mode in cell]
    show = lambda name, digits, m=mode, factor=1: lambda cell: _number(cell.get(m, {}).get(name), digits, factor)
    columns = (
        *WHERE,
        ("tok/s a user", show("user_tok_s", 1)),
        ("none", show("user_tok_s", 1, "none")),
        ("TTFT ms", show("ttft_ms", 0)),
        ("none", show("ttft_ms", 0, "none")),
        ("ITL ms p50", show("itl_ms", 1)),
        ("p95", show("itl_p95_ms", 1)),
        ("acceptance length", show("acceptance_length", 2)),
        ("verified a round", show("verified_per_round", 2)),
        ("rejected %", show("rejected_share", 0, factor=100)),
        ("no draft %", show("no_draft_share", 0, factor=100)),
        ("host %", show("host_share", 1, factor=100)),
    )
    return markdown_table(columns, cells)


def claim(rows: Sequence[dict], mode: str = "lagged") -> tuple[str, str]:
    """(sentence, table): `mode` against the better of none and fixed, cell by cell, from one interleaved run each."""
    cells = [c for c in cells_of(select(rows)) if mode in c and c[mode]["ratio_to_best"] is not None]
    if not cells:
        return f"No run holds {mode}, none and fixed together.", ""
    best = lambda cell: max(BASELINES, key=lambda m: cell[m]["total_tok_s"])
    over = lambda cell: ratio(cell[mode], cell[best(cell)])
    columns = (
        *WHERE,
        ("none tok/s", lambda c: f"{c['none']['total_tok_s']:.1f}"),
        ("fixed tok/s", lambda c: f"{c['fixed']['total_tok_s']:.1f}"),
        (f"{mode} tok/s", lambda c: f"{c[mode]['total_tok_s']:.1f}"),
        ("better of the two", best),
        (f"{mode} / it", lambda c: f"{over(c)[0]:.3f}"),
        ("90% interval", lambda c: "{1:.2f} to {2:.2f}".format(*over(c))),
        (f">= {LAGGED_BOUND:g}", lambda c: _verdict(over(c)[0] >= LAGGED_BOUND)),
    )
    held, above = sum(over(c)[0] >= LAGGED_BOUND for c in cells), sum(over(c)[0] > 1 for c in cells)
    sure, under = sum(over(c)[1] > 1 for c in cells), sum(over(c)[2] < LAGGED_BOUND for c in cells)
    worst = min(cells, key=lambda c: over(c)[0])
    said = (
        f"`{mode}` is at least {LAGGED_BOUND:g} x the better of none and fixed in {held} of {len(cells)} cells, and faster than "
        f"both in {above} (in {sure} by the whole 90% interval; {under} cells lie wholly under {LAGGED_BOUND:g}); the lowest "
        f"ratio is {over(worst)[0]:.3f} ({first(worst)['kind']}, {_users(first(worst)['concurrency'])})."
    )
    return said, markdown_table(columns, cells)


def short(rows: Sequence[dict], mode: str = "lagged") -> str:
    """For the README: a row a number of users; for each kind tok/s of none and the ratios of fixed and `mode` to it."""
    by = {(first(c)["kind"], first(c)["concurrency"]): c for c in cells_of(select(rows)) if "none" in c}
    kinds, levels = list(dict.fromkeys(k for k, _ in by)), sorted({n for _, n in by})
    columns: list = [("users", str)]
    for kind in kinds:
        plain = lambda n, k=kind: _number(by.get((k, n), {}).get("none", {}).get("total_tok_s"), 0)
        times = lambda m: lambda n, k=kind: _number(by.get((k, n), {}).get(m, {}).get("ratio_to_none"), 2)
        columns += [(f"{kind}: none tok/s", plain), ("fixed", times("fixed")), (mode, times(mode))]
    return markdown_table(tuple(columns), levels)


def grpc(rows: Sequence[dict]) -> tuple[str, str]:
    """(sentence, table): through Triton against in process, next to each other."""
    found = [r for r in select(rows, path="grpc") if r.get("grpc_ratio") is not None]
    if not found:
        return "No run holds both paths.", ""
    columns = (
        ("kind", lambda r: r["kind"]),
        ("users", lambda r: str(r["concurrency"])),
        ("mode", lambda r: r["mode"]),
        ("gRPC tok/s", lambda r: f"{r['total_tok_s']:.1f}"),
        ("TTFT ms", lambda r: f"{r['ttft_ms']:.0f}"),
        ("ITL ms p50", lambda r: _number(r["itl_ms"], 1)),
        ("p95", lambda r: _number(r["itl_p95_ms"], 1)),
        ("/ in process", lambda r: f"{r['grpc_ratio']:.3f}"),
        (f">= {GRPC_BOUND:g}", lambda r: _verdict(r["grpc_ratio"] >= GRPC_BOUND)),
    )
    held, worst = sum(r["grpc_ratio"] >= GRPC_BOUND for r in found), min(found, key=lambda r: r["grpc_ratio"])
    said = (
        f"Through Triton the throughput is at least {GRPC_BOUND:g} x that of the loop in process in {held} of {len(found)} cells; the "
        f"lowest ratio is {worst['grpc_ratio']:.3f} ({worst['mode']}, {worst['kind']}, {_users(worst['concurrency'])})."
    )
    return said, markdown_table(columns, found)


def scheduling(result: dict) -> tuple[str, str]:
    """(sentence, tables): the time of a decision and the host's share of a round."""
    most = max(r["requests"] for r in result["decisions"])
    slow = max((r for r in result["decisions"] if r["requests"] == most), key=lambda r: r["median_us"])
    said = (
        f"One decision for {most} requests and {result['block_size']} slots takes at most {slow['median_us']:.0f} us (median; "
        f"{slow['scheduler']}): {_verdict(slow['median_us'] < result['bound_us'])} against the bound of {result['bound_us']:g} us."
    )
    body = markdown_table(DECISIONS, [r for r in result["decisions"] if r["requests"] in (*COMPARED, most)])
    if rows := result.get("host"):
        worst = max(rows, key=lambda r: r["host_share"])
        said += (
            f" Outside the engines a round spends at most {100 * worst['host_share']:.1f}% ({worst['mode']}, {worst['requests']} "
            f"requests): {_verdict(worst['host_share'] < HOST_BOUND)} against the bound of {100 * HOST_BOUND:g}%."
        )
        body += "\n\n" + markdown_table(HOST, rows)
    return said, body


def calibration(result: dict) -> tuple[str, str]:
    """(sentence, table): ECE of the running product by position on held-out rollouts."""
    mean, rows = lambda values: sum(values) / len(values), []
    parts = []
    for name in ("greedy", "sampled"):
        report = result["report"][name]
        raw, alone, after = (report[side] for side in ("before", "temperature_only", "after"))
        parts.append(
            f"{name}: mean ECE raw {100 * mean(raw['ece']):.2f}%, after {100 * mean(after['ece']):.2f}% "
            f"({_verdict(mean(after['ece']) < ECE_BOUND)} against {100 * ECE_BOUND:g}%; a perfect head would show "
            f"{100 * mean(after['noise']):.2f}% on {report['held_out']:,} rounds)"
        )
        bias = result.get("bias", {}).get(name, [0.0] * len(result[name]))
        for k, t in enumerate(result[name]):
            of = {"name": name, "position": k + 1, "temperature": t, "bias": bias[k], "raw": raw["ece"][k]}
            of |= {"alone": alone["ece"][k], "after": after["ece"][k], "low": after["ece_low"][k], "high": after["ece_high"][k]}
            rows.append(of | {"auc": after["auc"][k], "brier_raw": raw["brier"][k], "brier": after["brier"][k]})
    share = lambda name: lambda r: _number(r[name], 2, 100)
    columns = (
        ("requests", lambda r: r["name"]),
        ("position", lambda r: str(r["position"])),
        ("temperature", lambda r: f"{r['temperature']:.2f}"),
        ("bias", lambda r: f"{r['bias']:.2f}"),
        ("ECE % raw", share("raw")),
        ("temperatures alone", share("alone")),
        ("after", share("after")),
        ("90% interval", lambda r: f"{100 * r['low']:.2f} to {100 * r['high']:.2f}"),
        ("AUC", lambda r: _number(r["auc"], 3)),
        ("Brier raw", lambda r: _number(r["brier_raw"], 4)),
        ("after", lambda r: _number(r["brier"], 4)),
    )
    return "Calibration on held-out rollouts: " + "; ".join(parts) + ".", markdown_table(columns, rows)


PEERS: Columns = (
    ("engine", lambda r: f"{r['peer']} {r['version']}"),
    ("weights", lambda r: r["variant"]),
    ("schedule", lambda r: r["schedule"] or ""),
    ("streams", lambda r: str(r["streams"])),
    ("rounds", lambda r: str(r["runs"])),
    ("tok/s", lambda r: _number(r["total_tok_s"], 1)),
    ("after the first tokens", lambda r: _number(r["decode_tok_s"], 1)),
    ("/ our target alone at that precision", lambda r: _number(r["ratio_to_ours_same_precision"], 2)),
    ("/ our best", lambda r: _number(r["ratio_to_ours_best"], 2)),
)


def peers(rows: Sequence[dict]) -> str:
    """Other engines side by side with ours, by streams, each precision together, the fastest first."""
    return markdown_table(PEERS, sorted(rows, key=lambda r: (r["streams"], r["precision"], -r["total_tok_s"])))


WHERE: Columns = (("kind", lambda cell: first(cell)["kind"]), ("users", lambda cell: str(first(cell)["concurrency"])))


def _number(value: float | None, digits: int, factor: float = 1) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f" ({ratio:.2f})"



def _verdict(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _users(n: int) -> str:
    return f"{n} user{'s' * (n != 1)}"

"""Made-up rows of the throughput grid."""

from benchmarks.cells import MODES, PATHS, make_row, with_ratios


def grid(speeds: dict[str, list[float]], kinds=("maths", "chat"), levels=(1, 8), paths=PATHS[:1]) -> list[dict]:
    """speeds: total_tok_s of each repeat of a mode, in process; 0.9 of that through gRPC."""
    rows = []
    for kind in kinds:
        for users in levels:
            for path in paths:
                for mode in (m for m in MODES if m in speeds):
                    windows = [window(users * t * (1.0 if path == "in_process" else 0.9), users) for t in speeds[mode]]
                    cell = {"mode": mode, "kind": kind, "concurrency": users, "path": path, "temperature": 0.0}
                    rows.append({**make_row(cell, windows), "run": "r"})
    return with_ratios(rows)


def window(tok_s: float, users: int) -> dict:
    return {
        "total_tok_s": tok_s,
        "user_tok_s": tok_s / users,
        "ttft_ms": 50.0,
        "itl_ms": 10.0,
        "itl_p95_ms": 20.0,
        "acceptance_length": 1.5,
        "verified_per_round": 2.0,
        "rejected_share": 0.75,
        "host_share": 0.03,
        "no_draft_share": 0.1,
    }


META = {
    "machine": {"cpu": "a cpu", "cores": 2, "memory_gib": 8.0, "python": "3.11"},
    "bundle": {"target": "tiny", "dtype": "int8"},
    "runs": {
        "r": {"date": "2026-01-02T00:00", "command": "python -m benchmarks.bench", "max_tokens": 64, "repeats": 3, "seconds": 2.0}
    },
}

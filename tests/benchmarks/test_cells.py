"""build/bench.json: its form, what a later run replaces, ratios within one run."""

import json

import numpy as np
import pytest

from benchmarks.cells import MODES, REQUIRED, Grid, fingerprint, make_row, ratio, read

SAME = {"machine": {"cpu": "one", "cores": 2}, "bundle": {"engines_hash": "a"}}


def measured(tok_s: float, **more) -> dict:
    body = dict.fromkeys(REQUIRED, 1.0) | {"total_tok_s": tok_s, "itl_p95_ms": 2.0, "tokens": 100, "seconds": 1.0}
    return body | more


def row(mode: str, *tok_s: float, path: str = "in_process", users: int = 1, kind: str = "maths") -> dict:
    cell = {"mode": mode, "kind": kind, "concurrency": users, "path": path, "temperature": 0.0}
    return make_row(cell, [measured(t, **({"host_share": None} if path == "grpc" else {})) for t in tok_s])


def grid(path, date="2026-01-01", same=SAME, said=None) -> Grid:
    return Grid(path, same, {"date": date, "command": "c"}, say=(said if said is not None else []).append)


def test_a_row_holds_medians_their_spread_and_every_repeat():
    made = row("lagged", 10.0, 30.0, 20.0)
    assert made["total_tok_s"] == 20 and made["spread"]["total_tok_s"] == [10, 30] and made["repeats"] == [10, 30, 20]
    assert made["path"] == "in_process" and made["host_share"] == 1.0
    assert row("lagged", 1.0, path="grpc")["host_share"] is None


def test_the_splits_of_a_step_are_medians_too():
    windows = [measured(1, split_ms={"target": 4.0, "host": 1.0}), measured(1, split_ms={"target": 6.0})]
    made = make_row({"mode": "fixed"}, windows)
    assert made["split_ms"] == {"target": 5.0, "host": 0.5}


def test_the_file_is_a_plain_list_and_the_rest_lies_beside_it(tmp_path):
    file = tmp_path / "bench.json"
    grid(file).put([row("none", 10.0), row("fixed", 20.0)])
    rows, meta = json.loads(file.read_text()), json.loads((tmp_path / "bench.meta.json").read_text())
    assert isinstance(rows, list) and len(rows) == 2
    wanted = {"mode", "kind", "concurrency", "path", *REQUIRED}
    assert all(wanted <= set(r) for r in rows)
    assert meta["machine"] == SAME["machine"] and meta["bundle"] == SAME["bundle"] and len(meta["runs"]) == 1
    assert all(r["run"] in meta["runs"] for r in rows)


def test_ratios_are_medians_of_each_repeats_ratio(tmp_path):
    made = grid(tmp_path / "b.json").put([row("none", 10, 20, 40), row("fixed", 5, 30, 40), row("lagged", 20, 30, 44)])
    of = {r["mode"]: r for r in made}
    assert of["lagged"]["ratio_to_none"] == 1.5, "2, 1.5 and 1.1"
    assert of["lagged"]["ratio_to_best"] == 1.1, "fixed is better by its median: 4, 1 and 1.1"
    assert of["fixed"]["ratio_to_best"] == 1.0 and of["none"]["ratio_to_none"] == 1.0


def test_grpc_is_compared_with_the_same_cell_in_process(tmp_path):
    made = grid(tmp_path / "b.json").put([row("none", 10, 10), row("none", 9, 8, path="grpc")])
    assert made[1]["grpc_ratio"] == 0.85 and "grpc_ratio" not in made[0]
    assert made[1]["ratio_to_none"] == 1.0, "on its own path"
    assert made[0]["ratio_to_best"] is None, "fixed is missing"


def test_a_later_run_replaces_its_own_cells_only(tmp_path):
    file = tmp_path / "b.json"
    grid(file).put([row("none", 10), row("fixed", 20), row("none", 5, users=8)])
    second = grid(file, "2026-01-02")
    second.put([row("none", 40), row("lagged", 50)])
    rows, meta = read(file)
    of = {(r["mode"], r["concurrency"]): r for r in rows}
    assert of["none", 1]["total_tok_s"] == 40 and of["none", 8]["total_tok_s"] == 5 and len(rows) == 4
    assert of["lagged", 1]["ratio_to_none"] == 1.25
    assert of["lagged", 1]["ratio_to_best"] is None, "fixed is of another run: no ratio across runs"
    assert of["fixed", 1]["ratio_to_none"] is None
    assert len(meta["runs"]) == 2
    third = grid(file, "2026-01-03")
    third.put([row("none", 1), row("fixed", 1), row("lagged", 1), row("none", 1, users=8)])
    assert len(read(file)[1]["runs"]) == 1, "runs without rows are forgotten"


@pytest.mark.parametrize("changed", [{"bundle": {"engines_hash": "b"}}, {"machine": {"cpu": "other", "cores": 2}}])
def test_rows_of_another_bundle_or_machine_are_set_aside(tmp_path, changed):
    file, said = tmp_path / "b.json", []
    grid(file).put([row("none", 10), row("fixed", 20)])
    grid(file, "2026-01-02", SAME | changed, said).put([row("none", 1)])
    assert len(read(file)[0]) == 1 and len(said) == 1
    assert len(json.loads((tmp_path / "b.previous.json").read_text())) == 2


def test_a_file_of_another_form_counts_as_none(tmp_path):
    file = tmp_path / "b.json"
    file.write_text('{"rows": []}')
    assert read(file) == ([], {}) == read(tmp_path / "missing.json")


def test_rows_are_in_order(tmp_path):
    made = grid(tmp_path / "b.json")
    for users in (8, 1):
        made.put([row(mode, 1.0, path=path, users=users) for path in ("grpc", "in_process") for mode in MODES[::-1]])
    rows = read(tmp_path / "b.json")[0]
    assert [(r["concurrency"], r["path"]) for r in rows[::5]] == [
        (1, "in_process"), (1, "grpc"), (8, "in_process"), (8, "grpc")
    ]  # fmt: skip
    assert [r["mode"] for r in rows[:5]] == list(MODES)


def test_fingerprint_follows_the_engines():
    manifest = {
        "engines": {"target": {"sha256": "1"}},
        "target": {"name": "t", "hash": "h"},
        "draft": {"block_size": 6, "hash": "d"},
        "dtype": "int8",
    }
    one = fingerprint(manifest)
    assert fingerprint(manifest | {"created": "later"}) == one
    assert fingerprint(manifest | {"engines": {"target": {"sha256": "2"}}}) != one


def test_turns_are_compared_over_all_repeats_and_resampled_in_pairs():
    rng = np.random.default_rng(0)
    base = rng.uniform(80, 120, (3, 16))  # the requests and the machine's mood, which both have in common
    row = lambda turns: {"turns": turns.tolist(), "repeats": turns.mean(axis=1).tolist()}
    found, low, high = ratio(row(1.05 * base), row(base))
    assert found == pytest.approx(1.05) and low == pytest.approx(1.05) == high, "what is in common leaves no interval"
    noisy = base * rng.lognormal(0, 0.1, base.shape)
    found, low, high = ratio(row(noisy), row(base))
    assert low < found < high and 0.93 < low and high < 1.07
    slow = np.full((1, 4), 100.0)
    slow[0, 1] = 25.0  # four times as long for the same tokens: 7 turns' time for 4
    assert ratio(row(slow), row(np.full((1, 4), 100.0)))[0] == pytest.approx(4 / 7), "time counts, not the mean of rates"
    whole = {"repeats": [1.0, 2.0, 4.0]}
    assert ratio(whole, {"repeats": [1.0, 1.0, 1.0]}) == (2.0, 1.0, 4.0)
    assert ratio(row(base), whole)[0] == pytest.approx(np.median(base.mean(axis=1) / [1, 2, 4])), "one without turns"

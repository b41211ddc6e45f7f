import json
import shutil
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import engines
from engines import BundleError
from engines.__main__ import app
from engines.profile import Workload, even, measure, profile
from engines.sps import Sps


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "bundle")


def test_profile_stores_a_table_that_is_accepted_here(copy):
    loaded, told = engines.load(copy, threads=1), []
    sps = profile(loaded, requests=(1, 3), contexts=(16, 40), quick=True, seconds=0.5, progress=told.append)
    again = engines.load(copy, threads=1)
    table = Sps.of(again)
    assert again.bundle.sps == json.loads(json.dumps(sps)) and told == sorted(told) and 0 < told[-1] <= 1
    G = loaded.bundle.draft.block_size
    have = {(p["requests"], p["tokens"], p["context"]) for p in sps["target"]}
    assert {(r, r * (1 + n), c) for r in (1, 3) for n in range(G + 1) for c in (16, 40)} <= have
    every = sps["target"] + sps["draft"] + sps["padding"]
    assert all(0 < p["low"] <= p["ms"] <= p["high"] and p["samples"] >= 1 for p in every)
    padded = {(p["requests"], p["tokens"], p["slots"], p["context"]) for p in sps["padding"]}
    assert padded >= {(3, 3 + G, 3 * (1 + G), c) for c in (16, 40)}, "one whole block beside two requests without any"
    assert all(n < slots for _, n, slots, _ in padded) and 1 not in {r for r, *_ in padded}
    assert table.target_ms(2, 4, 20) > 0 and sps["threads"] == 1
    with pytest.raises(BundleError, match="threads"):
        Sps.of(engines.load(copy, threads=2))


def test_not_written_when_asked_not_to(copy):
    before = (copy / "manifest.json").read_text()
    assert profile(engines.load(copy, threads=1), write=False, requests=(1,), contexts=(16,), quick=True, seconds=0.1)
    assert (copy / "manifest.json").read_text() == before


def test_points_are_taken_in_rounds_not_one_after_the_other(loaded, monkeypatch):
    order, run = [], Workload.run
    monkeypatch.setattr(Workload, "run", lambda self, point: order.append(point) or run(self, point))
    measure(loaded, (1, 2), (16,), quick=True, seconds=0.1)
    decode = [p for p in order if p[0] == "draft" or p[2] <= p[1] * (1 + loaded.bundle.draft.block_size)]
    size = len(set(decode))
    rounds = [decode[i : i + size] for i in range(0, len(decode), size)]
    assert len(rounds) >= 4 and all(len(set(r)) == size for r in rounds)
    assert any(r != rounds[0] for r in rounds[1:])


def test_slow_minutes_are_taken_out_and_shapes_stay():
    rng = np.random.default_rng(0)
    true = {("target", n): 10.0 + n + 5 * (n > 12) for n in range(24)}
    order = [p for _ in range(8) for p in rng.permutation(list(true), axis=0)]
    order = [(kind, int(n)) for kind, n in order]
    mood = np.where((np.arange(len(order)) // 30) % 3 == 1, 1.7, 1.0)  # a third of the time it is slower by 70%
    taken = [(p, true[p] * m * rng.lognormal(0, 0.03)) for p, m in zip(order, mood)]
    found = {p: float(np.median(ms)) for p, ms in even(taken).items()}
    raw = {p: float(np.median([ms for q, ms in taken if q == p])) for p in true}
    error = lambda got: max(abs(np.log(got[p] / true[p])) for p in true)
    scale = np.median([found[p] / true[p] for p in true])
    assert error({p: ms / scale for p, ms in found.items()}) < 0.06 < error(raw)
    assert found["target", 13] - found["target", 12] > 4, "a jump is a jump"
    assert {p: len(ms) for p, ms in even(taken).items()} == dict.fromkeys(true, 8)


def test_a_context_longer_than_the_bundles_is_shortened(loaded):
    most = loaded.bundle.max_context
    sps = measure(loaded, (1,), (16, 10 * most), quick=True, seconds=0.1)
    assert sps["contexts"][0] == 16 and most - 20 < sps["contexts"][1] < most


def test_command(copy):
    run = lambda *args: CliRunner().invoke(app, ["profile", "--bundle", str(copy), "--threads", "1", *args])
    done = run("--quick", "--requests", "1,2", "--contexts", "16", "--seconds", "0.1")
    assert done.exit_code == 0 and "points of target + verify" in done.stdout
    assert (copy / "sps.png").stat().st_size > 10_000
    assert engines.load(copy).bundle.sps["requests"] == [1, 2]
    for bad in ("one,two", "0", "-1,4"):
        refused = run("--quick", "--requests", bad)
        assert refused.exit_code == 1 and refused.stderr.startswith("requests is") and refused.stderr.count("\n") == 1


def test_command_without_matplotlib(copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["--quick", "--requests", "1", "--contexts", "16", "--seconds", "0.1", "--threads", "1"]
    done = CliRunner().invoke(app, ["profile", "--bundle", str(copy), *options])
    assert done.exit_code == 0 and "matplotlib is not installed" in done.stderr and not (copy / "sps.png").exists()

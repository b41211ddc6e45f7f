import dataclasses
import json

import numpy as np
import pytest

from engines import BundleError
from engines.bundle import Bundle, update_manifest
from engines.sps import Sps, check, hardware

TARGET = [(1, 1, 100, 10.0), (1, 2, 100, 11.0), (1, 3, 100, 20.0), (1, 8, 100, 30.0), (2, 2, 100, 14.0), (2, 4, 100, 24.0)]
DRAFT = [(1, 100, 3.0), (2, 100, 4.0)]


def test_measured_points_are_met_and_between_them_is_a_line():
    sps = Sps.from_points(TARGET, DRAFT)
    assert [float(sps.target_ms(r, n, c)) for r, n, c, _ in TARGET] == [ms for *_, ms in TARGET]
    assert float(sps.target_ms(1, 5, 100)) == pytest.approx(20 + 2 * 2.0)
    assert sps.target_ms(1, np.array([[1, 2], [3, 8]]), 100).tolist() == [[10, 11], [20, 30]]
    assert sps.draft_ms(1, 100) == 3 and sps.draft_ms(2, 100) == 4


def test_beyond_the_table():
    sps = Sps.from_points(TARGET, DRAFT)
    assert float(sps.target_ms(1, 10, 100)) == pytest.approx(34)  # the last slope: 2 ms a token
    assert float(sps.target_ms(2, 8, 100)) == pytest.approx(24 + 30 - 22)  # the shape of the curve with fewer requests
    assert float(sps.target_ms(3, 4, 100)) == pytest.approx(24 + 24 - 22)  # the step from 1 to 2 requests goes on
    assert sps.draft_ms(4, 100) == pytest.approx(6) and sps.draft_ms(1, 9999) == 3


def test_a_jump_stays_at_its_batch_size():
    """Tiles of 4 tokens: the fifth token costs a tile, whoever it belongs to; so it does between measured requests."""
    tiles = lambda n: 10.0 * -(-n // 4)
    points = [(r, r * (1 + k), 64, tiles(r * (1 + k))) for r in (1, 4) for k in range(8)]
    sps = Sps.from_points(points, [(1, 64, 1.0), (4, 64, 1.0)])
    assert sps.target_ms(2, np.array([2, 3, 4, 5]), 64).tolist() == [10, 10, 10, 20]


def test_context_between_and_beyond():
    points = [(r, r * (1 + k), c, 5.0 + c / 100) for r in (1, 2) for k in range(3) for c in (100, 300)]
    sps = Sps.from_points(points, [(r, c, 1.0) for r in (1, 2) for c in (100, 300)])
    assert [float(sps.target_ms(1, 2, c)) for c in (50, 100, 200, 300, 500)] == pytest.approx([6, 6, 7, 8, 10])


def test_a_padded_slot_is_fitted_over_the_steps_with_uneven_blocks():
    sps = Sps.from_points(TARGET, DRAFT, padding=[(2, 3, 4, 100, 22.5 + 0.3), (2, 4, 10, 100, 24.0 + 1.2)])
    assert sps.pads and sps.slot_ms(2, 100) == pytest.approx((0.3 * 1 + 1.2 * 6) / (1 + 36))
    assert sps.slot_ms(1, 100) == 0, "one request has no padding"
    assert sps.others(2, 90) == pytest.approx((4.0, sps.slot_ms(2, 64)))
    free = Sps.from_points(TARGET, DRAFT)
    assert not free.pads and free.slot_ms(2, 100) == 0
    noise = Sps.from_points(TARGET, DRAFT, padding=[(2, 3, 4, 100, 18.0)])
    assert noise.slot_ms(2, 100) == 0, "never a gain"


def test_curve_is_target_ms_at_every_token():
    sps = Sps.from_points(TARGET, DRAFT)
    for most in (3, 20, 7):  # grows, and is kept
        np.testing.assert_allclose(sps.curve(2, most, 90)[: most + 1], sps.target_ms(2, np.arange(most + 1), 64))


def test_a_table_with_a_hole_is_refused():
    with pytest.raises(BundleError, match="holds no points; run make profile"):
        Sps.from_points([], [])
    with pytest.raises(BundleError, match="hole at requests 2, context 300"):
        Sps.from_points([*TARGET, (1, 1, 300, 9.0)], [*DRAFT, (1, 300, 1.0)])
    with pytest.raises(BundleError, match="hole for the draft at requests 2, context 100"):
        Sps.from_points(TARGET, DRAFT[:1])
    for bad in (float("nan"), 0.0, -1.0, float("inf"), None):
        with pytest.raises(BundleError, match="must be a positive number"):
            Sps.from_points([*TARGET, (1, 4, 100, bad)], DRAFT)


def table(bundle, G=None):
    G = G or bundle.draft.block_size
    point = lambda **keys: {**keys, "ms": 2.0, "low": 1.0, "high": 3.0, "samples": 5}
    return {
        "date": "2026-01-01T00:00:00+00:00", "command": "python -m engines profile", "hardware": hardware(), "threads": 1,
        "provider": "CPUExecutionProvider", "engines": {n: s.sha256 for n, s in bundle.engines.items()},
        "requests": [1, 4], "contexts": [64],
        "target": [point(requests=r, tokens=r * (1 + n), context=64) for r in (1, 4) for n in range(G + 1)],
        "draft": [point(requests=r, context=64) for r in (1, 4)],
        "padding": [point(requests=4, tokens=5, slots=8, context=64)],
    }  # fmt: skip


def test_of_reads_the_manifest(loaded):
    bundle = loaded.bundle
    try:
        loaded.bundle = dataclasses.replace(bundle, sps=table(bundle))
        sps = Sps.of(loaded)
        assert float(sps.target_ms(4, 8, 64)) == 2 and sps.has_confidence is bundle.draft.has_confidence
    finally:
        loaded.bundle = bundle


def broken(bundle, **change):
    return dataclasses.replace(bundle, sps={**table(bundle), **change})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hardware={"cpu": "Z80", "cores": 1}), "was taken on Z80 with 1 cores, this is"),
        (dict(threads=7), "was taken with threads 7, this is 1"),
        (dict(provider="CUDAExecutionProvider"), "was taken with provider 'CUDAExecutionProvider'"),
        (dict(engines={}), "was taken with another target engine"),
        (dict(requests=[1, 2, 4]), "hole at requests 2, tokens 2, context 64"),
        (dict(draft=[]), "hole for the draft at requests 1, context 64"),
        (dict(padding=[]), "hole for padded slots at requests 4, context 64"),
        (dict(target=7), "is not readable"),
        (dict(target=[{"requests": 1}]), "is not readable"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_foreign_or_broken_table_is_refused_in_one_sentence(loaded, change, message):
    with pytest.raises(BundleError, match=message) as caught:
        check(broken(loaded.bundle, **change), threads=1, provider="CPUExecutionProvider")
    text = str(caught.value)
    assert "make profile" in text and text.endswith(").") and text.count(". ") == 0


def test_a_missing_table_and_a_missing_or_bad_point_are_refused(loaded):
    go = lambda b: check(b, threads=1, provider="CPUExecutionProvider")
    with pytest.raises(BundleError, match="has no SPS table, which the schedulers causal and lagged need; run make profile"):
        go(dataclasses.replace(loaded.bundle, sps=None))
    whole = table(loaded.bundle)
    go(dataclasses.replace(loaded.bundle, sps=whole))
    for i in range(len(whole["target"])):
        with pytest.raises(BundleError, match="hole"):
            go(broken(loaded.bundle, target=whole["target"][:i] + whole["target"][i + 1 :]))
    for bad in (0, -1.0, float("nan"), None, "2"):
        with pytest.raises(BundleError, match="must be a positive number"):
            go(broken(loaded.bundle, target=[{**whole["target"][0], "ms": bad}, *whole["target"][1:]]))


def test_update_manifest_sets_keys_and_keeps_the_rest(bundle, tmp_path):
    file = tmp_path / "manifest.json"
    file.write_text((bundle / "manifest.json").read_text())
    before = json.loads(file.read_text())
    update_manifest(tmp_path, sps={"date": "now"})
    assert json.loads(file.read_text()) == {**before, "sps": {"date": "now"}} and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("values", [[1.0], [1.0] * 99, ["x"] * 4, [0.0] * 4, [-1.0] * 4, 3])
def test_temperatures_that_do_not_fit_are_refused(bundle, tmp_path, values):
    raw = json.loads((bundle / "manifest.json").read_text())
    G = raw["draft"]["block_size"]
    fine = [1.0 + k for k in range(G)]
    raw["calibration"] = {"greedy": fine, "sampled": fine}
    for part in bundle.iterdir():
        if part.name != "manifest.json":
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    assert Bundle.load(tmp_path).temperatures(True) == tuple(fine)
    update_manifest(tmp_path, calibration={"greedy": fine, "sampled": values if values != [1.0] * 99 else [1.0] * (G + 1)})
    with pytest.raises(BundleError, match="calibration.sampled is .* it must be"):
        Bundle.load(tmp_path)

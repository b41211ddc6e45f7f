"""The simulator against what can be said in closed form, and the scheduler's behaviour in it."""

import numpy as np
import pytest
from benchmarks import roofline, simulate, traces
from benchmarks.simulation import Traffic, simulate as run
from decoding.schedule import Fixed, NoDraft, make
from engines.sps import Sps


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """3,000 rounds in the file format of `python -m decoding record`, some at temperature 0."""
    rng, B = np.random.default_rng(5), 3000
    logits = rng.normal(0.0, 1.5, (B, 6)) - 0.2 * np.arange(6)
    accepted = np.cumprod(rng.random((B, 6)) < traces.sigmoid(logits), axis=1).sum(axis=1)
    request = np.arange(B) // 50
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.npz"
    np.savez(
        path, confidence_logits=logits.astype(np.float32), accepted=accepted.astype(np.int16), request=request,
        temperature=(request % 2).astype(np.float32), position=np.arange(B), kind=np.array(["maths", "code", "chat"])[request % 3],
    )  # fmt: skip
    return path


def flat(target_ms=10.0, draft_ms=2.0):
    """A table without load: a step costs the same whatever is in it."""
    target = [(r, n, c, target_ms) for r in (1, 64) for c in (16, 4096) for n in (r, 10_000)]
    return Sps.from_points(target, [(r, c, draft_ms) for r in (1, 64) for c in (16, 4096)])


def test_shifted_traces_reach_the_wanted_lengths_and_are_calibrated(rollouts):
    pool = traces.shifted(rollouts, 7)
    for kind, wanted in traces.PAPER_LENGTHS.items():
        assert pool.length(kind) == pytest.approx(wanted, abs=0.25)
    assert pool.confidence.shape[1] == 7 and traces.shifted(rollouts, 5).confidence.shape[1] == 5
    predicted = np.cumprod(pool.confidence, axis=1).sum(axis=1).mean()
    assert predicted == pytest.approx(pool.accepted.mean(), abs=0.15)


def test_recorded_traces_keep_what_was_accepted(rollouts):
    pool = traces.recorded(rollouts)
    with np.load(rollouts) as raw:
        assert pool.accepted.sum() == raw["accepted"][raw["temperature"] == 1].sum()
    softer = traces.recorded(rollouts, temperatures=np.full(6, 2.0))
    assert abs(softer.confidence - 0.5).mean() < abs(pool.confidence - 0.5).mean()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="record it"):
        traces.shifted(tmp_path / "none.npz", 7)
    np.savez(tmp_path / "odd.npz", accepted=np.zeros(3))
    with pytest.raises(ValueError, match="has no confidence_logits"):
        traces.shifted(tmp_path / "odd.npz", 7)


def test_plain_decoding_gives_a_token_a_step_and_user(rollouts):
    found = run(NoDraft, flat(), traces.recorded(rollouts), Traffic(users=8, prompt=32, answer=64), seconds=20)
    assert found["step_ms"] == pytest.approx(10.0) and found["verified_per_round"] == 0
    assert found["total_tok_s"] == pytest.approx(8 / 0.010, rel=0.05)


def test_fixed_gives_the_recorded_acceptance_length(rollouts):
    pool, traffic = traces.recorded(rollouts), Traffic(users=8, prompt=32, answer=64)
    found = run(Fixed, flat(), pool, traffic, seconds=20)
    assert found["acceptance_length"] == pytest.approx(1 + pool.accepted.mean(), rel=0.05)
    assert found["step_ms"] == pytest.approx(12.0, rel=0.01)
    assert found["rejected_share"] == pytest.approx(1 - pool.accepted.mean() / 6, abs=0.03)


def test_poisson_arrivals_below_the_capacity_are_all_served(rollouts):
    found = run(NoDraft, flat(), traces.recorded(rollouts), Traffic(rate=5.0, prompt=32, answer=32), seconds=45)
    assert found["waiting"] == 0 and found["requests"] == pytest.approx(5.0 * 30, rel=0.2)


def test_a_free_step_is_filled_and_a_dear_one_is_not(rollouts):
    pool, traffic = traces.shifted(rollouts, 7), Traffic(users=16, prompt=32, answer=64)
    for name in ("causal", "lagged"):
        free = run(lambda: make(name, sps=flat()), flat(), pool, traffic, seconds=5)
        target = [(r, n, c, 1.0 * n) for r in (1, 64) for c in (16, 4096) for n in (r, 10_000)]
        dear = Sps.from_points(target, [(r, c, 30.0) for r in (1, 64) for c in (16, 4096)])
        costly = run(lambda: make(name, sps=dear), dear, pool, traffic, seconds=5)
        assert free["verified_per_round"] > 6 and costly["verified_per_round"] < 4
        if name == "lagged":  # causal has paid for the draft when it decides
            assert costly["skipped_share"] > 0.8 and costly["verified_per_round"] < 1


def test_budgets_fall_with_load_and_lagged_keeps_up_with_the_best(rollouts):
    rows = [simulate.cell("Qwen3-8B", "H100", users, rollouts, 8.0, ("none", "fixed", "lagged")) for users in (1, 64, 256)]
    budgets = [row["lagged"]["verified_per_round"] for row in rows]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] - budgets[-1] > 1
    assert min(row["ratio"] for row in rows) > 0.9
    assert rows[0]["fixed"]["total_tok_s"] > 2 * rows[0]["none"]["total_tok_s"]


def test_roofline():
    card, dense, sparse = roofline.GPUS["H100"], roofline.MODELS["Qwen3-8B"], roofline.MODELS["DeepSeek-V4-Flash"]
    tokens = np.array([1, 8, 64, 512, 4096])
    for model in roofline.MODELS.values():
        ms = roofline.target_ms(card, model, 1, tokens, 1024)
        assert (np.diff(ms) >= 0).all() and roofline.capacity(roofline.GPUS["B200"], model, 1024) > 1
    reached = (sparse.touched(tokens) - sparse.dense) / (sparse.expert * sparse.experts)
    assert reached[0] == pytest.approx(6 / 256) and reached[2] == pytest.approx(1 - (1 - 6 / 256) ** 64)
    assert (dense.touched(tokens) == dense.dense).all()
    assert roofline.bucket(np.array([1, 3, 9, 65, 300, 600])).tolist() == [1, 4, 16, 80, 320, 640]


def test_pictures_and_file(rollouts, tmp_path):
    from typer.testing import CliRunner

    arguments = ["--only", "Qwen3-4B", "--users", "1,64", "--rates", "0.5", "--seconds", "2", "--rollouts", str(rollouts)]
    done = CliRunner().invoke(
        simulate.app, [*arguments, "--out", str(tmp_path / "s.json"), "--images", str(tmp_path / "images")]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "images" / "simulated-load.png").stat().st_size > 10_000
    assert (tmp_path / "images" / "simulated-pareto.png").is_file()


def test_the_shipped_rounds_are_whole_requests_at_temperature_1(rollouts, tmp_path):
    traces.pack(rollouts, tmp_path / "small.npz", most=600)
    logits, accepted, kind = traces.load(tmp_path / "small.npz")
    assert len(logits) == 600 and set(kind) == {"maths", "code", "chat"} and accepted.max() <= 6

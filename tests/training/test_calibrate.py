import json

import numpy as np
import pytest

from training.calibrate import GRID, calibrate, fit, groups, measure, split, table, write
from training.reliability import curve, draw
from training.rollouts import Rollouts, read_rollouts
from training.scores import auc, brier, ece, sigmoid, survival

META = {"draft_hash": "d" * 64, "target_hash": "t" * 64, "bundle": "synthetic"}


def synthetic(rounds, temperatures, bias=None, *, seed=0, greedy_share=0.0, spread=1.6, per_request=20):
    """Rounds whose slot k is accepted, given those before, with chance sigmoid(z_k / temperatures[k] + bias[k])."""
    rng = np.random.default_rng(seed)
    G = len(temperatures)
    z = rng.normal(0.8, spread, (rounds, G))
    chance = sigmoid(z / np.array(temperatures) + (0.0 if bias is None else np.array(bias)))
    accepted = np.cumprod(rng.random((rounds, G)) < chance, axis=1).sum(axis=1)
    request = np.arange(rounds) // per_request
    greedy = np.random.default_rng(seed + 1).random(request.max() + 1) < greedy_share
    return Rollouts(z, accepted, np.where(greedy[request], 0.0, 1.0), request, META, np.full(rounds, "maths"))


# -- measures against hand-computed values ---------------------------------------------------------------------------


def test_ece_of_equal_width_bins_by_hand():
    predicted = np.array([0.12, 0.18, 0.55, 1.0])
    observed = np.array([0, 1, 1, 1])
    # bin 0.1..0.2: |0.30 - 1| ; bin 0.5..0.6: |0.55 - 1| ; the last bin: |1 - 1| ; all over 4 rounds
    assert ece(predicted, observed, "width") == pytest.approx((0.70 + 0.45 + 0.0) / 4)


def test_ece_of_equal_mass_bins_by_hand():
    predicted = np.repeat(np.linspace(0.02, 0.86, 15), 2)  # 15 bins of two equal predictions
    observed = np.tile([0, 1], 15)
    assert ece(predicted, observed) == pytest.approx(np.abs(np.linspace(0.02, 0.86, 15) - 0.5).mean())
    shuffled = np.random.default_rng(0).permutation(30)
    assert ece(predicted[shuffled], np.full(30, 1.0)) == pytest.approx(1 - predicted.mean())


def test_ece_with_fewer_rounds_than_bins_and_many_at_once():
    assert ece(np.array([0.25, 0.75]), np.array([0, 1])) == pytest.approx(0.25)
    table = np.array([[0.25, 0.75], [0.0, 1.0]])
    np.testing.assert_allclose(ece(table, np.array([0, 1])), [0.25, 0.0])
    np.testing.assert_allclose(ece(table, np.array([0, 1]), "width"), [0.25, 0.0])


def test_auc_by_hand():
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == pytest.approx(0.75)
    assert auc(np.array([0.5, 0.5, 0.5]), np.array([1, 0, 0])) == pytest.approx(0.5)
    assert auc(np.array([0.9, 0.1]), np.array([0, 1])) == 0.0
    assert np.isnan(auc(np.array([0.5, 0.6]), np.array([1, 1])))


def test_brier_by_hand():
    assert brier(np.array([0.2, 0.9]), np.array([0, 1])) == pytest.approx((0.04 + 0.01) / 2)


def test_survival_is_the_running_product():
    np.testing.assert_allclose(survival(np.array([[0.0, 2.0]]), [1.0, 2.0]), [[0.5, 0.5 * sigmoid(1.0)]])
    assert sigmoid(np.array([-1e4, 1e4])).tolist() == [0.0, 1.0]


# -- the fit ---------------------------------------------------------------------------------------------------------


def test_known_temperatures_are_found_again():
    true = [2.0, 0.5, 1.5]
    temperatures, bias = fit(synthetic(60_000, true))
    np.testing.assert_allclose(np.log(temperatures), np.log(true), atol=0.2)
    assert not bias.any()


def test_a_known_bias_is_found_again_beside_the_temperature():
    temperatures, bias = fit(synthetic(60_000, [1.5, 0.8], [-0.6, 0.5]), offset=True)
    np.testing.assert_allclose(np.log(temperatures), np.log([1.5, 0.8]), atol=0.2)
    np.testing.assert_allclose(bias, [-0.6, 0.5], atol=0.1)


def test_calibration_repairs_rounds_that_it_was_not_fitted_on():
    fitted, held_out = split(synthetic(40_000, [2.5, 2.0, 0.4]))
    before, after = measure(held_out, np.ones(3), draws=20), measure(held_out, *fit(fitted), draws=20)
    assert min(before["ece"]) > 0.04
    assert max(after["ece"]) < 0.015
    assert after["brier"][0] < before["brier"][0]


def test_calibrated_logits_stay_as_they_are():
    temperatures, bias = fit(synthetic(20_000, [1.0, 1.0, 1.0]), offset=True)
    np.testing.assert_allclose(np.log(temperatures), 0.0, atol=0.15)
    np.testing.assert_allclose(bias, 0.0, atol=0.1)


def test_a_constant_logit_keeps_temperature_one():
    """A draft without a confidence head: the logit is 20 everywhere, the chance is 1 at any temperature of the grid."""
    rollouts = synthetic(1000, [1.0, 1.0])
    temperatures, _ = fit(Rollouts(np.full((1000, 2), 20.0), np.full(1000, 2), rollouts.temperature, rollouts.request, META, rollouts.kind))
    assert temperatures.tolist() == [1.0, 1.0]


def test_a_position_with_hardly_a_survivor_is_left_alone():
    temperatures, bias = fit(synthetic(4000, [1.0, 1.0], [-0.5, -7.0]), offset=True)
    assert (temperatures[1], bias[1]) == (1.0, 0.0) and bias[0] < -0.3


def test_each_position_is_fitted_on_the_already_calibrated_prefix():
    """Slot 2's temperature undoes what is left of slot 1: with slot 1 left raw it comes out elsewhere."""
    rollouts = synthetic(60_000, [3.0, 1.0])
    sequential, _ = fit(rollouts)
    raw_prefix = sigmoid(rollouts.logits[:, 0])
    errors = ece(raw_prefix * sigmoid(rollouts.logits[:, 1] / GRID[:, None]), rollouts.survived[:, 1])
    assert abs(np.log(sequential[1])) < 0.15
    assert abs(np.log(GRID[np.argmin(errors)])) > 0.5


def test_what_comes_later_does_not_change_what_was_fitted():
    rollouts = synthetic(20_000, [2.0, 0.5, 1.5])
    first_two = Rollouts(rollouts.logits[:, :2], np.minimum(rollouts.accepted, 2), rollouts.temperature, rollouts.request, META, rollouts.kind)
    np.testing.assert_array_equal(fit(rollouts)[0][:2], fit(first_two)[0])


def test_split_is_by_request():
    fitted, held_out = split(synthetic(5000, [1.0, 1.0]), seed=3)
    assert not set(fitted.request) & set(held_out.request)
    assert len(fitted) + len(held_out) == 5000
    assert abs(len(set(fitted.request)) - len(set(held_out.request))) <= 1


def test_groups_are_sampled_and_greedy():
    parts = groups(synthetic(4000, [1.0], greedy_share=0.5))
    assert (parts["sampled"].temperature > 0).all() and (parts["greedy"].temperature == 0).all()
    assert len(parts["sampled"]) + len(parts["greedy"]) == 4000


# -- the report ------------------------------------------------------------------------------------------------------


def test_a_perfect_predictor_lies_at_its_noise_floor():
    measured = measure(synthetic(8000, [1.0, 1.0]), np.ones(2))
    for k in range(2):
        assert measured["ece"][k] < 1.6 * measured["noise_high"][k]
        assert measured["ece_low"][k] < measured["ece_high"][k]
    assert measured["noise"][0] > measured["noise"][1] * 0.5


def test_result_has_the_manifest_keys_and_can_be_drawn(tmp_path):
    rollouts = synthetic(8000, [2.0, 1.5], [-0.5, 0.0], greedy_share=0.5)
    result = calibrate(rollouts, command="test")
    assert {"date", "command", "draft_hash", "target_hash", "rounds", "sampled", "greedy", "bias", "ece_before", "ece_after"} <= set(result)
    assert len(result["sampled"]) == len(result["bias"]["greedy"]) == 2
    assert all(np.mean(result["ece_after"][name]) < np.mean(result["ece_before"][name]) for name in ("sampled", "greedy"))
    assert "Temperatures alone leave an offset at position 1" in result["report"]["sampled"]["finding"]
    assert "position" in table(result)
    write(result, tmp_path / "calibration.json")
    assert json.loads((tmp_path / "calibration.json").read_text()) == result
    draw(rollouts, result, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_without_an_offset_there_is_no_bias():
    result = calibrate(synthetic(4000, [2.0, 1.5], greedy_share=0.5), offset=False)
    assert "bias" not in result
    assert result["report"]["greedy"]["temperature_only"] == result["report"]["greedy"]["after"]


def test_curve_has_the_means_of_equal_mass_bins():
    predicted, observed = curve(np.arange(30) / 30, np.arange(30) >= 15)
    assert len(predicted) == 15 and predicted[0] == pytest.approx(1 / 60)
    assert observed.tolist() == [0.0] * 7 + [0.5] + [1.0] * 7


# -- bad input -------------------------------------------------------------------------------------------------------


def good(**changes):
    B = 6
    arrays = {
        "confidence_logits": np.zeros((B, 3), np.float32), "accepted": np.zeros(B, np.int16), "temperature": np.zeros(B, np.float32),
        "request": np.zeros(B, np.int32), "position": np.zeros(B, np.int32), "kind": np.full(B, "chat"), "meta": np.array(json.dumps(META)),
    }  # fmt: skip
    arrays.update(changes)
    return {name: value for name, value in arrays.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"accepted": None}, "holds no 'accepted'"),
        ({"accepted": np.full(6, 4, np.int16)}, "accepted lies in 4..4; it must lie in 0..3"),
        ({"accepted": np.zeros(5, np.int16)}, "different lengths"),
        ({"confidence_logits": np.zeros(6, np.float32)}, "it must be of rank 2"),
        ({"confidence_logits": np.full((6, 3), np.nan, np.float32)}, "every logit must be finite"),
        ({"temperature": np.full(6, -1.0)}, "temperature holds -1.0"),
        ({"meta": np.array("{}")}, "lacks draft_hash"),
        ({"meta": np.array("nonsense")}, "lacks draft_hash"),
        ({"meta": np.array('{"draft_hash": 1, "target_hash": "t"}')}, "both must be texts"),
    ],
)
def test_rollouts_that_do_not_fit_are_refused(tmp_path, changes, sentence):
    np.savez(tmp_path / "r.npz", **good(**changes))
    with pytest.raises(ValueError, match=sentence) as error:
        read_rollouts(tmp_path / "r.npz")
    assert "\n" not in str(error.value)


def test_files_that_are_no_rollouts_are_refused(tmp_path):
    np.savez(tmp_path / "r.npz", **good())
    assert len(read_rollouts(tmp_path / "r.npz")) == 6
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "r.npz").read_bytes()[:200])
    for name in ("text.npz", "cut.npz"):
        with pytest.raises(ValueError, match="is not an npz of rollouts"):
            read_rollouts(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_rollouts(tmp_path / "none.npz")


def test_too_few_rounds_or_one_temperature_only_are_refused():
    with pytest.raises(ValueError, match="each half needs 200 or more"):
        calibrate(synthetic(300, [1.0], greedy_share=0.5))
    with pytest.raises(ValueError, match="rounds at temperature 0 in the two halves"):
        calibrate(synthetic(4000, [1.0]))

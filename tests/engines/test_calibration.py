import json
import shutil

import pytest
from typer.testing import CliRunner

from engines.__main__ import app
from engines.bundle import Bundle, BundleError, update_manifest
from engines.calibration import store

G = 4


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def fitted(folder, **changes):
    b = Bundle.load(folder)
    calibration = {
        "date": "2026-01-01T00:00:00+00:00", "command": "test", "draft_hash": b.draft.hash, "target_hash": b.target.hash, "rounds": 1000,
        "sampled": [1.5, 1.0, 0.8, 1.0], "greedy": [0.7, 1.0, 1.0, 2.0], "bias": {"sampled": [-0.4, 0.0, 0.1, 0.0], "greedy": [0.2, 0, 0, 0]},
        "ece_before": {"sampled": [0.1] * G, "greedy": [0.1] * G}, "ece_after": {"sampled": [0.01] * G, "greedy": [0.01] * G},
        "report": {"much": "more"},
    }  # fmt: skip
    calibration.update(changes)
    return {key: value for key, value in calibration.items() if value is not None}


def written(folder, file, **changes):
    file.write_text(json.dumps(fitted(folder, **changes)))
    return file


def test_a_fresh_bundle_leaves_confidence_as_it_is(bundle):
    b = Bundle.load(bundle)
    assert b.calibration is None
    assert b.temperatures(True) == b.temperatures(False) == (1.0,) * G
    assert b.biases(True) == b.biases(False) == (0.0,) * G


def test_stored_and_read_again_without_the_report(copy, tmp_path):
    store(copy, written(copy, tmp_path / "c.json"))
    b = Bundle.load(copy)
    assert b.temperatures(True) == (1.5, 1.0, 0.8, 1.0) and b.temperatures(False) == (0.7, 1.0, 1.0, 2.0)
    assert b.biases(True) == (-0.4, 0.0, 0.1, 0.0) and b.biases(False) == (0.2, 0, 0, 0)
    assert "report" not in b.calibration
    assert not [p for p in copy.iterdir() if "partial" in p.name]


def test_without_biases_they_are_zero(copy, tmp_path):
    store(copy, written(copy, tmp_path / "c.json", bias=None))
    assert Bundle.load(copy).biases(True) == (0.0,) * G and Bundle.load(copy).temperatures(True)[0] == 1.5


def test_the_old_key_stands_for_both(copy):
    update_manifest(copy, confidence_temperatures=[2.0] * G)
    b = Bundle.load(copy)
    assert b.temperatures(True) == b.temperatures(False) == (2.0,) * G


BAD = {
    "calibration.sampled is [1.0]": dict(sampled=[1.0]),
    "calibration.greedy is [1, 1, 0, 1], it must be 4 positive numbers": dict(greedy=[1, 1, 0, 1]),
    "calibration.sampled is [1, 1, -2, 1]": dict(sampled=[1, 1, -2, 1]),
    "calibration.sampled is ['a', 1, 1, 1]": dict(sampled=["a", 1, 1, 1]),
    "calibration.sampled is [nan": dict(sampled=[float("nan"), 1, 1, 1]),
    "calibration.greedy is None": dict(greedy=None),
    "calibration.bias.greedy is [0.0]": dict(bias={"sampled": [0.0] * G, "greedy": [0.0]}),
    "calibration.bias.sampled is [inf": dict(bias={"sampled": [float("inf")] * G, "greedy": [0.0] * G}),
    "calibration.bias.greedy is 3": dict(bias=3),
    "fitted for the draft aaaaaaaaaaaa": dict(draft_hash="a" * 64),
    "fitted for the target bbbbbbbbbbbb": dict(target_hash="b" * 64),
}


@pytest.mark.parametrize("message", BAD)
def test_a_calibration_that_does_not_fit_is_refused_on_loading(copy, message):
    update_manifest(copy, calibration=fitted(copy, **BAD[message]))
    with pytest.raises(BundleError) as error:
        Bundle.load(copy)
    assert message in str(error.value) and "make calibrate" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("message", sorted(set(BAD) - {"calibration.greedy is None", "calibration.bias.greedy is 3"}))
def test_and_before_it_is_stored(copy, tmp_path, message):
    before = (copy / "manifest.json").read_text()
    file = written(copy, tmp_path / "c.json", **BAD[message])
    with pytest.raises(BundleError) as error:
        store(copy, file)
    assert message in str(error.value) and str(file) in str(error.value)
    assert (copy / "manifest.json").read_text() == before


def test_files_that_are_no_calibration_are_refused(copy, tmp_path):
    file = tmp_path / "c.json"
    with pytest.raises(BundleError, match="not a readable calibration"):
        store(copy, file)
    for text, sentence in (("{", "not a readable calibration"), ("[]", "lacks the key 'date'"), ("{}", "lacks the key 'date'")):
        file.write_text(text)
        with pytest.raises(BundleError, match=sentence):
            store(copy, file)
    with pytest.raises(BundleError, match="lacks the key 'greedy'"):
        store(copy, written(copy, file, greedy=None))
    update_manifest(copy, calibration=[1])
    with pytest.raises(BundleError, match="it must be an object"):
        Bundle.load(copy)


def test_the_command(copy, tmp_path):
    arguments = ["calibrate", "--bundle", str(copy), "--calibration"]
    good = CliRunner().invoke(app, [*arguments, str(written(copy, tmp_path / "c.json"))])
    assert good.exit_code == 0 and "1,000 rounds" in good.output
    bad = CliRunner().invoke(app, [*arguments, str(written(copy, tmp_path / "d.json", sampled=[1]))])
    assert bad.exit_code == 1 and "calibration.sampled is [1]" in bad.output

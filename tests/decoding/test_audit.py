import json

import numpy as np
import pytest
from typer.testing import CliRunner

from decoding import audit as audits
from decoding.__main__ import app
from decoding.audit import Effort, audit, default_answers
from decoding.checks import verdict

SMALL = Effort(batches=(1, 3), prompts=4, tokens=12, samples=200, sample_tokens=8)


class Broken:
    """The real engines with a verify whose batch is changed."""

    verify_rows = None
    pass_limits = None

    def __init__(self, engines, **changes):
        self.engines, self.changes = engines, changes

    def __getattr__(self, name):
        return getattr(self.engines, name)

    def verify(self, batch):
        changed = {name: change(getattr(batch, name)) for name, change in self.changes.items()}
        return self.engines.verify(type(batch)(**{**batch.__dict__, **changed}))


def run(engines, schedules=("fixed", "threshold")):
    return list(audit(engines, default_answers(engines, None), schedules, SMALL))


def test_a_sound_bundle_passes(tiny):
    checks = run(tiny)
    ok, sentence = verdict(checks)
    assert ok and sentence.startswith("Lossless: fixed, threshold ")
    names = [(c.name, c.schedule) for c in checks if c.schedule]
    equality = [(n, s) for n in ("greedy equality", "coupled equality") for s in ("fixed", "threshold")]
    assert names == [*equality, *(("sampled tokens", s) for s in ("none", "fixed", "threshold"))]
    sampled = next(c for c in checks if (c.name, c.schedule) == ("sampled tokens", "fixed"))
    assert sampled.figures["tokens"] == 200 * 8 and 1 < sampled.figures["acceptance_length"] < 5
    assert [c.status for c in checks if c.name == "SPS table"] == ["warn"]


@pytest.mark.parametrize(
    "changes, caught",
    [
        (dict(accept_uniforms=np.zeros_like), {"sampled tokens"}),
        (dict(noise=lambda n: np.repeat(n[:1], len(n), axis=0)), {"coupled equality"}),
        (dict(draft_tokens=np.zeros_like), {"greedy equality", "coupled equality", "sampled tokens"}),
    ],
    ids=["accepts everything", "noise of another position", "wrong tokens judged"],
)
def test_a_broken_verify_engine_fails(tiny, changes, caught):
    checks = run(Broken(tiny, **changes), ("fixed",))
    assert {c.name for c in checks if c.status == "fail"} >= caught and not verdict(checks)[0]


def test_load_aware_schedules_without_a_table(tiny):
    """Left out with a warning when nobody asked for them, a failure when somebody did."""
    assert [c.status for c in run(tiny, None) if c.name == "schedule"] == ["warn", "warn"]
    checks = run(tiny, ("lagged",))
    assert [c.status for c in checks if c.schedule == "lagged"] == ["fail"] and not verdict(checks)[0]


def test_command(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(audits, "QUICK", SMALL)
    file = tmp_path / "audit.json"
    arguments = ["audit", "--bundle", str(tiny.bundle.folder), "--quick", "--threads", "1", "--json", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--schedules", "fixed", "--requests", "2,5"])
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["ok"] and "batches 2, 5" in next(
        c["detail"] for c in written["checks"] if c["name"] == "greedy equality"
    )
    for more in (["--requests", "0"], ["--requests", "x"], ["--schedules", "fastest"]):
        assert CliRunner().invoke(app, [*arguments, *more]).exit_code == 2

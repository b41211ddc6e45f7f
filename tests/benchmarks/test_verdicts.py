"""Every kind of verify batch runs on a real (tiny) bundle and is written."""

import json

from typer.testing import CliRunner

from benchmarks.verdicts import KINDS, app
from tests.bundles import tiny_bundle


def test_every_kind_is_timed(tmp_path):
    out = tmp_path / "verdicts.json"
    bundle = tiny_bundle(tmp_path / "tiny", draft_vocab=40)
    result = CliRunner().invoke(app, ["--bundle", str(bundle), "--requests", "1,3", "--rounds", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [(r["requests"], r["kind"]) for r in rows] == [(n, k) for n in (1, 3) for k in KINDS]
    assert all(r["ms"] > 0 for r in rows)

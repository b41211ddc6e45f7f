"""A draft in another trainer's layout gives the same bundle, whether or not its anchor's slot drafts."""

import io
import json

import pytest
from rich.console import Console

from export.__main__ import export
from tests.tiny import make_draft, make_target
from training.formats.layouts import convert

silent = Console(file=io.StringIO())


@pytest.fixture
def target(tmp_path):
    return make_target(tmp_path / "target", family="qwen3")


@pytest.mark.parametrize("layout, pruned", [("specforge", None), ("modelopt", None), ("speculators", 24)])
def test_the_bundle_is_the_same_whatever_the_layout(layout, pruned, target, tmp_path):
    draft = make_draft(tmp_path / "draft", target, draft_vocab=pruned)
    convert(draft, tmp_path / layout, layout)
    made = []
    for folder in (draft, tmp_path / layout):
        export(target, folder, tmp_path / "out" / folder.name, console=silent, parity=False)
        made.append(json.loads((tmp_path / "out" / folder.name / "manifest.json").read_text()))
    hashes = [{n: (e["sha256"], e.get("data_sha256")) for n, e in m["engines"].items()} for m in made]
    assert hashes[0] == hashes[1]
    assert {k: v for k, v in made[0]["draft"].items() if k != "hash"} == {
        k: v for k, v in made[1]["draft"].items() if k != "hash"
    }


@pytest.mark.parametrize("layout", ["specforge", "modelopt", "speculators"])
def test_a_block_whose_anchor_drafts_nothing(layout, target, tmp_path):
    """DFlash's: a slot more in the backbone, and nowhere else."""
    draft = make_draft(tmp_path / "draft", target, rank=0, confidence=None, block_size=4, sample_from_anchor=False)
    convert(draft, tmp_path / layout, layout)
    export(target, tmp_path / layout, tmp_path / "bundle", console=silent)
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["draft"]["block_size"] == 4 and manifest["draft"]["sample_from_anchor"] is False
    shapes = {
        (name, t["name"]): t["shape"] for name, e in manifest["engines"].items() for t in e["inputs"] + e["outputs"]
    }
    assert shapes["backbone", "block_position_ids"] == ["R", 5] and shapes["backbone", "mask"] == ["R", 1, 5, "C"]
    assert shapes["backbone", "hidden"][1] == shapes["markov", "draft_tokens"][1] == 4
    assert shapes["verify", "row_index"] == ["R", 5]

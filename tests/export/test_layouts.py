"""A draft in another trainer's layout gives the same bundle; one that the compiled block cannot draft with is
refused."""

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


def test_a_block_whose_anchor_drafts_nothing_is_refused(target, tmp_path):
    draft = make_draft(tmp_path / "draft", target, rank=0, confidence=None)
    raw = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(raw | {"sample_from_anchor": False}))
    with pytest.raises(ValueError, match="sample_from_anchor false; the compiled block drafts from the anchor's slot."):
        export(target, draft, tmp_path / "bundle", console=silent, parity=False)
    assert not (tmp_path / "bundle").exists()

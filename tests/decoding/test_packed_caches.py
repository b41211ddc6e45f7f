"""Caches of a bundle whose attention works on packed rows: as long as the rows need, no longer, and the texts stay the same."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

import engines
from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from decoding.schedule import Fixed, NoDraft
from export.__main__ import export
from tests.kernels import kernels
from tests.tiny import make_draft, make_target

LENGTHS = (225, 8, 20, 3, 40, 38, 12)  # with a prompt of 40 beside it 225 passes 256


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """{whether it says that its attention is packed: the bundle}: an older one does not."""
    kernels()
    folder = tmp_path_factory.mktemp("packed")
    target = make_target(folder / "target", head_dim=32)
    draft = make_draft(folder / "draft", target)
    export(target, draft, folder / "new", dtype="int8", max_context=512, kernels="native", parity=False, console=Console(file=io.StringIO()))
    shutil.copytree(folder / "new", folder / "old")
    manifest = json.loads((folder / "old" / "manifest.json").read_text())
    assert manifest["kernels"].pop("attention") == ["target", "backbone"]
    (folder / "old" / "manifest.json").write_text(json.dumps(manifest))
    return {True: folder / "new", False: folder / "old"}


def run(bundle, scheduler):
    """(texts, the longest capacity of either cache)."""
    opened, rng = engines.load(bundle, threads=1), np.random.default_rng(0)
    loop, texts, most = Loop(opened, scheduler, max_requests=3, token_budget=64), {}, 0
    for i, n in enumerate(LENGTHS):
        prompt = tuple(rng.integers(0, 60, n).tolist())
        loop.add(Request(i, prompt, SamplingParams(max_tokens=3 if i else 12, ignore_eos=True)))
    while loop.has_work:
        for output in loop.step():
            assert output.error is None
            texts.setdefault(output.request_id, []).extend(output.token_ids)
        most = max(most, opened.target_capacity, opened.draft_capacity)
    opened.close()
    return texts, most


def test_packed_rows_need_no_room_for_empty_slots(bundles):
    texts = {}
    for packed, bundle in bundles.items():
        for name, scheduler in (("none", NoDraft()), ("fixed", Fixed())):
            texts[packed, name], most = run(bundle, scheduler)
            assert most == 256 if packed else most > 256, (packed, name)
    want = texts[True, "none"]
    assert len(want) == len(LENGTHS) and all(text == want for text in texts.values())


def test_attention_that_is_no_list_of_names_is_refused(bundles, tmp_path):
    shutil.copytree(bundles[True], tmp_path / "bundle")
    file = tmp_path / "bundle" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["kernels"]["attention"] = ["target", 3]
    file.write_text(json.dumps(manifest))
    with pytest.raises(engines.BundleError, match="kernels: attention holds 3, it must hold names of engines"):
        engines.load(tmp_path / "bundle")

"""The tiny models that were run through the public reference implementation (tests/oracle)."""

import json
from pathlib import Path

import pytest
import torch

from training.checkpoint import load_draft
from training.evaluate import generate_plain, speculate
from training.target import TargetModel

ORACLE = Path(__file__).parent.parent / "oracle"
DRAFTS = ("dspark_vanilla", "dflash")


@pytest.fixture(scope="module", params=DRAFTS)
def pair(request):
    draft = load_draft(ORACLE / request.param)
    target = TargetModel.from_pretrained(ORACLE / "target_qwen3", draft.config.target_layer_ids)
    return request.param, target, draft


def test_greedy_rounds_equal_the_reference(pair):
    name, target, draft = pair
    for case in json.loads((ORACLE / name / "reference_greedy.json").read_text()):
        # The reference stops by the anchor's position, so it counts one token more than max_new does, then cuts.
        got = speculate(target, draft, case["prompt"], 41)
        assert got.output_ids[: len(case["output_ids"])] == case["output_ids"]
        assert [r.accepted for r in got.rounds] == case["accepted"]
        for ours, theirs in zip(got.rounds, case["rounds"], strict=True):
            assert ours.start == theirs["start"] and ours.draft == theirs["draft"]
            assert ours.base_argmax == theirs["logits_base_argmax"]
            torch.testing.assert_close(ours.hidden[0, :8], torch.tensor(theirs["hidden0"]), atol=1e-4, rtol=0)
            if theirs["conf"] is None:
                assert ours.confidence is None
            else:
                torch.testing.assert_close(ours.confidence, torch.tensor(theirs["conf"]), atol=1e-4, rtol=0)


def test_plain_greedy_decoding_equals_the_reference(pair):
    name, target, _ = pair
    for case in json.loads((ORACLE / name / "reference_greedy.json").read_text()):
        n = len(case["ar_output_ids"]) - len(case["prompt"])
        assert generate_plain(target, case["prompt"], n) == case["ar_output_ids"]

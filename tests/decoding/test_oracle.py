"""The reference implementation's greedy runs through the whole path: export, ONNX Runtime, `decoding generate`."""

import json

import numpy as np
import pytest

import engines
from decoding.generate import load_tokenizer, read_answers, run
from decoding.loop import Loop
from decoding.request import SamplingParams
from decoding.schedule import make
from tests.bundles import ORACLE

# The reference stops when the anchor reaches its limit of 40 tokens, so a round that ends exactly there is followed by one
# more; 41 tokens asked here give exactly its rounds.
ASKED, COMPARED = 41, 40


@pytest.fixture
def generate(oracle, tmp_path):
    """Decodes the four prompts; returns (cases, output lines)."""
    name, bundle = oracle
    cases = json.loads((ORACLE / name / "reference_greedy.json").read_text())
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"input_ids": c["prompt"]}) + "\n" for c in cases))

    def go(schedule, max_requests, token_budget=512):
        loaded = engines.load(bundle, threads=1)
        loop = Loop(loaded, make(schedule), max_requests=max_requests, token_budget=token_budget)
        answers = read_answers(tmp_path / "in.jsonl", load_tokenizer(loaded), SamplingParams(ASKED, ignore_eos=True))
        run(loop, answers, tmp_path / "out.jsonl", None)
        return cases, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    return go


@pytest.mark.parametrize(
    "max_requests, token_budget", [(1, 512), (4, 512), (3, 16)], ids=["alone", "batched", "chunked"]
)
def test_fixed_length_verification_is_the_references(generate, max_requests, token_budget):
    cases, lines = generate("fixed", max_requests, token_budget)
    for case, line in zip(cases, lines, strict=True):
        n = len(case["prompt"])
        assert line["output_ids"][:COMPARED] == case["output_ids"][n : n + COMPARED]
        assert [r["accepted"] for r in line["rounds"]] == case["accepted"]
        assert all(r["drafted"] == r["verified"] == 7 for r in line["rounds"])


@pytest.mark.parametrize("schedule", ["none", "threshold"])
def test_other_schedules_give_the_references_tokens(generate, schedule):
    cases, lines = generate(schedule, 4)
    for case, line in zip(cases, lines, strict=True):
        assert line["output_ids"][:COMPARED] == case["ar_output_ids"][len(case["prompt"]) :][:COMPARED]
        if schedule == "none":
            assert line["rounds"] == [{"drafted": 0, "verified": 0, "accepted": 0}] * (ASKED - 1)


def test_drafts_and_confidences_of_every_round(oracle):
    """Blocks, confidence logits and anchors' positions as the reference saw them."""
    name, bundle = oracle
    loaded, seen = engines.load(bundle, threads=1), []
    confidence, target_capacity = loaded.confidence, loaded.bundle.draft.has_confidence
    markov = loaded.markov
    loaded.markov = lambda batch: seen.append([batch.anchor_ids[0], markov(batch)]) or seen[-1][1]
    loaded.confidence = lambda batch: seen[-1].append(confidence(batch).confidence_logits.copy()) or confidence(batch)
    for case in json.loads((ORACLE / name / "reference_greedy.json").read_text()):
        seen.clear()
        # confidences are read, and everything is verified: a threshold of 0
        loop, drafts = Loop(loaded, make("threshold", 0.0), max_requests=1), []
        from decoding.request import Request

        loop.add(Request(0, tuple(case["prompt"]), SamplingParams(ASKED, ignore_eos=True)))
        while loop.has_work:
            before = len(seen)
            loop.step()
            drafts += [[int(s[0]), *s[1].draft_tokens[0].tolist()] for s in seen[before:]]
        assert drafts == [r["draft"] for r in case["rounds"]]
        for (_, _, logits), r in zip(seen, case["rounds"], strict=True):
            if target_capacity:
                np.testing.assert_allclose(logits[0], r["conf"], atol=2e-4)

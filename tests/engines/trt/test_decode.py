"""Full decodes through the loop on the double: the tokens of ONNX Runtime's engines, and what may leave the GPU."""

from __future__ import annotations

import pytest

import engines
from decoding.compare import next_logits
from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from decoding.schedule import Fixed, NoDraft, Threshold
from engines.profile import measure
from tests.decoding.drive import drive, prompts, requests, tokens
from tests.bundles import tiny_bundle
from tests.engines.trt.double.machine import double_bundle, machine

TEXTS = prompts(10)
MAY_LEAVE = {"draft_tokens", "draft_indices", "confidence_logits", "accepted", "next_tokens", "complete", "log_probs"}
KINDS = {
    "greedy": {},
    "drawn": {"temperature": 1.0},
    "coupled": {"temperature": 0.9, "accept": "coupled"},
    "filtered": {"temperature": 1.0, "top_p": 0.8, "top_k": 12},
    "edited": {"repetition_penalty": 1.3, "logit_bias": ((3, 2.0),), "return_log_probs": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_as_onnxruntime(opened, gpu, plain, kind):
    todo = requests(TEXTS, **KINDS[kind])
    want = tokens(drive(Loop(plain, Threshold(0.5), max_requests=4), todo))
    got = drive(Loop(opened, Threshold(0.5), max_requests=4), todo)
    assert tokens(got) == want and not [o for each in got.values() for o in each if o.error]
    assert set(gpu.downloaded) <= MAY_LEAVE, "logits, features and distributions stay on the GPU"
    assert gpu.downloaded["next_tokens"] > 0


@pytest.mark.parametrize("schedule", [Fixed, NoDraft])
def test_a_block_whose_anchor_drafts_nothing(tmp_path, schedule):
    plain = engines.load(tiny_bundle(tmp_path, rank=0, confidence=None, sample_from_anchor=False), threads=1)
    want = tokens(drive(Loop(plain, Fixed(), max_requests=4), requests(TEXTS)))
    double_bundle(tmp_path, tmp_path / "double")
    with machine():
        runner = engines.load(tmp_path / "double")
        assert tokens(drive(Loop(runner, schedule(), max_requests=4), requests(TEXTS))) == want
        runner.close()


@pytest.mark.parametrize(
    "options",
    [dict(kind="eagle3"), dict(kind="mtp", layers=2), dict(kind="mtp", block_size=1)],
    ids=["eagle3", "mtp", "one"],
)
@pytest.mark.parametrize("kind", ["greedy", "drawn"])
def test_a_draft_by_steps(tmp_path, options, kind):
    """Its steps read the caches that its rows wrote; small plans take context in pieces."""
    plain = engines.load(tiny_bundle(tmp_path, **options), threads=1)
    todo = requests([*TEXTS[:6], *prompts(1, low=100, high=101)], **KINDS[kind])
    want = drive(Loop(plain, Fixed(), max_requests=3), todo)
    double_bundle(tmp_path, tmp_path / "double", requests=3, chunk=16)
    with machine() as gpu:
        runner = engines.load(tmp_path / "double")
        loop = Loop(runner, Fixed(), max_requests=3)
        assert tokens(drive(loop, todo)) == tokens(want) and loop.metrics.accepted_tokens > 0
        assert set(gpu.downloaded) <= MAY_LEAVE
        runner.close()


@pytest.mark.parametrize("budget, max_requests", [(1, 2), (7, 3), (40, 10)])
def test_batches_and_chunks_change_nothing(opened, plain, budget, max_requests):
    todo = requests(TEXTS, temperature=1.0)
    want = tokens(drive(Loop(plain, Fixed(), max_requests=1), todo))
    loop = Loop(opened, Fixed(), max_requests=max_requests, token_budget=budget)
    assert tokens(drive(loop, todo)) == want


def test_neighbours_come_and_go(opened, plain):
    """Rows are moved, passes begin at other rows, prompts run beside blocks."""
    long = prompts(1, low=300, high=301)[0]
    todo = [
        Request(i, text, SamplingParams(6 + 5 * (i % 3), temperature=0.8 * (i % 2), seed=i, speculative=i % 4 > 0))
        for i, text in enumerate([*TEXTS, long])
    ]
    join = lambda step: todo[step + 2 : step + 3]
    want = tokens(drive(Loop(plain, Fixed(), max_requests=3), todo[:3], join))
    assert tokens(drive(Loop(opened, Fixed(), max_requests=3), todo[:3], join)) == want


def test_a_round_that_came_before_allocates_nothing(opened, gpu):
    todo = requests(TEXTS, temperature=1.0)
    drive(Loop(opened, Fixed(), max_requests=4), todo)
    taking = ("cudaMalloc", "cudaMallocHost", "cudaFree", "cudaFreeHost", "cudaEventCreateWithFlags")
    before = {name: gpu.calls[name] for name in taking}
    drive(Loop(opened, Fixed(), max_requests=4), todo)
    assert {name: gpu.calls[name] for name in taking} == before


def test_a_round_waits_twice(opened, gpu):
    """For draft and confidences together, and for the verdicts: not for each engine."""
    loop = Loop(opened, Threshold(0.5), max_requests=2)
    for request in requests(TEXTS[:2], max_tokens=40):
        loop.add(request)
    for _ in range(4):
        loop.step()
    seen, wait = [], opened.cuda.wait
    opened.cuda.wait = lambda event, what: (not event.reached and seen.append(what), wait(event, what))
    try:
        loop.step()
    finally:
        opened.cuda.wait = wait
    assert seen == ["confidence", "verify"]


def test_plans_for_small_passes_take_context_in_pieces(checkpoints, gpu, plain):
    """A prompt of 300 tokens and plans for 16: the draft takes 16 of its positions a pass."""
    small = engines.load(double_bundle(checkpoints, checkpoints / "small", requests=3, chunk=16))
    todo = requests([*prompts(2, low=300, high=301), *TEXTS[:3]], temperature=1.0)
    want = tokens(drive(Loop(plain, Fixed(), max_requests=3), todo))
    loop = Loop(small, Fixed(), max_requests=3)
    assert loop.token_budget == 16
    got = drive(loop, todo)
    assert tokens(got) == want and loop.metrics.engine_calls["backbone"] > loop.metrics.engine_calls["markov"]
    todo = requests([*prompts(2, low=300, high=301), *TEXTS[:3]], max_tokens=60)
    skipping = drive(Loop(small, Skips(), max_requests=3), todo)
    assert tokens(skipping) == tokens(drive(Loop(plain, NoDraft(), max_requests=3), todo))
    with pytest.raises(ValueError, match="max_requests is 4; these engines were compiled for 1..3: export again with"):
        Loop(small, Fixed(), max_requests=4)
    small.close()


class Skips(Fixed):
    """Drafts in one round of 30: context waits meanwhile."""

    def __init__(self):
        super().__init__()
        self.rounds = 0

    def draft(self, load):
        self.rounds += 1
        return load.requests if self.rounds % 30 == 0 else 0


def test_other_rooms_read_logits_as_numpy(opened, plain):
    ids = list(TEXTS[0])
    assert next_logits(opened, ids).argmax() == next_logits(plain, ids).argmax()


def test_a_step_can_be_profiled(opened):
    table = measure(opened, (1, 2), (16,), quick=True, seconds=0.1)
    assert table["target"] and all(p["ms"] > 0 for p in (*table["target"], *table["draft"]))
    assert (opened.provider, opened.threads) == ("tensorrt 11.4.0.106, Double", 1)


def test_half_precision_plans(checkpoints, gpu):
    """float16 caches and masks: whatever ONNX Runtime makes of the graphs, drafts change no greedy token much."""
    half = engines.load(double_bundle(checkpoints, checkpoints / "half", dtype="fp16"))
    todo = requests(TEXTS[:4])
    want = tokens(drive(Loop(half, NoDraft(), max_requests=4), todo))
    got = drive(Loop(half, Fixed(), max_requests=4), todo)
    assert not [o.error for each in got.values() for o in each if o.error] and all(len(t) == 16 for t in want.values())
    same = sum(a == b for i in want for a, b in zip(want[i], tokens(got)[i]))
    assert same >= 0.9 * 16 * len(want)  # rounding differs between batches
    half.close()


def test_tensorrt_rtx_takes_the_same_path(checkpoints, plain):
    folder = double_bundle(checkpoints, checkpoints / "rtx", backend="tensorrt-rtx")
    todo = requests(TEXTS[:4], temperature=1.0)
    with machine("tensorrt-rtx"):
        opened = engines.load(folder, device="cuda:0")
        loop = Loop(opened, Fixed(), max_requests=4)
        assert tokens(drive(loop, todo)) == tokens(drive(Loop(plain, Fixed(), max_requests=4), todo))
        assert set(opened.recorded.values()) == {0}  # it records launches by itself
        opened.close()

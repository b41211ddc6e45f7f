"""Gemma4 targets through the compiled engines: with and without drafts, alone and in batches, past the sliding window."""

import numpy as np
import pytest

import engines
from decoding.loop import Loop
from decoding.schedule import Fixed, NoDraft, Threshold
from engines.bundle import Bundle
from tests.bundles import exported
from tests.decoding.drive import drive, prompts, requests, tokens
from tests.engines.trt.double.machine import double_bundle, machine
from tests.tiny import make_draft, make_target
from training.evaluate import generate_plain
from training.target import TargetModel

KINDS = {
    "12b": ("gemma4-12b", {}),
    "e-style": ("gemma4-e", {"layers": 2, "draft_vocab": 40}),
    "plain draft": ("gemma4-e", {"plain": True}),
}
TEXTS = prompts(7, low=1, high=24)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """(target's folder, engines of its bundle, which the parity gate has passed)."""
    folder, (family, options) = tmp_path_factory.mktemp("gemma4"), KINDS[request.param]
    target = make_target(folder / "target", family=family, layers=4 if family == "gemma4-12b" else 5)
    loaded = engines.load(exported(target, make_draft(folder / "draft", target, **options), folder / "bundle"), threads=1)
    yield target, loaded
    loaded.close()


def greedy(made, scheduler, **options):
    loop = Loop(made[1], scheduler, **options)
    return tokens(drive(loop, requests(TEXTS, max_tokens=24))), loop.metrics


def test_greedy_text_is_the_targets_whatever_drafts_and_batches(made):
    alone, _ = greedy(made, NoDraft(), max_requests=1)
    target = TargetModel.from_pretrained(made[0])
    for i, text in enumerate(TEXTS[:3]):
        assert alone[i] == generate_plain(target, list(text), 24)[len(text) :]
    for scheduler, options in ((Fixed(), {}), (Fixed(), {"max_requests": 3, "token_budget": 7}), (Threshold(0.5), {})):
        got, metrics = greedy(made, scheduler, **options)
        assert got == alone and 0 < metrics.accepted_tokens < metrics.verified_tokens


@pytest.mark.parametrize("scheduler", [NoDraft, Fixed])
def test_tensorrts_form_gives_the_same_tokens(made, scheduler):
    """On the double of a GPU: caches of fixed length, each layer's of its own shape."""
    want, _ = greedy(made, NoDraft(), max_requests=3)
    folder = made[0].parent
    if not (folder / "double").exists():
        double_bundle(folder, folder / "double", requests=3, chunk=16)
    with machine():
        runner = engines.load(folder / "double")
        assert tokens(drive(Loop(runner, scheduler(), max_requests=3), requests(TEXTS, max_tokens=24))) == want
        runner.close()


def test_the_manifest_says_each_layers_cache(made):
    bundle = Bundle.load(made[1].bundle.folder)
    config = TargetModel.from_pretrained(made[0]).config
    shapes = [(s.num_key_value_heads, s.head_dim) for s in config.cached_layers]
    assert bundle.target.caches == tuple(shapes) and bundle.target.cache_shapes[::2] == tuple(shapes)
    assert len({t.shape[1] * t.shape[3] for t in made[1].target_caches.tensors}) == len(set(map(np.prod, shapes)))
    assert bundle.draft.head_dim == made[1].draft_caches.tensors[0].shape[3]

"""The yardstick loop: greedy output equals plain decoding, verification keeps the target's distribution."""

import json

import pytest
import torch

from tests.tiny import make_draft, make_target
from training.checkpoint import checkpoint_hash, load_draft
from training.evaluate import Generation, Round, acceptance, draw_from, evaluate, generate_plain, speculate, verify
from training.target import TargetModel

KINDS = {
    "vanilla": {},
    "gated, layer -1": {"head": "gated", "layer_ids": (-1, 1)},
    "rnn, no confidence": {"head": "rnn", "confidence": None},
    "dflash": {"rank": 0, "confidence": None},
    "trimmed": {"draft_vocab": 24},
}


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module", params=KINDS)
def pair(request, target_folder, tmp_path_factory):
    folder = make_draft(tmp_path_factory.mktemp("draft"), target_folder, **KINDS[request.param])
    draft = load_draft(folder)
    return TargetModel.from_pretrained(target_folder, draft.config.target_layer_ids), draft


def test_greedy_output_equals_plain_decoding(pair):
    target, draft = pair
    for prompt in ([5], [9, 30, 2], list(range(3, 20))):
        got = speculate(target, draft, prompt, 25)
        assert got.output_ids == generate_plain(target, prompt, 25)
        assert [r.start for r in got.rounds][0] == len(prompt)


def test_a_stop_token_ends_the_output_behind_it(pair):
    target, draft = pair
    plain = generate_plain(target, [9, 30, 2], 25)
    stop = plain[3 + 7]
    got = speculate(target, draft, [9, 30, 2], 25, stop=(stop,))
    assert got.output_ids == generate_plain(target, [9, 30, 2], 25, (stop,)) == plain[: plain.index(stop, 3) + 1]


def test_one_seed_gives_one_output(pair):
    target, draft = pair
    seeded = lambda seed: torch.Generator().manual_seed(seed)
    run = lambda seed: speculate(target, draft, [5, 6], 20, temperature=1.0, generator=seeded(seed))
    assert run(3).output_ids == run(3).output_ids != run(4).output_ids


def test_an_empty_prompt_is_refused(pair):
    with pytest.raises(ValueError, match="prompt is empty"):
        speculate(*pair, [], 5)


@pytest.mark.parametrize("trimmed", [False, True])
def test_verification_keeps_the_targets_distribution(trimmed):
    """The first token after one draft token, exactly: the sum over drafts x of q(x) P(token | x), on a grid of uniforms."""
    g = torch.Generator().manual_seed(0)
    V, n = 6, 200
    to_target = torch.tensor([0, 2, 5]) if trimmed else torch.arange(V)
    logits, draft_logits = torch.randn(2, V, generator=g), torch.randn(1, len(to_target), generator=g)
    p, q = torch.softmax(logits, -1), torch.softmax(draft_logits, -1)
    grid = (torch.arange(n) + 0.5) / n
    got = torch.zeros(V)
    for i, x in enumerate(to_target.tolist()):
        share = torch.zeros(V)
        for u in grid:
            accepted, _ = verify(logits, [x], draft_logits, to_target, 1.0, u[None], grid[:1])
            if accepted:
                share[x] += 1 / n
        residual = torch.zeros(V)
        for v in grid:
            accepted, token = verify(logits, [x], draft_logits, to_target, 1.0, torch.tensor([0.999999]), v[None])
            if not accepted:
                residual[token] += 1 / n
        got += q[0, i] * (share + (1 - share[x]) * residual)
    torch.testing.assert_close(got, p[0], atol=2.5 / n, rtol=0)


def test_draw_from_follows_the_weights():
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0])
    drawn = [draw_from(weights, torch.tensor([u])) for u in (0.0, 0.74, 0.76, 0.9999999)]
    assert drawn == [1, 1, 3, 3]


def test_acceptance_pools_rounds():
    rounds = [Round(0, [], None, torch.zeros(1), [], a) for a in (0, 2, 3, 3)]
    got = acceptance([Generation([], rounds[:1]), Generation([], rounds[1:])], 3)
    assert got.length == 3.0 and got.per_position == [0.75, 1.0, pytest.approx(2 / 3)]
    assert (got.rounds, got.tokens) == (4, 12)


def test_the_command_writes_what_it_measured(target_folder, tmp_path, capsys):
    draft = make_draft(tmp_path / "draft", target_folder)
    lines = [json.dumps({"input_ids": [5, 6, i]}) for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    got = evaluate(target_folder, draft, tmp_path / "prompts.jsonl", 2, 12, 0.0, 1, tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["count"] == 2 and written["length"] == got.length
    assert written["draft_sha256"] == checkpoint_hash(draft)
    assert f"acceptance length {got.length:.3f}" in capsys.readouterr().out

"""Gemma4 targets against transformers: logits and layer outputs in fp32, each detail on and off, packed and in chunks, past
the sliding window; and drafts with Gemma4's layers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_target
from tests.training.answered import Answered
from training.batch_pass import BatchPass
from training.checkpoint import load_draft, save_draft
from training.data import TargetPass, make_batches
from training.decoder_config import DecoderConfig
from training.evaluate import generate_plain, speculate
from training.formats.layouts import convert
from training.gemma4_config import write_gemma4
from training.initialisation import HeadShape, new_draft
from training.loss import FusedSoftmaxLoss, row_logits
from training.sampling import BatchSampler, Job
from training.settings import TrainSettings
from training.target import PackedBatch, TargetModel

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, global_head_dim=16, sliding_window=8, max_position_embeddings=256, vocab_size_per_layer_input=96,
    hidden_size_per_layer_input=0, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    final_logit_softcapping=30.0,
)  # fmt: skip
E_STYLE = {
    "hidden_size_per_layer_input": 12, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "num_key_value_heads": 1,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}  # fmt: skip
B12_STYLE = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 2e4, "partial_rotary_factor": 0.5, "factor": 2.0},
}
CASES = {
    "plain": {"final_logit_softcapping": None},
    "12b": B12_STYLE,
    "12b, all heads alike": {**B12_STYLE, "num_key_value_heads": 4, "num_global_key_value_heads": 4},
    "e-style": E_STYLE,
    "layer inputs alone": {"hidden_size_per_layer_input": 12},
    "shared keys and values alone": {"num_kv_shared_layers": 3},
    "narrow shared": {**E_STYLE, "use_double_wide_mlp": False, "num_key_value_heads": 4},
    "ropes": {"rope_parameters": ROPES},
    "untied, biases": {"tie_word_embeddings": False, "attention_bias": True},
    "default pattern": {"layer_types": None, "num_hidden_layers": 7, "sliding_window": 3},
    "window wider than any text": {"sliding_window": 200},
}


def random_gemma4(changes: dict):
    """transformers' model with random weights, its layer scalars not 1."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(7)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, p in (*model.named_parameters(), *model.named_buffers()):
            if "layer_scalar" in name:
                p.copy_(0.5 + torch.rand_like(p))
            elif p.requires_grad:
                p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1) + (1.0 if "norm" in name else 0.0))
    return model


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    """(transformers' model, ours) with the same random weights, ours read from the folder that transformers wrote."""
    theirs = random_gemma4(CASES[request.param])
    theirs.save_pretrained(tmp_path)
    return theirs, TargetModel.from_pretrained(tmp_path, layer_ids=(-1, 0, 2, 4))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 96, (n,), generator=generator).tolist() for n in lengths]


def close(ours, theirs):
    """1e-4 of the reference's largest value."""
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)


def reference(model, ids: list[int]):
    """With hidden states always: without, transformers fails where layers share but have no inputs of their own."""
    return model(torch.tensor([ids]), output_hidden_states=True)


def test_logits_and_features_equal_transformers(pair):
    theirs, ours = pair
    sequences = prompts(70, 1, 13)
    with torch.no_grad():
        out, row = ours(PackedBatch.build(sequences, [0, 0, 0], 70), torch.arange(84)), 0
        for ids in sequences:
            want = reference(theirs, ids)
            rows = slice(row, row + len(ids))
            close(out.logits[rows], want.logits[0])
            close(out.features[rows], torch.cat([want.hidden_states[i][0] for i in (0, 1, 3, 5)], dim=-1))
            close(out.last_hidden[rows], want.hidden_states[-1][0])
            row += len(ids)


def test_uneven_steps_with_caches_equal_one_pass(pair):
    """A ragged batch in two steps, then a rejected suffix overwritten after rewinding the length."""
    theirs, ours = pair
    a, b = prompts(40, 22)
    with torch.no_grad():
        caches = ours.new_caches(2, 128)
        ours(PackedBatch.build([a[:25], b[:4]], [0, 0], 64), torch.tensor([0]), caches)
        ours(PackedBatch.build([[5, 6, 7], [8]], [25, 4], 64), torch.tensor([0]), caches)  # rejected: lengths stay 25 and 4
        out = ours(PackedBatch.build([a[25:], b[4:]], [25, 4], 64), torch.arange(33), caches)
        close(out.logits[:15], reference(theirs, a).logits[0, 25:])
        close(out.logits[15:], reference(theirs, b).logits[0, 4:])


@pytest.mark.parametrize("style", [B12_STYLE, E_STYLE], ids=["12b", "e-style"])
def test_a_released_folder_reads_as_its_text_alone(tmp_path, style):
    """Keys and names as released: `text_config`, global_head_dim, `model.language_model.`, pictures beside, keys and values
    that a sharing layer does not use."""
    theirs = random_gemma4(style)
    theirs.save_pretrained(tmp_path / "text")
    text = TargetModel.from_pretrained(tmp_path / "text", layer_ids=(0,))
    raw = json.loads((tmp_path / "text" / "config.json").read_text())
    del raw["per_layer_config"]
    raw |= {"global_head_dim": 16, "num_global_key_value_heads": style.get("num_global_key_value_heads")}
    state = load_file(tmp_path / "text" / "model.safetensors")
    state = {name.replace("model.", "model.language_model.", 1): t for name, t in state.items()}
    state |= {name: torch.zeros(2) for name in ("model.vision_tower.patch.weight", "model.embed_vision.weight")}
    if "num_kv_shared_layers" in style:
        state["model.language_model.layers.5.self_attn.k_proj.weight"] = torch.zeros(16, 32)
    (tmp_path / "whole").mkdir()
    save_file(state, tmp_path / "whole" / "model.safetensors")
    (tmp_path / "whole" / "config.json").write_text(json.dumps({"model_type": "gemma4", "text_config": raw}))
    whole = TargetModel.from_pretrained(tmp_path / "whole", layer_ids=(0,))
    assert whole.config == text.config
    batch = PackedBatch.build(prompts(20), [0], 20)
    assert torch.equal(whole(batch, torch.arange(20)).logits, text(batch, torch.arange(20)).logits)


REFUSED = {
    "enable_moe_block is true; mixture-of-experts layers are not supported.": {"enable_moe_block": True},
    "use_bidirectional_attention is 'all'; only causal text": {"use_bidirectional_attention": "all"},
    "hidden_activation is 'silu'": {"hidden_activation": "silu"},
    "vocab_size_per_layer_input is 90; it must be vocab_size, 96.": {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 90,
    },
    "num_kv_shared_layers is 5; each type of layer that shares": {"num_kv_shared_layers": 5},
    "layer_types is": {"layer_types": ["full_attention"]},
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_computed_is_one_sentence(words):
    raw = {**SIZES, "rms_norm_eps": 1e-6, "model_type": "gemma4_text", **REFUSED[words]}
    with pytest.raises(ValueError) as error:
        DecoderConfig.from_hf(raw)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", CASES)
def test_the_config_is_written_as_it_was_read(case):
    raw = {**SIZES, "rms_norm_eps": 1e-6, "model_type": "gemma4_text", "rope_parameters": ROPES, **CASES[case]}
    config = DecoderConfig.from_hf(raw)
    assert DecoderConfig.from_hf(write_gemma4(config)) == config
    for other in (config.for_draft(2), config.plain(3)):
        assert other.num_hidden_layers == len(other.layers) == len(other.cached_layers)
        assert all(s.window is None for s in other.layers) and other.embed_scale == config.embed_scale


def small(*lengths: int) -> list[list[int]]:
    """Of the vocabulary of tests/tiny.py."""
    return [[i % 64 for i in ids] for ids in prompts(*lengths)]


@pytest.fixture(scope="module", params=["gemma4-12b", "gemma4-e"])
def target(request, tmp_path_factory):
    """A tiny target, and answers of its own."""
    folder = make_target(tmp_path_factory.mktemp("target"), family=request.param, layers=6)
    model = TargetModel.from_pretrained(folder, (0, 3))
    return model, [Answered(np.array(generate_plain(model, ids, 30)), len(ids)) for ids in small(9, 4, 14, 6)]


def test_batches_of_samples_equal_one_at_a_time(target):
    """The sampler's own decode step, past the window."""
    model, answers = target
    sampler = BatchSampler(model, -1, 0, slots=3, capacity=64, max_new=30)
    jobs = [Job(i, a.tokens[: a.prompt_length].tolist(), 0.0, 30) for i, a in enumerate(answers)]
    with torch.no_grad():
        got = {job.index: answer.tolist() for job, answer in sampler.run(jobs)}
    assert got == {i: a.tokens[a.prompt_length :].tolist() for i, a in enumerate(answers)}


@pytest.mark.parametrize("draft_vocab", [0, 24])
def test_a_new_draft_has_gemma4s_layers_and_learns(target, tmp_path, draft_vocab):
    """Its loss against the target's softcapped distribution falls; saved, it is the same; it speculates exactly."""
    model, answers = target
    draft = new_draft(model, answers, HeadShape(depth=2, block_size=3, rank=8, draft_vocab=draft_vocab), seed=0)
    assert draft.config.decoder.gemma4 and draft.config.decoder.logit_softcap == model.config.logit_softcap
    batch = make_batches(answers, 256, 64)[0]
    settings = TrainSettings(bf16=False, steps=12)
    run = BatchPass(model, draft, TargetPass(model, draft.draft_to_target(), 1 << 20), settings)
    optimiser, totals = torch.optim.Adam([p for p in draft.parameters() if p.requires_grad], 3e-3), []
    for step in range(12):
        f, losses, _ = run(batch, 0, torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        totals.append(losses.total.item())
    assert totals[-1] < 0.9 * totals[0]
    tokens = torch.tensor(answers[0].tokens)
    logits = model(PackedBatch.build([tokens.tolist()], [0], len(tokens)), torch.arange(len(tokens))).logits
    p = torch.softmax(logits, -1)[:, draft.draft_to_target()]
    known = torch.cdist(f.p[:, :-1], p).min(-1).values  # every row of the loss is one of the target's distributions
    assert int((known < 1e-5).sum()) > 0
    save_draft(draft.eval(), tmp_path / "draft")
    again = load_draft(tmp_path / "draft")
    assert again.config == draft.config
    features = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1))
    args = features, torch.tensor([[5]]), torch.tensor([[20]])
    assert torch.equal(again.backbone(*args), draft.backbone(*args))
    ids = answers[2].tokens[: answers[2].prompt_length].tolist()
    assert speculate(model, again, ids, 30).output_ids == answers[2].tokens.tolist()
    with pytest.raises(ValueError, match="Gemma4's layers, which the modelopt layout does not say"):
        convert(tmp_path / "draft", tmp_path / "other", "modelopt")


def test_the_softcapped_losses_gradient_is_autograds():
    g = torch.Generator().manual_seed(0)
    N, d, r, V = 7, 5, 3, 11
    x, head = torch.randn(N, d + r, generator=g) * 3, torch.randn(V, d + r, generator=g)
    p = torch.softmax(torch.randn(N, V + 1, generator=g), -1)
    labels, scales = torch.randint(0, V, (N,), generator=g), torch.rand(3, N, generator=g)
    grads = []
    for fused in (True, False):
        a, b = x.clone().requires_grad_(), head.clone().requires_grad_()
        if fused:
            loss = FusedSoftmaxLoss.apply(
                a, b, p, torch.arange(N), labels, scales[0], scales[1], torch.float32, scales[2], (4.0, d)
            )[0]
        else:
            z = row_logits(a, b, (4.0, d))
            q = torch.softmax(z, -1)
            l1 = (q - p[:, :V]).abs().sum(-1) + p[:, V]
            soft = -(p[:, :V] * torch.log_softmax(z, -1)).sum(-1)
            loss = (scales[0] * -q[torch.arange(N), labels].log() + scales[1] * l1 + scales[2] * soft).sum()
        loss.backward()
        grads.append((loss.detach(), a.grad, b.grad))
    for fused, plain in zip(*grads):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)

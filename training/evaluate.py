"""Offline acceptance of a draft, in PyTorch: the plain loop of speculative decoding, one request at a time.

Knows: draft a block, verify all of it, commit. Refuses to know: batching, scheduling, engines; decoding/ does those,
and this loop is the yardstick that they are compared with.

Legend: T committed tokens, G block size, V target vocabulary, V_d draft vocabulary, L*d feature width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from training.autoregressive import ArDraft
from training.draft import DraftBlock, DraftModel, sample_inverse_cdf
from training.initialisation import eos_ids
from training.target import PackedBatch, TargetModel


@dataclass(frozen=True)
class Round:
    """One draft-verify round. start: the anchor's position; draft: [anchor, x_1 .. x_G]; confidence: logits [G] or
    None; hidden: [G, d] backbone output (None of an autoregressive draft); base_argmax: [G] target ids, the argmax
    before the Markov head; accepted: 0..G."""

    start: int
    draft: list[int]
    confidence: Tensor | None
    hidden: Tensor | None
    base_argmax: list[int]
    accepted: int


@dataclass
class Generation:
    """output_ids: prompt + new tokens (cut at max_new or behind the stop token)."""

    output_ids: list[int]
    rounds: list[Round] = field(default_factory=list)


class TargetRunner:
    """The target with a KV cache for one request; feeds tokens, keeps their features, can forget a rejected suffix."""

    def __init__(self, target: TargetModel, capacity: int):
        self.target, self.capacity = target, capacity
        self.caches = target.new_caches(1, capacity)
        self.features: list[Tensor] = []
        self.length = 0

    def feed(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Writes the tokens behind the cached ones -> logits [n, V], features [n, L*d]; commits none."""
        cache_len = self.length + len(tokens)
        if cache_len > self.capacity:
            raise ValueError(f"the sequence has {cache_len} tokens; the cache was made for {self.capacity}.")
        out = self.target(PackedBatch.build([tokens], [self.length], cache_len), torch.arange(len(tokens)), self.caches)
        return out.logits, out.features

    def keep(self, features: Tensor) -> None:
        """Commits the first len(features) of the tokens just fed."""
        self.features.append(features)
        self.length += features.shape[0]


@torch.inference_mode()
def speculate(
    target: TargetModel,
    draft: DraftModel | ArDraft,
    prompt: list[int],
    max_new: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop: tuple[int, ...] = (),
) -> Generation:
    """Speculative decoding of one prompt, the whole block verified each round (rejection sampling; greedy its limit).

    The target must have been made with the draft's target_layer_ids. Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("prompt is empty; it needs at least one token.")
    G = draft.config.block_size
    runner = TargetRunner(target, len(prompt) + max_new + 2 * G + 1)
    draw = lambda n: torch.rand(n, generator=generator)
    t = torch.tensor([float(temperature)])
    logits, features = runner.feed(list(prompt))
    runner.keep(features)
    tokens = [*prompt, int(sample_inverse_cdf(logits[-1:], t, draw(1)))]
    result = Generation(tokens)
    to_target = draft.draft_to_target()
    while len(tokens) - len(prompt) < max_new and tokens[-1] not in stop:
        start = len(tokens) - 1
        block, hidden = propose(draft, torch.cat(runner.features), tokens, t, draw(G)[None])
        x = block.tokens[0].tolist()
        logits, features = runner.feed([tokens[-1], *x])
        accepted, following = verify(logits, x, block.logits[0], to_target, temperature, draw(G), draw(1))
        runner.keep(features[: accepted + 1])
        result.rounds.append(
            Round(
                start, [tokens[-1], *x], None if block.confidence is None else block.confidence[0], hidden,
                to_target[(block.logits[0] if hidden is None else draft.lm_head(hidden)).argmax(-1)].tolist(), accepted,
            )
        )  # fmt: skip
        for token in (*x[:accepted], following):
            tokens.append(token)
            if token in stop:
                break
    del tokens[len(prompt) + max_new :]
    return result


def propose(
    draft: DraftModel | ArDraft, features: Tensor, tokens: list[int], temperature: Tensor, uniforms: Tensor
) -> tuple[DraftBlock, Tensor | None]:
    """One block behind tokens [p+1], the last of them the anchor; features [p, L*d] of those before it, temperature
    [1], uniforms [1, G] -> the block (R = 1) and the backbone's hidden states [G, d], where there is a backbone."""
    p = len(tokens) - 1
    if isinstance(draft, ArDraft):
        rows = draft.rows(features[None], torch.tensor([tokens[1:]]), torch.tensor([[p - 1]]))
        at, bias = torch.tensor([p]), torch.zeros(1, p)
        return draft.sample_block(rows.hidden[:, 0], at, rows.caches, bias, temperature, uniforms), None
    anchor = torch.tensor([tokens[-1]])
    hidden = draft.backbone(features[None], anchor[None], torch.tensor([[p]]))[:, 0]
    return draft.sample_block(hidden, anchor, temperature, uniforms), hidden[0]


def verify(
    logits: Tensor, x: list[int], draft_logits: Tensor, to_target: Tensor, temperature: float,
    accept: Tensor, final: Tensor,
) -> tuple[int, int]:  # fmt: skip
    """Exact verification of one block: logits [G+1, V], draft_logits [G, V_d], accept [G] and final [1] uniforms
    -> (accepted 0..G, the token behind the accepted ones)."""
    if temperature <= 0:
        best = logits.argmax(-1).tolist()
        accepted = next((k for k, token in enumerate(x) if token != best[k]), len(x))
        return accepted, best[accepted]
    p = torch.softmax(logits.float() / temperature, -1)
    q = torch.zeros_like(p[:-1]).index_copy_(1, to_target, torch.softmax(draft_logits.float() / temperature, -1))
    for k, token in enumerate(x):
        if not float(accept[k]) * q[k, token] < p[k, token]:
            residual = (p[k] - q[k]).clamp_min(0)
            residual = residual if float(residual.sum()) > 0 else p[k]
            return k, draw_from(residual, final)
    return len(x), draw_from(p[-1], final)


def draw_from(weights: Tensor, uniform: Tensor) -> int:
    """weights [V] >= 0 (not normalised), uniform [1] in [0, 1) -> a token by inverse CDF."""
    cdf = weights.cumsum(-1)
    return int(torch.searchsorted(cdf, uniform * cdf[-1], right=True).clamp(max=weights.numel() - 1))


@torch.inference_mode()
def generate_plain(target: TargetModel, prompt: list[int], max_new: int, stop: tuple[int, ...] = ()) -> list[int]:
    """Greedy decoding without a draft: prompt + new tokens."""
    runner, tokens, new = TargetRunner(target, len(prompt) + max_new), list(prompt), list(prompt)
    while len(tokens) - len(prompt) < max_new:
        logits, features = runner.feed(new)
        runner.keep(features)
        new = [int(logits[-1].argmax())]
        tokens += new
        if new[0] in stop:
            break
    return tokens


@dataclass(frozen=True)
class Acceptance:
    """length: mean tokens per target pass, the bonus token included; per_position [G]: chance that slot k is accepted
    given that the slots before it were; rounds, tokens: how much it rests on."""

    length: float
    per_position: list[float]
    rounds: int
    tokens: int


def acceptance(generations: Iterable[Generation], block_size: int) -> Acceptance:
    """Pools the rounds of all generations (a round that the stop token cut counts as it was verified)."""
    counts = torch.tensor([r.accepted for g in generations for r in g.rounds])
    reached = [(counts >= k).sum().item() for k in range(block_size + 1)]
    per_position = [reached[k + 1] / reached[k] if reached[k] else 0.0 for k in range(block_size)]
    n = max(len(counts), 1)
    return Acceptance(1 + counts.sum().item() / n, per_position, len(counts), int(counts.sum()) + len(counts))


def prompt_ids(path: Path, target_folder: Path, limit: int) -> list[list[int]]:
    """Token ids of a JSONL file's prompts (turns, prompt, messages: by the chat template; input_ids: as they are)."""
    from training.jsonl import records
    from training.prompts import parse_prompt
    from training.sampling import ChatTokens

    is_ids = lambda x: isinstance(x, dict) and isinstance(x.get("input_ids"), list)
    lines = records(path, lambda x: x if is_ids(x) else parse_prompt(x), "no usable prompt.")
    lines = list(islice(lines, limit or None))
    if all(map(is_ids, lines)):
        return [list(line["input_ids"]) for line in lines]
    chat = ChatTokens(Path(target_folder))
    return [list(line["input_ids"]) if is_ids(line) else chat.question(line.text) for line in lines]


def evaluate(
    target_folder: Path, draft_folder: Path, prompts: Path, limit: int, max_tokens: int, temperature: float, seed: int,
    out: Path | None = None,
) -> Acceptance:  # fmt: skip
    """The `evaluate` command: generates an answer to each prompt, prints the acceptance length and by position.

    Prompt i draws from a generator seeded with seed + i.
    """
    from rich.progress import track

    from training.checkpoint import checkpoint_hash, load_draft

    draft = load_draft(draft_folder, target_folder)
    target = TargetModel.from_pretrained(target_folder, draft.config.target_layer_ids)
    stop = eos_ids(json.loads((Path(target_folder) / "config.json").read_text()))
    done = []
    for i, ids in enumerate(track(prompt_ids(prompts, target_folder, limit), description=Path(prompts).stem)):
        generator = torch.Generator().manual_seed(seed + i)
        done.append(speculate(target, draft, ids, max_tokens, temperature=temperature, generator=generator, stop=stop))
    result = acceptance(done, draft.config.block_size)
    by_position = " ".join(f"{a:.3f}" for a in result.per_position)
    print(f"{Path(prompts).stem}: temperature {temperature:g}, {len(done)} prompts, {result.rounds} rounds, "
          f"acceptance length {result.length:.3f}, by position {by_position}")  # fmt: skip
    if out is not None:
        facts = {"prompts": Path(prompts).name, "count": len(done), "max_tokens": max_tokens}
        facts |= {
            "temperature": temperature,
            "seed": seed,
            "draft_sha256": checkpoint_hash(draft_folder),
            **asdict(result),
        }
        Path(out).write_text(json.dumps(facts, indent=2) + "\n")
    return result

"""Does this draft fit this target, and does it draft anything? What a person should know before they deploy the pair.

Knows: what can be verified without running (layout, layer ids, slot layout, vocabulary, mask token, weights against the
config), a short acceptance test, and which single change of the reading repairs a draft that accepts too little.
Refuses to know: any layout's keys (formats/), how a reading is tried (repairs.py), serving.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from training.autoregressive import ArDraft
from training.checkpoint import draft_module, with_borrowed
from training.decoder_config import DecoderConfig
from training.draft import DraftConfig, DraftModel
from training.evaluate import acceptance, prompt_ids, speculate
from training.formats.layouts import StoredDraft, open_draft, read_json
from training.initialisation import eos_ids
from training.repairs import (
    Reading,
    Trial,
    accepted,
    best_mask,
    layers_wanted,
    map_from_heads,
    read_text,
    readings,
)  # fmt: skip
from training.target import TargetModel
from training.weights import StoredTensor, load_exactly, stored_tensors

OK, WARNING, FAILED = "ok", "warning", "failed"
NEAR_CHANCE = 1.5  # below this multiple of what a parallel draft accepts without the target's features; what an
# autoregressive one drafts is shown to it, and goes on well in texts that repeat themselves


@dataclass
class Report:
    """findings: (level, sentence). length: tokens a round, bonus included, None where nothing was run; chance: the same
    when the features are of other positions; tried: (change, length), as it is first, without the target last; repair:
    the change that repairs it."""

    findings: list[tuple[str, str]] = field(default_factory=list)
    length: float | None = None
    chance: float | None = None
    tried: list[tuple[str, float]] = field(default_factory=list)
    repair: str | None = None

    def add(self, level: str, sentence: str) -> None:
        self.findings.append((level, sentence))

    @property
    def failed(self) -> bool:
        return any(level == FAILED for level, _ in self.findings)


def check(
    target_folder: Path, draft_folder: Path, prompts: Path | None = None, limit: int = 4, max_tokens: int = 56
) -> Report:
    """Verifies the pair, then generates greedily with it and tries the single changes. Does not raise for a draft that
    is wrong (the report says so); ValueError or FileNotFoundError for folders that cannot be read at all."""
    report = Report()
    raw = read_json(Path(target_folder) / "config.json")
    target_config = DecoderConfig.from_hf(raw)
    opened = open_draft(draft_folder, target_folder)
    special, ordinary = token_ids(Path(target_folder))
    verify_pair(report, opened, target_config, raw, ordinary)
    if report.failed:
        return report
    draft, maps = load_anyway(report, opened, Path(draft_folder), Path(target_folder))
    target = TargetModel.from_pretrained(target_folder, draft.config.target_layer_ids)
    if draft.config.draft_vocab_size is not None:
        found = map_from_heads(draft.lm_head.weight, target.lm_head.weight)
        if found is not None and not torch.equal(found, draft.d2t):
            maps["by the rows of lm_head, token i is the target's i + offset that its row resembles"] = found
    smoke_test(
        report,
        target,
        draft,
        asked(prompts, Path(target_folder), limit, target_config.vocab_size),
        max_tokens,
        maps,
        special,
    )
    return report


def verify_pair(report: Report, opened: StoredDraft, target: DecoderConfig, raw: dict, ordinary: set[int]) -> None:
    """What config and folder say, without a weight read."""
    c = opened.config
    slots = "the anchor's slot drafts too" if c.sample_from_anchor else "the anchor's slot drafts nothing"
    head = f"{c.markov_head_type} Markov head of rank {c.markov_rank}" if c.markov_rank else "no Markov head"
    depth, parallel = c.decoder.num_hidden_layers, c.kind == "parallel"
    shape = f"block of {c.block_slots} slots ({slots}), {head}" if parallel else f"{c.block_size} tokens a round"
    report.add(OK, f"layout {opened.layout}: {depth} layers, {shape}.")
    for name, ours, theirs in (
        ("hidden_size", c.decoder.hidden_size, target.hidden_size),
        ("vocab_size", c.decoder.vocab_size, target.vocab_size),
        ("num_target_layers", c.num_target_layers, target.num_hidden_layers),
    ):
        if ours != theirs:
            report.add(
                FAILED, f"the draft was made for another target: its {name} is {ours}, the target's is {theirs}."
            )
    report.add(OK, f"layer ids {list(c.target_layer_ids)} of the target's {target.num_hidden_layers} layers.")
    pruned = "the whole vocabulary" if c.draft_vocab_size is None else f"{c.vocab_out} of {c.decoder.vocab_size} tokens"
    report.add(OK, f"draft vocabulary: {pruned}.")
    if not parallel:
        return
    if c.mask_token_id in eos_ids(raw):
        report.add(WARNING, f"mask_token_id {c.mask_token_id} is an end-of-sequence token of the target.")
    elif c.mask_token_id in ordinary:
        report.add(
            WARNING,
            f"mask_token_id {c.mask_token_id} is an ordinary token of the target's tokenizer, not a special one.",
        )
    else:
        report.add(OK, f"mask_token_id {c.mask_token_id}.")


def fit(config: DraftConfig, tensors: Mapping[str, StoredTensor]) -> tuple[DraftConfig, list[str]]:
    """The config that the weights' names and shapes speak for, and what it differs in, a sentence each."""
    said, changed = [], {}
    has = lambda name: f"markov_head.{name}" in tensors
    if has("markov_w1.weight"):
        kind = "gated" if has("gate_proj.weight") else "rnn" if has("joint_proj.weight") else "vanilla"
        rank = tensors["markov_head.markov_w1.weight"].shape[-1]
        if config.markov_rank and kind != config.markov_head_type:
            typed = f"markov_head_type is {config.markov_head_type!r}"
            said.append(f"wrong head type: {typed}, and the weights are of a {kind} head.")
        if rank != config.markov_rank:
            said.append(f"markov_rank is {config.markov_rank}, and the weights are of rank {rank}.")
        changed |= {"markov_head_type": kind, "markov_rank": rank}
    elif config.markov_rank:
        said.append(
            f"wrong head type: markov_rank is {config.markov_rank}, and there is no Markov head among the weights."
        )
        changed |= {"markov_rank": 0, "confidence_head_with_markov": False}
    confidence = tensors.get("confidence_head.proj.weight")
    if (confidence is not None) != config.enable_confidence_head:
        word = "no " if confidence is None else "a "
        said.append(f"enable_confidence_head is {config.enable_confidence_head}, and there is {word}confidence head.")
        changed["enable_confidence_head"] = confidence is not None
    if confidence is not None:
        wide = confidence.shape[-1] > config.decoder.hidden_size
        if wide != config.confidence_head_with_markov and not said:
            said.append(f"confidence_head_with_markov is {not wide}, and the confidence head's width says {wide}.")
        changed["confidence_head_with_markov"] = wide
    return replace(config, **changed), said


def load_anyway(
    report: Report, opened: StoredDraft, folder: Path, target_folder: Path
) -> tuple[DraftModel | ArDraft, dict[str, Tensor]]:
    """The draft with the config that its weights speak for, and other vocabulary maps to try (offsets [V_d])."""
    config, differences = opened.config, []
    if config.kind == "parallel":
        config, differences = fit(config, opened.tensors)
    for sentence in differences:
        report.add(FAILED, sentence)
    tensors, maps = dict(opened.tensors), {}
    stored = tensors.pop("d2t", None)
    V, V_d = config.decoder.vocab_size, config.vocab_out
    config, state = with_borrowed(replace(opened, config=config, tensors=tensors), folder, target_folder)
    state = {name: tensor.numbers() for name, tensor in state.items()}
    if V_d < V:
        order = torch.arange(V_d)
        state["d2t"] = torch.zeros(V_d, dtype=torch.int64) if stored is None else stored.load().flatten().long()
        ids = order + state["d2t"] if len(state["d2t"]) == V_d else order - 1
        if stored is None:
            report.add(FAILED, f"d2t is missing: which {V_d} of the target's {V} tokens the draft knows is not said.")
        elif bool((ids < 0).any() or (ids >= V).any() or (ids[1:] <= ids[:-1]).any()):
            report.add(FAILED, f"d2t must be {V_d} offsets that map to increasing target ids in 0..{V - 1}.")
            if len(ids) == V_d and bool((state["d2t"] < V).all() and (state["d2t"][1:] > state["d2t"][:-1]).all()):
                maps["it holds target ids where offsets belong"] = state["d2t"] - order
            state["d2t"] = torch.zeros(V_d, dtype=torch.int64)
        members = stored_tensors(folder).get("t2d")
        if members is not None and int(members.load().bool().sum()) == V_d:
            maps["t2d says which tokens"] = members.load().bool().nonzero()[:, 0] - order
    with torch.device("meta"):
        draft = draft_module(config)
    load_exactly(draft, state, str(folder))
    size = sum(p.numel() for p in draft.parameters()) / 1e6
    report.add(OK, f"weights fit the config: {size:.1f}M numbers, the target's included.")
    return draft.eval().requires_grad_(False), {name: d for name, d in maps.items() if not torch.equal(d, draft.d2t)}


def smoke_test(
    report: Report, target: TargetModel, draft: DraftModel | ArDraft, prompts: list[list[int]], max_tokens: int,
    maps: dict[str, Tensor], special: list[int],
) -> None:  # fmt: skip
    """Generates with the draft, then judges every reading on the texts that came out."""
    c = draft.config
    done = [speculate(target, draft, prompt, max_tokens + c.block_size) for prompt in prompts]
    measured = acceptance(done, c.block_size)
    report.length = measured.length
    by_position = " ".join(f"{a:.2f}" for a in measured.per_position)
    target.layer_ids = layers_wanted(c)  # the same weights, more of their outputs
    texts = [read_text(target, g.output_ids, len(prompt)) for g, prompt in zip(done, prompts)]
    now = accepted(draft, Reading("as the config says", c), texts)
    inputs = "features" if c.kind == "parallel" else "features and tokens"
    chance = accepted(draft, Reading(f"as the config says, with {inputs} of other positions", c, shuffled=True), texts)
    report.chance = 1 + chance.mean
    trials = [accepted(draft, reading, texts) for reading in readings(c, maps)]
    mask = best_mask(draft, c, texts, special)
    trials = sorted([*trials, *([mask] if mask else [])], key=lambda trial: -trial.mean)
    report.tried = [(trial.reading.name, 1 + trial.mean) for trial in (now, *trials, chance)]
    judge(report, now, chance, trials, f"{measured.rounds} rounds on {len(prompts)} prompts, by position {by_position}")


def judge(report: Report, now: Trial, chance: Trial, trials: list[Trial], rounds: str) -> None:
    length = f"acceptance length {report.length:.2f} ({rounds})"
    if trials and trials[0].beats(now):
        report.repair = trials[0].reading.name
        report.add(
            FAILED,
            f"{length}; at every position of the texts {1 + now.mean:.2f}, with one change {1 + trials[0].mean:.2f}.",
        )
        report.add(FAILED, f"the change that repairs it: {report.repair}.")
    elif not now.beats(chance) or (now.reading.config.kind == "parallel" and now.mean < NEAR_CHANCE * chance.mean):
        report.add(
            FAILED,
            f"{length} is near chance ({1 + now.mean:.2f} against {1 + chance.mean:.2f} with features of others), "
            f"and none of {len(trials)} single changes repairs it: the draft is of another target, or not trained.",
        )
    else:
        report.add(OK, f"{length}; {1 + chance.mean:.2f} without the target's features; no single change does better.")


def asked(prompts: Path | None, target_folder: Path, limit: int, vocab_size: int) -> list[list[int]]:
    """Token ids of the prompts: of the file, else of this project's own, else (no tokenizer) random ones."""
    if prompts is not None:
        return prompt_ids(prompts, target_folder, limit)
    if (target_folder / "tokenizer.json").is_file():
        from training.prompts import held_out
        from training.sampling import ChatTokens

        chat = ChatTokens(target_folder)
        return [chat.question(p.text) for p in held_out(limit, seed=5)]
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocab_size, (6,), generator=generator).tolist() for _ in range(limit)]


def token_ids(target_folder: Path) -> tuple[list[int], set[int]]:
    """Ids of the tokenizer's special tokens, and of its other ones; empty without a tokenizer."""
    file = target_folder / "tokenizer.json"
    if not file.is_file():
        return [], set()
    raw = json.loads(file.read_text(encoding="utf-8"))
    special = [int(token["id"]) for token in raw.get("added_tokens") or []]
    vocab = (raw.get("model") or {}).get("vocab") or {}
    known = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return special, set(known) - set(special)


def table(report: Report) -> str:
    """The report as lines for a person."""
    lines = [f"{level:8} {sentence}" for level, sentence in report.findings]
    if report.tried:
        lines += ["", "tried (acceptance length at every position of the texts):"]
        lines += [f"  {length:5.2f}  {name}" for name, length in report.tried]
    return "\n".join(lines)

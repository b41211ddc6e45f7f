"""Trains a draft module against a frozen target: features on the fly, three losses, checkpoints that resume exactly.

Knows: the schedule, the optimiser, anchors, what is logged and kept. Refuses to know: how answers were generated, how a
head begins (initialisation.py), ONNX, serving.

All randomness is drawn from (seed, step) or (seed, epoch): a run with `steps` is a function of its seed and data, and a
resumed run continues as if it had not stopped. A run with `minutes` decays its learning rate by the share of time used; the log
says how many steps it took.

Legend: B sequences, S positions, A anchors a sequence, G block size, N slots that count, U distinct target positions
among them, K = d + r, V_d draft vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.checkpoint import config_to_json, load_draft, save_draft
from training.data import (
    Batch, Sequence, TargetPass, TargetSide, coverage, frequent_tokens, is_held_out, make_batches, sequence_key,
)  # fmt: skip
from training.draft import DraftModel
from training.initialisation import HeadShape, default_layer_ids, eos_ids, new_draft
from training.loss import Losses, LossWeights, block_losses, make_slots, target_rows
from training.target import TargetModel

ADAM_BETAS = (0.9, 0.95)
EVALUATION_TOKENS = 12_288  # of the held-out slice, at most


@dataclass(frozen=True)
class TrainSettings:
    """Everything that a run depends on beside its data. Exactly one of steps and minutes is set."""

    seed: int = 1
    steps: int | None = None
    minutes: float | None = None
    lr: float = 1e-3
    final_lr: float = 0.02  # share of lr at the end of the cosine
    warmup: float = 0.04  # share of the run
    clip: float = 1.0
    tokens_per_batch: int = 768
    batches_per_step: int = 2  # each on a thread of its own: their gradients are averaged
    anchor_share: float = 0.5  # of the answer positions of a sequence, drawn anew each time it is seen
    max_length: int = 1024
    loss: LossWeights = LossWeights()
    bf16: bool = True
    feature_cache_gb: float = 8.0
    save_minutes: float = 5.0
    evaluate_steps: int = 250

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("name exactly one of steps and minutes.")
        if not 0 < self.anchor_share <= 1:
            raise ValueError(f"anchor_share is {self.anchor_share}; it must lie in (0, 1].")


@dataclass
class Progress:
    """Where a run stands; saved with the weights. `place` is the next batch of the epoch's order."""

    step: int = 0
    epoch: int = 0
    place: int = 0
    blocks: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """One run: `run()` trains until its steps or minutes are used; the folder then holds latest/, state.pt, log.jsonl.

    `load` gives the sequences; it is asked again at each epoch's start, so that data may still grow while a run goes on
    (new sequences make new batches, or enter the held-out slice; the draft vocabulary stays that of the start).
    """

    def __init__(
        self, target: TargetModel, draft: DraftModel, load: Callable[[], list[Sequence]], out: Path,
        settings: TrainSettings,
    ):  # fmt: skip
        self.draft, self.load, self.out, self.settings = draft, load, Path(out), settings
        self.ids = draft.draft_to_target()
        V = draft.config.decoder.vocab_size
        self.to_draft = torch.full((V,), -1, dtype=torch.int64)
        self.to_draft[self.ids] = torch.arange(len(self.ids))
        self.target_head = target.lm_head.weight[self.ids].float()
        self.target_pass = TargetPass(target, self.ids, int(settings.feature_cache_gb * 1e9))
        self.batches: list[Batch] = []
        self.held_out: list[Batch] = []
        self.held_out_keys: list[str] = []
        self.grown: list[list[str]] = []  # keys of the sequences that each growth added
        self.grow(load())
        if not self.batches:
            raise ValueError("the training data holds no sequence with two answer tokens inside max_length.")
        draft.train().requires_grad_(True)
        draft.embed_tokens.requires_grad_(False)
        self.parameters = [p for p in draft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, settings.lr, ADAM_BETAS, weight_decay=0.0, fused=True)
        self.progress = Progress()
        self.stop_requested = False
        self.workers = ThreadPoolExecutor(
            min(settings.batches_per_step, os.cpu_count() or 1), initializer=torch.set_num_threads, initargs=(1,)
        )

    # ---- data --------------------------------------------------------------------------------------------------------

    def hold_out(self, sequences: list[Sequence]) -> None:
        """Chooses the slice that is evaluated."""
        s, keys = self.settings, [sequence_key(x) for x in sequences]
        if keys == self.held_out_keys:
            return
        self.target_pass.forget(lambda key: key < 0)
        held = make_batches(sequences, s.tokens_per_batch, s.max_length)
        order = torch.randperm(len(held), generator=generator_for(s.seed, "held-out", 0)).tolist()
        self.held_out = [held[i] for i in order[: max(1, EVALUATION_TOKENS // s.tokens_per_batch)]]
        self.held_out_keys = keys

    def grow(self, sequences: list[Sequence]) -> None:
        """Adds batches of the sequences that are new and not held out; chooses the held-out slice again."""
        self.hold_out([s for s in sequences if is_held_out(s)])
        seen = {key for keys in self.grown for key in keys}
        new = {key: s for s in sequences if not is_held_out(s) and (key := sequence_key(s)) not in seen}
        if new:
            self.grown.append(sorted(new))
            self.batches += make_batches(list(new.values()), self.settings.tokens_per_batch, self.settings.max_length)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def anchors(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Positions [B, A] and keep [B, A]: anchor_share of each sequence's valid anchors, without replacement."""
        valid = batch.loss_mask.clone()
        valid[:, :-1] &= batch.loss_mask[:, 1:]
        valid[:, -1] = False
        counts = (valid.sum(1) * self.settings.anchor_share).ceil().long()
        scores = torch.rand(valid.shape, generator=generator).masked_fill(~valid, -1.0)
        chosen = scores.topk(int(counts.max()), dim=1).indices
        return chosen, torch.arange(chosen.shape[1]) < counts[:, None]

    def forward(self, batch: Batch, side: TargetSide, anchors: Tensor, keep: Tensor) -> "Forward":
        """The draft over all blocks of a batch: rows of the slots that count, and what the losses need of them."""
        draft, G = self.draft, self.draft.config.block_size
        slots = make_slots(batch.tokens, batch.loss_mask, anchors, keep, G)
        features = side.features if self.settings.bf16 else side.features.float()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.settings.bf16, cache_enabled=False):
            hidden = draft.backbone(features, batch.tokens.gather(1, anchors), anchors, keep)
            embeddings = None
            head, x = draft.lm_head.weight, hidden
            if draft.markov_head is not None:
                embeddings = draft.markov_head.embed(slots.previous)
                latents = draft.markov_head.block_latents(embeddings, hidden)
                x = torch.cat([hidden, latents.to(hidden.dtype)], dim=-1)
                head = torch.cat([head, draft.markov_head.markov_w2.weight], dim=1)
        confidence = draft.confidence(hidden, embeddings)
        S = batch.tokens.shape[1]
        at = (slots.position + torch.arange(len(batch.tokens))[:, None, None] * S)[slots.valid]
        judged = torch.zeros(batch.tokens.numel(), dtype=torch.bool)
        judged[at] = True
        with torch.no_grad():
            outside = None if side.outside is None else side.outside.flatten()[judged]
            p = target_rows(side.last_hidden.flatten(0, 1)[judged], self.target_head, outside)
        return Forward(
            x[slots.valid], head, None if confidence is None else confidence[slots.valid], p,
            (judged.cumsum(0) - 1)[at], self.to_draft[slots.labels[slots.valid]], slots.valid.nonzero()[:, 2],
            slots.valid,
        )  # fmt: skip

    def losses(self, f: "Forward") -> Losses:
        dtype = torch.bfloat16 if self.settings.bf16 else torch.float32
        G = self.draft.config.block_size
        return block_losses(f.x, f.head, f.confidence, f.p, f.p_row, f.labels, f.slot, self.settings.loss, G, dtype)

    def gradients(self, key: int, number: int) -> "BatchResult":
        """Forward and backward of batch `key`; `number` (step and place in it) seeds its anchors."""
        batch = self.batches[key]
        anchors, keep = self.anchors(batch, generator_for(self.settings.seed, "anchors", number))
        f = self.forward(batch, self.target_pass(batch, key), anchors, keep)
        losses = self.losses(f)
        gradients = torch.autograd.grad(losses.total, self.parameters, allow_unused=True)
        return BatchResult(losses, gradients, f.valid, int(keep.sum()), int(batch.loss_mask.sum()))

    def step(self) -> dict:
        """One optimiser step -> its line of the log.

        A batch runs on one thread from end to end: two threads that met at every operation would wait for each other
        whenever the machine has other work.
        """
        s, done = self.settings, self.progress
        if done.place == len(self.batches):
            done.epoch, done.place = done.epoch + 1, 0
            self.grow(self.load())
        order = torch.randperm(len(self.batches), generator=generator_for(s.seed, "order", done.epoch))
        keys = order[done.place : done.place + s.batches_per_step].tolist()
        numbers = [done.step * s.batches_per_step + i for i in range(len(keys))]
        results = list(self.workers.map(self.gradients, keys, numbers))
        for parameter, *parts in zip(self.parameters, *(r.gradients for r in results)):
            present = [g for g in parts if g is not None]
            parameter.grad = sum(present[1:], start=present[0]).div_(len(keys)) if present else None
        norm = nn.utils.clip_grad_norm_(self.parameters, s.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr = s.lr * self.lr_share()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        done.step, done.place = done.step + 1, done.place + len(keys)
        done.blocks += sum(r.blocks for r in results)
        done.tokens += sum(r.tokens for r in results)
        chance, tau = block_acceptance(
            torch.cat([1 - 0.5 * r.losses.row_l1 for r in results]), torch.cat([r.valid.flatten(0, 1) for r in results])
        )
        mean = lambda name: sum(float(getattr(r.losses, name).detach()) for r in results) / len(results)
        values = {name: round(mean(name), 5) for name in ("total", "ce", "l1", "confidence")}
        return {
            "step": done.step, "epoch": done.epoch, "batches": len(self.batches), **values, "acceptance": chance,
            "tau": tau, "lr": lr, "grad_norm": round(float(norm), 4), "blocks": done.blocks, "tokens": done.tokens,
        }  # fmt: skip

    def share_done(self) -> float:
        """Of the steps, or of the minutes."""
        s = self.settings
        return self.progress.step / s.steps if s.steps else self.progress.seconds / (60 * s.minutes)

    def lr_share(self) -> float:
        """Linear warm-up, then a cosine to final_lr."""
        s, share = self.settings, min(self.share_done(), 1.0)
        if s.steps and share < s.warmup:
            return (self.progress.step + 1) / (s.warmup * s.steps + 1)
        if share < s.warmup:
            return max(share / s.warmup, 0.02)
        return s.final_lr + (1 - s.final_lr) * 0.5 * (1 + math.cos(math.pi * (share - s.warmup) / (1 - s.warmup)))

    # ---- held-out slice ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Losses, acceptance by position and tau on the held-out slice, the same blocks every time.

        greedy_tau: teacher-forced on recorded answers that the target itself would choose (95% of their tokens are its
        argmax): 1 + how many slots from the first on have the recorded token as the draft's argmax.
        """
        if not self.held_out:
            return {}
        self.draft.eval()
        parts = list(self.workers.map(self.evaluate_batch, range(len(self.held_out))))
        sums = sum(p.losses for p in parts)
        hits = torch.cat([p.greedy for p in parts])
        chances, valids = torch.cat([p.chance for p in parts]), torch.cat([p.valid for p in parts])
        self.draft.train()
        chance, tau = block_acceptance(chances, valids)
        line = {k: round(float(v), 5) for k, v in zip(("total", "ce", "l1", "confidence"), sums / len(parts))}
        greedy_tau = 1 + float(hits.int().cumprod(-1).sum(-1).float().mean()) if len(hits) else None
        return {**line, "acceptance": chance, "tau": tau, "greedy_tau": greedy_tau, "greedy_blocks": len(hits),
                "blocks": int(valids.any(-1).sum())}  # fmt: skip

    @torch.no_grad()
    def evaluate_batch(self, i: int) -> "BatchEvaluation":
        batch = self.held_out[i]
        anchors, keep = self.anchors(batch, generator_for(self.settings.seed, "evaluate", i))
        f = self.forward(batch, self.target_pass(batch, -1 - i), anchors, keep)
        losses = self.losses(f)
        hit = torch.cat([(x.float() @ f.head.float().t()).argmax(-1) for x in f.x.split(256)]) == f.labels
        chosen = (f.p.argmax(-1)[f.p_row] == f.labels) | (f.labels < 0)
        per_row = lambda x: torch.zeros(f.valid.shape).masked_scatter(f.valid, x.float())
        is_greedy = per_row(chosen).sum((1, 2)) >= 0.95 * f.valid.sum((1, 2))
        return BatchEvaluation(
            torch.stack([losses.total, losses.ce, losses.l1, losses.confidence]),
            1 - 0.5 * losses.row_l1,
            f.valid.flatten(0, 1),
            per_row(hit)[f.valid[..., -1] & is_greedy[:, None]].bool(),
        )

    # ---- the run -----------------------------------------------------------------------------------------------------

    def run(self, report: Callable[[dict], None] = lambda line: None) -> None:
        """Trains to the end (or until SIGTERM / SIGINT), saving every save_minutes. `report` sees each line of the log."""
        torch.set_flush_denormal(True)
        self.out.mkdir(parents=True, exist_ok=True)
        stop = lambda *_: setattr(self, "stop_requested", True)
        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        started, base = time.monotonic(), self.progress.seconds
        saved = started
        try:
            with (self.out / "log.jsonl").open("a") as log:
                while self.share_done() < 1 and not self.stop_requested:
                    line = self.step()
                    self.progress.seconds = base + time.monotonic() - started
                    line["seconds"] = round(self.progress.seconds, 2)
                    last = self.share_done() >= 1
                    if self.progress.step % self.settings.evaluate_steps == 0 or last:
                        line["held_out"] = self.evaluate()
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    report(line)
                    if time.monotonic() - saved > 60 * self.settings.save_minutes and not last:
                        self.save()
                        saved = time.monotonic()
            self.save()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def save(self) -> None:
        """latest/: the draft in DeepSpec format, bf16, without the frozen embedding; state.pt: what to go on from."""
        save_draft(self.draft, self.out / "latest", dtype=torch.bfloat16, embed_tokens=False)
        trained = {k: v for k, v in self.draft.state_dict().items() if k != "embed_tokens.weight"}
        state = {
            "draft": trained, "optimizer": self.optimizer.state_dict(), "progress": asdict(self.progress),
            "config": config_to_json(self.draft.config), "settings": asdict(self.settings), "grown": self.grown,
            "held_out": self.held_out_keys,
        }  # fmt: skip
        part = self.out / "state.pt.part"
        torch.save(state, part)
        os.replace(part, self.out / "state.pt")

    def resume(self) -> None:
        """Continues from state.pt. Raises ValueError when it is of another draft, schedule or data set."""
        state = torch.load(self.out / "state.pt", weights_only=True)
        free = ("feature_cache_gb", "save_minutes", "evaluate_steps")
        now = {k: v for k, v in asdict(self.settings).items() if k not in free}
        differs = [k for k, v in now.items() if state["settings"].get(k) != v]
        if differs:
            raise ValueError(f"{self.out}/state.pt was made with another {', '.join(differs)}; resume with the same.")
        if state["config"] != config_to_json(self.draft.config):
            raise ValueError(f"{self.out}/state.pt is of a draft with another config.json.")
        by_key = {sequence_key(x): x for x in self.load()}
        wanted = {key for keys in (*state["grown"], state["held_out"]) for key in keys}
        if gone := len(wanted - by_key.keys()):
            raise ValueError(f"{self.out}/state.pt was made with {gone} sequences that the data folder does not hold.")
        self.batches, self.grown = [], []
        self.target_pass.forget()
        for keys in state["grown"]:
            self.grow([by_key[key] for key in keys])
        self.hold_out([by_key[key] for key in state["held_out"]])
        self.draft.load_state_dict(state["draft"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])


@dataclass(frozen=True)
class Forward:
    """N rows: x [N, K], head [V_d, K], confidence logits [N] or None, p [U, V_d+1], p_row [N], labels [N] (draft ids,
    -1 outside), slot [N]; valid [B, A, G] says where the rows lie."""

    x: Tensor
    head: Tensor
    confidence: Tensor | None
    p: Tensor
    p_row: Tensor
    labels: Tensor
    slot: Tensor
    valid: Tensor


@dataclass(frozen=True)
class BatchResult:
    """One batch of a step: its losses, the gradient of each parameter (None where unused), valid [B, A, G], counts."""

    losses: Losses
    gradients: tuple[Tensor | None, ...]
    valid: Tensor
    blocks: int
    tokens: int


@dataclass(frozen=True)
class BatchEvaluation:
    """losses [4] (total, ce, l1, confidence), chance [N] and valid [B*A, G] of the slots, greedy [blocks, G] bool: hits."""

    losses: Tensor
    chance: Tensor
    valid: Tensor
    greedy: Tensor


def block_acceptance(chance: Tensor, valid: Tensor) -> tuple[list[float], float]:
    """chance [N] of the valid slots, valid [..., G] -> (mean chance by position, expected tau).

    tau = mean over blocks with a valid slot of 1 + the sum over slots of the product of chances so far (invalid slots: 0).
    """
    full = torch.zeros(valid.shape).masked_scatter(valid, chance).flatten(0, -2)
    flat = valid.flatten(0, -2)
    seen = flat.any(-1)
    by_position = full.sum(0) / flat.sum(0).clamp_min(1)
    tau = 1 + full[seen].cumprod(-1).sum(-1).mean() if bool(seen.any()) else torch.ones(())
    return [round(float(v), 4) for v in by_position], round(float(tau), 4)


def generator_for(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator for one purpose and step, so that nothing random has to be saved."""
    mixed = hash_words(seed, number, *purpose.encode())
    return torch.Generator().manual_seed(mixed)


def hash_words(*words: int) -> int:
    """63-bit mixing (splitmix64) of a few integers; unlike hash(), the same in every process."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def train(
    target_folder: Path, load: Callable[[], list[Sequence]], out: Path, shape: HeadShape, settings: TrainSettings, *,
    init: Path | None = None, resume: bool = False,
) -> Trainer:  # fmt: skip
    """The `train` command: builds (or takes up) a head for the target and trains it, with a progress bar."""
    from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    raw = json.loads((Path(target_folder) / "config.json").read_text())
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    source = Path(out) / "latest" if resume else init
    if resume and not (Path(out) / "state.pt").exists():
        raise FileNotFoundError(f"{out} holds no state.pt to resume from.")
    if not resume and (Path(out) / "state.pt").exists():
        raise ValueError(f"{out} holds a run already; add --resume, or name another folder.")
    draft = None if source is None else load_draft(source, target_folder)
    sequences = load()
    layer_ids = shape.layer_ids or default_layer_ids(int(raw["num_hidden_layers"]))
    if draft is not None:
        layer_ids = draft.config.target_layer_ids
    target = TargetModel.from_pretrained(target_folder, layer_ids, dtype)
    if draft is None:
        draft = new_draft(target, [s for s in sequences if not is_held_out(s)], shape, settings.seed, eos_ids(raw))
    trainer = Trainer(target, draft, load, out, settings)
    if resume:
        trainer.resume()
    V = draft.config.decoder.vocab_size
    tokens = sum(len(s.tokens) - s.prompt_length for s in sequences)
    padded = sum(b.tokens.numel() for b in trainer.batches)
    cache = padded * TargetPass.bytes_per_token(target) / 1e9
    size = sum(p.numel() for p in trainer.parameters) / 1e6
    print(
        f"{len(sequences):,} sequences, {tokens:,} answer tokens, {len(trainer.batches):,} batches, "
        f"{len(trainer.held_out)} held-out batches; {size:.1f}M trained parameters, draft vocabulary "
        f"{draft.config.vocab_out:,} covers {coverage(sequences, trainer.ids, V):.2%}; features in memory: "
        f"{min(cache, settings.feature_cache_gb):.1f} of {cache:.1f} GB.",
        flush=True,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, refresh_per_second=1) as bar:
        task = bar.add_task("training", total=1.0)
        begun, base = time.monotonic(), trainer.progress.blocks

        def report(line: dict) -> None:
            rate = (line["blocks"] - base) / (time.monotonic() - begun)
            text = f"step {line['step']}  loss {line['total']:.3f}  tau {line['tau']:.2f}  {rate:.0f} blocks/s"
            bar.update(task, description=text, completed=min(trainer.share_done(), 1.0))
            if held := line.get("held_out"):
                numbers = "  ".join(f"{k} {held[k]:.3f}" for k in ("l1", "ce", "tau", "greedy_tau") if held[k])
                bar.print(f"step {line['step']}  {rate:.0f} blocks/s  held out: {numbers}")

        trainer.run(report)
    done = trainer.progress
    minutes = done.seconds / 60
    print(f"{done.step:,} steps, {done.blocks:,} blocks, {done.tokens:,} answer tokens seen, {minutes:.1f} minutes.")
    return trainer

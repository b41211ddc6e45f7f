"""Trains a draft module against a frozen target: features on the fly, three losses, checkpoints that resume exactly.

Knows: the schedule, the optimiser, what is logged and kept. Refuses to know: how answers were generated, how a head
begins (initialisation.py), what is done with a batch (batch_pass.py), ONNX, serving.

All randomness is drawn from (seed, step) or (seed, epoch): a run with `steps` is a function of its seed and data, and a
resumed run continues as if it had not stopped. A run with `minutes` decays its learning rate by the share of time used;
the log says how many steps it took. Several processes (ranks.py) share a step's batches: the same run, but for the
order in which gradients are added up.

Legend: B sequences, A anchors a sequence, G block size.
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

from training.batch_pass import BatchPass
from training.checkpoint import save_draft
from training.data import Batch, Sequence, TargetPass, is_held_out, make_batches, sequence_key
from training.draft import DraftModel
from training.formats.deepspec import config_to_json
from training.held_out import HeldOut
from training.loss import block_acceptance
from training.ranks import Ranks
from training.seeds import generator_for
from training.settings import TrainSettings
from training.target import TargetModel

ADAM_BETAS = (0.9, 0.95)


@dataclass
class Progress:
    """Where a run stands; saved with the weights. `place` is the next batch of the epoch's order."""

    step: int = 0
    epoch: int = 0
    place: int = 0
    blocks: int = 0
    tokens: int = 0
    seconds: float = 0.0


LOSSES = ("total", "ce", "l1", "confidence")


@dataclass(frozen=True)
class Seen:
    """What the log says of one batch of a step: LOSSES, chance [N] of acceptance and valid [B*A, G] of its slots,
    counts."""

    losses: tuple[float, ...]
    chance: Tensor
    valid: Tensor
    blocks: int
    tokens: int


class Trainer:
    """One run: `run()` trains until its steps or minutes are used; the folder then holds latest/, state.pt, log.jsonl.

    `load` gives the sequences; it is asked again at each epoch's start, so that data may still grow while a run goes on
    (new sequences make new batches, or enter the held-out slice; the draft vocabulary stays that of the start).
    """

    def __init__(
        self, target: TargetModel, draft: DraftModel, load: Callable[[], list[Sequence]], out: Path,
        settings: TrainSettings, ranks: Ranks = Ranks(),
    ):  # fmt: skip
        if settings.batches_per_step < ranks.size:
            raise ValueError(
                f"batches_per_step is {settings.batches_per_step}; it must be at least the {ranks.size} processes of the run."
            )
        self.draft, self.out, self.settings, self.ranks = draft, Path(out), settings, ranks
        self.load = lambda: ranks.from_first(load)
        self.target_pass = TargetPass(target, draft.draft_to_target(), int(settings.feature_cache_gb * 1e9))
        self.batch_pass = BatchPass(target, draft, self.target_pass, settings)
        self.batches: list[Batch] = []
        self.held_out = HeldOut(settings)
        self.grown: list[list[str]] = []  # keys of the sequences that each growth added
        self.grow(self.load())
        if not self.batches:
            raise ValueError("the training data holds no sequence with two answer tokens inside max_length.")
        draft.train().requires_grad_(True)
        draft.embed_tokens.requires_grad_(False)
        self.parameters = [p for p in draft.parameters() if p.requires_grad]
        ranks.like_first([p.data for p in self.parameters])
        self.optimizer = torch.optim.AdamW(self.parameters, settings.lr, ADAM_BETAS, weight_decay=0.0, fused=True)
        self.progress = Progress()
        self.stop_requested = False
        self.workers = ThreadPoolExecutor(
            min(-(-settings.batches_per_step // ranks.size), max(1, (os.cpu_count() or 1) // ranks.local_size)),
            initializer=torch.set_num_threads,
            initargs=(1,),
        )

    # ---- data --------------------------------------------------------------------------------------------------------

    def hold_out(self, sequences: list[Sequence]) -> None:
        """Chooses the held-out slice, and forgets what the target said of an older one."""
        if self.held_out.choose(sequences):
            self.target_pass.forget(lambda key: key < 0)

    def grow(self, sequences: list[Sequence]) -> None:
        """Adds batches of the sequences that are new and not held out; chooses the held-out slice again."""
        self.hold_out([s for s in sequences if is_held_out(s)])
        seen = {key for keys in self.grown for key in keys}
        new = {key: s for s in sequences if not is_held_out(s) and (key := sequence_key(s)) not in seen}
        if new:
            self.grown.append(sorted(new))
            self.batches += make_batches(list(new.values()), self.settings.tokens_per_batch, self.settings.max_length)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def gradients(self, key: int, number: int) -> tuple[tuple[Tensor | None, ...], Seen]:
        """Forward and backward of batch `key`: the gradient of each parameter (None where unused). `number` (step and
        place in it) seeds its anchors."""
        batch = self.batches[key]
        f, losses, keep = self.batch_pass(batch, key, generator_for(self.settings.seed, "anchors", number))
        gradients = torch.autograd.grad(losses.total, self.parameters, allow_unused=True)
        values = tuple(float(getattr(losses, name).detach()) for name in LOSSES)
        chance, valid = 1 - 0.5 * losses.row_l1, f.valid.flatten(0, 1)
        return gradients, Seen(values, chance, valid, int(keep.sum()), int(batch.loss_mask.sum()))

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
        mine = list(self.workers.map(self.gradients, self.ranks.share(keys), self.ranks.share(numbers)))
        sums = []
        for parts in zip(*(gradients for gradients, _ in mine)) if mine else [()] * len(self.parameters):
            present = [g for g in parts if g is not None]
            sums.append(sum(present[1:], start=present[0]) if present else None)
        for parameter, gradient in zip(self.parameters, self.ranks.total(sums, self.parameters)):
            parameter.grad = None if gradient is None else gradient.div_(len(keys))
        norm = nn.utils.clip_grad_norm_(self.parameters, s.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr = s.lr * self.lr_share()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        done.step, done.place = done.step + 1, done.place + len(keys)
        seen = self.ranks.joined([seen for _, seen in mine])
        done.blocks += sum(x.blocks for x in seen)
        done.tokens += sum(x.tokens for x in seen)
        chance, tau = block_acceptance(torch.cat([x.chance for x in seen]), torch.cat([x.valid for x in seen]))
        values = {name: round(sum(x.losses[i] for x in seen) / len(seen), 5) for i, name in enumerate(LOSSES)}
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

    # ---- the run -----------------------------------------------------------------------------------------------------

    def run(self, report: Callable[[dict], None] = lambda line: None) -> None:
        """Trains to the end (or until SIGTERM / SIGINT), saving every save_minutes. `report` sees each line of the
        log."""
        torch.set_flush_denormal(True)
        self.out.mkdir(parents=True, exist_ok=True)
        ask = lambda *_: setattr(self, "stop_requested", True)
        previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        started, base = time.monotonic(), self.progress.seconds
        saved = started
        try:
            with (self.out / "log.jsonl" if self.ranks.first else Path(os.devnull)).open("a") as log:
                stop = self.stop_requested
                while self.share_done() < 1 and not stop:
                    line = self.step()
                    self.progress.seconds = self.ranks.from_first(lambda: base + time.monotonic() - started)
                    line["seconds"] = round(self.progress.seconds, 2)
                    last = self.share_done() >= 1
                    if self.ranks.first and (self.progress.step % self.settings.evaluate_steps == 0 or last):
                        line["held_out"] = self.held_out.evaluate(self.batch_pass, self.workers)
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    report(line)
                    if time.monotonic() - saved > 60 * self.settings.save_minutes and not last:
                        self.save()
                        saved = time.monotonic()
                    stop = any(self.ranks.gather(self.stop_requested))
            self.save()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def save(self) -> None:
        """latest/: the draft in DeepSpec format, bf16, without the frozen embedding; state.pt: what to go on from. Rank 0
        writes; a run goes on with any number of processes that see the folder."""
        if not self.ranks.first:
            return
        save_draft(self.draft, self.out / "latest", dtype=torch.bfloat16, embed_tokens=False)
        trained = {k: v for k, v in self.draft.state_dict().items() if k != "embed_tokens.weight"}
        state = {
            "draft": trained, "optimizer": self.optimizer.state_dict(), "progress": asdict(self.progress),
            "config": config_to_json(self.draft.config), "settings": asdict(self.settings), "grown": self.grown,
            "held_out": self.held_out.keys,
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

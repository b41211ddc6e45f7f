"""Trains a draft module against a frozen target: features on the fly, three losses, checkpoints that resume exactly.

Knows: the schedule, the optimiser, what is logged and kept. Refuses to know: how answers were generated, how a head
begins (initialisation.py), what is done with a batch (batch_pass.py), where gradients are made (gradients.py), how a
checkpoint survives (run_state.py), ONNX, serving.

All randomness is drawn from (seed, step) or (seed, epoch): a run with `steps` is a function of its seed and data, and a
resumed run continues as if it had not stopped. A run with `minutes` decays its learning rate by the share of time used;
the log says how many steps it took. Several processes (ranks.py) share a step's batches: the same run, but for the
order in which gradients are added up.

Legend: B sequences, A anchors a sequence, G block size.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from training.autoregressive import ArDraft
from training.average import Average
from training.batch_pass import BatchPass
from training.checkpoint import draft_module, save_draft
from training.data import Batch, Sequence, TargetPass, is_held_out, make_batches, sequence_key
from training.draft import DraftModel
from training.feature_files import TOKEN_BYTES, FeatureFiles, cached_recipe_bytes
from training.formats.layouts import config_json
from training.finite import check_finite
from training.gradients import LOSSES, Job, Replicated, Sharded
from training.held_out import HeldOut
from training.loss import block_acceptance
from training.optimiser import Optimiser
from training.progress import Progress
from training.ranks import Ranks
from training.run_log import RunLog
from training.run_state import NotSaved, filled, read_run, write_run
from training.seeds import generator_for
from training.settings import FREE, TrainSettings
from training.target import TargetModel


class Trainer:
    """One run: `run()` trains until its steps or minutes are used; the folder then holds latest/ and best/ (heads),
    state.pt, log.jsonl.

    `load` gives the sequences; it is asked again at each epoch's start, so that data may still grow while a run goes on
    (new sequences make new batches, or enter the held-out slice; the draft vocabulary stays that of the start).
    """

    def __init__(
        self, target: TargetModel, draft: DraftModel | ArDraft, load: Callable[[], list[Sequence]], out: Path,
        settings: TrainSettings, ranks: Ranks = Ranks(),
    ):  # fmt: skip
        if settings.batches_per_step < ranks.size:
            raise ValueError(
                f"batches_per_step is {settings.batches_per_step}; it must be at least the {ranks.size} processes of the run."
            )
        self.target, self.draft, self.out, self.settings, self.ranks = target, draft, Path(out), settings, ranks
        self.load = lambda: ranks.from_first(load)
        files, limit = None, int(settings.feature_disk_gb * 1e9) // ranks.size
        if limit:
            files = FeatureFiles(Path(settings.feature_folder or self.out) / f"features-{ranks.rank}", limit)
        self.target_pass = TargetPass(target, draft.draft_to_target(), int(settings.feature_cache_gb * 1e9), files)
        self.batch_pass = BatchPass(target, draft, self.target_pass, settings)
        self.batches: list[Batch] = []
        self.held_out = HeldOut(settings)
        self.grown: list[list[str]] = []  # keys of the sequences that each growth added
        self.grow(self.load())
        if not self.batches:
            raise ValueError("the training data holds no sequence with two answer tokens inside max_length.")
        draft.train().requires_grad_(True)
        draft.embed_tokens.requires_grad_(False)
        if settings.compile and hasattr(draft, "backbone"):
            draft.backbone = torch.compile(draft.backbone, dynamic=True)
        if settings.sharding == "fsdp2" and ranks.size > 1:
            self.gradients = Sharded(self.batch_pass, ranks, settings.seed)
        else:
            self.gradients = Replicated(self.batch_pass, ranks, settings.seed, settings.batches_per_step)
        self.parameters, self.workers = self.gradients.parameters, self.gradients.workers
        self.names = [name for name, p in draft.named_parameters() if p.requires_grad]  # of the parameters
        self.optimizer = Optimiser(settings.optimiser, draft, self.parameters, settings.lr)
        self.average = Average(self.parameters, settings.ema) if settings.ema else None
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}  # the best head since the last save
        self.disk: dict[str, int] = {}
        self.stop_requested = False

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

    def disk_used(self) -> dict[str, int]:
        """Bytes on disk at most so far for the sequences trained on (token ids, feature files of all ranks), and what
        the cached recipe would have there. Every rank must ask."""
        files = self.target_pass.files
        lengths = [n for batch in self.batches for n in batch.lengths]
        return {
            "tokens": TOKEN_BYTES * sum(lengths),
            "features": sum(self.ranks.gather(files.peak if files else 0)),
            "cached_recipe": cached_recipe_bytes(lengths, self.target.config.hidden_size, len(self.target.layer_ids)),
        }

    # ---- one step ----------------------------------------------------------------------------------------------------

    def step(self) -> dict:
        """One optimiser step -> its line of the log."""
        s, done = self.settings, self.progress
        if done.place == len(self.batches):
            done.epoch, done.place = done.epoch + 1, 0
            self.grow(self.load())
        order = torch.randperm(len(self.batches), generator=generator_for(s.seed, "order", done.epoch))
        keys = order[done.place : done.place + s.batches_per_step].tolist()
        seen = self.gradients([Job(self.batches[k], k, done.step * s.batches_per_step + i) for i, k in enumerate(keys)])
        norm = float(self.gradients.whole(nn.utils.clip_grad_norm_(self.parameters, s.clip)))
        check_finite(seen, norm, done.step + 1, s, self.out)
        for group in self.optimizer.param_groups:
            group["lr"] = lr = s.lr * self.lr_share()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        done.step, done.place = done.step + 1, done.place + len(keys)
        done.blocks += sum(x.blocks for x in seen)
        done.tokens += sum(x.tokens for x in seen)
        chance, tau = block_acceptance(torch.cat([x.chance for x in seen]), torch.cat([x.valid for x in seen]))
        values = {name: round(sum(x.losses[i] for x in seen) / len(seen), 5) for i, name in enumerate(LOSSES)}
        return {
            "step": done.step, "epoch": done.epoch, "batches": len(self.batches), **values, "acceptance": chance,
            "tau": tau, "lr": lr, "grad_norm": round(norm, 4), "blocks": done.blocks, "tokens": done.tokens,
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
        """Trains to the end (or until SIGTERM / SIGINT, or until the held-out tau has not risen for `patience`
        evaluations), saving every save_minutes. `report` sees each line of the log. Raises NotSaved when the end cannot
        be saved, ValueError at a loss that is not finite."""
        torch.set_flush_denormal(True)
        self.out.mkdir(parents=True, exist_ok=True)
        ask = lambda *_: setattr(self, "stop_requested", True)
        previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        started, base = time.monotonic(), self.progress.seconds
        saved = started
        log = RunLog(self.out if self.ranks.first else None, self.settings.tensorboard, self.progress.step)
        try:
            stop = self.stop_requested or self.tired
            while self.share_done() < 1 and not stop:
                line = self.step()
                self.progress.seconds = self.ranks.from_first(lambda: base + time.monotonic() - started)
                line["seconds"] = round(self.progress.seconds, 2)
                last = self.share_done() >= 1
                if self.progress.step % self.settings.evaluate_steps == 0 or last:
                    line["disk"] = self.disk = self.disk_used()
                    if self.ranks.first or self.gradients.together:
                        line.update(self.evaluate())
                log.write(line)
                report(line)
                due = time.monotonic() - saved > 60 * self.settings.save_minutes and not last
                if self.ranks.from_first(lambda: due):
                    try:
                        self.save()
                    except NotSaved as error:
                        print(f"step {line['step']}: {error} The run goes on and tries again.", file=sys.stderr)
                    saved = time.monotonic()
                stop = any(self.ranks.gather(self.stop_requested or self.tired))
            self.disk = self.disk_used()
            self.save()
        finally:
            log.close()
            if self.target_pass.files is not None:
                self.target_pass.files.remove()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def evaluate(self) -> dict:
        """What the held-out slice says of the weights, and of their mean (whose tau then counts for `patience`). Keeps
        the best so far until save(): best/ and state.pt must tell of the same run."""
        run, together = self.gradients.run, self.gradients.together
        figures = {"held_out": self.held_out.evaluate(run, self.workers)}
        self.gradients.settle()
        if self.average is not None:
            with self.average.lent():
                figures["held_out_ema"] = self.held_out.evaluate(run, self.workers)
                self.gradients.settle()
        tau = figures["held_out_ema" if self.average else "held_out"].get("tau")
        if self.progress.judge(self.ranks.from_first(lambda: tau) if together else tau):
            head = self.heads()["latest-ema" if self.average else "latest"].items()
            small = lambda v: torch.bfloat16 if v.is_floating_point() else v.dtype
            self.best = {name: v.detach().to("cpu", small(v), copy=True) for name, v in head}
        return figures

    @property
    def tired(self) -> bool:
        """Whether the held-out tau has not risen for `patience` evaluations."""
        return 0 < self.settings.patience <= self.progress.waited

    def heads(self) -> dict[str, dict[str, Tensor]]:
        """The draft's tensors but the frozen embedding, whole, as they are and with the mean. Every rank must ask."""
        whole = self.gradients.whole
        heads = {"latest": {k: whole(v) for k, v in self.draft.state_dict().items() if k != "embed_tokens.weight"}}
        if self.average is not None:
            mean = {name: whole(value) for name, value in zip(self.names, self.average.values)}
            heads["latest-ema"] = {**heads["latest"], **mean}
        return heads

    def save(self) -> None:
        """latest/ (latest-ema/, best/): the draft in its kind's own layout, bf16, without the frozen embedding;
        state.pt: what to go on from, with whole tensors: a run goes on with any number of processes that see the
        folder, sharded or not. Every rank must ask; rank 0 writes. Raises NotSaved."""
        whole, heads = self.gradients.whole, self.heads()
        optimizer = self.optimizer.state_dict()
        moments = {i: {k: whole(v) for k, v in kept.items()} for i, kept in optimizer["state"].items()}
        state = {
            "draft": heads["latest"], "optimizer": {**optimizer, "state": moments}, "progress": asdict(self.progress),
            "config": config_json(self.draft.config), "settings": asdict(self.settings), "grown": self.grown,
            "held_out": self.held_out.keys,
        }  # fmt: skip
        if self.average is not None:
            state["ema"] = {name: heads["latest-ema"][name] for name in self.names}
        if self.best:
            heads["best"] = self.best
        if self.ranks.first:
            write_run(self.out, state, lambda: [self.write_draft(name, head) for name, head in heads.items()])
        self.best = {}

    def write_draft(self, name: str, head: dict[str, Tensor]) -> None:
        with torch.device("meta"):
            model = draft_module(self.draft.config)
        model.load_state_dict(head, strict=False, assign=True)
        save_draft(model, self.out / name, dtype=torch.bfloat16, embed_tokens=False)

    def resume(self) -> None:
        """Continues from state.pt. Raises ValueError when it is corrupt, or of another draft, schedule or data set."""
        state = read_run(self.out)
        now = {k: v for k, v in asdict(self.settings).items() if k not in FREE}
        then = filled(state["settings"], asdict(TrainSettings(steps=1)))  # older runs had what are the defaults now
        differs = [k for k, v in now.items() if then.get(k) != v]
        if differs:
            raise ValueError(f"{self.out}/state.pt was made with another {', '.join(differs)}; resume with the same.")
        if state["config"] != config_json(self.draft.config):
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
        part, own = self.gradients.part, self.draft.state_dict()
        self.draft.load_state_dict({k: part(v, own[k]) for k, v in state["draft"].items()}, strict=False)
        moments = {
            i: {k: part(v, self.parameters[i]) if v.dim() else v for k, v in kept.items()}
            for i, kept in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        if self.average is not None:
            self.average.values = [part(v, p) for v, p in zip(state["ema"].values(), self.parameters)]
        self.progress = Progress(**state["progress"])

"""The `train` command: a head built or taken up, its run with a progress bar.

Knows: which checkpoint a run begins with, what a person wants to see of it. Refuses to know: how a step is made.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from training.autoregressive import ArDraft
from training.checkpoint import load_draft
from training.data import Sequence, TargetPass, coverage, is_held_out, lacking_tokens
from training.draft import DraftModel
from training.formats.layouts import layers_of
from training.initialisation import HeadShape, eos_ids, new_draft
from training.ranks import Ranks
from training.settings import TrainSettings
from training.target import TargetModel
from training.trainer import Trainer
from training.vocabulary import check_room, extended


def train(
    target_folder: Path, load: Callable[[], list[Sequence]], out: Path, shape: HeadShape, settings: TrainSettings, *,
    init: Path | None = None, resume: bool = False,
) -> Trainer:  # fmt: skip
    """The `train` command: builds (or takes up) a head for the target and trains it, with a progress bar. Under torchrun
    the processes share each step's batches, and the first of them speaks."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    raw = json.loads((Path(target_folder) / "config.json").read_text())
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    source = Path(out) / "latest" if resume else init
    if resume and not (Path(out) / "state.pt").exists():
        raise FileNotFoundError(f"{out} holds no state.pt to resume from.")
    if not resume and (Path(out) / "state.pt").exists():
        raise ValueError(f"{out} holds a run already; add --resume, or name another folder.")
    adds = settings.draft_vocab_add if not resume else 0  # what is resumed has them
    if adds and init is None:
        raise ValueError(f"draft_vocab_add is {adds} and init names no head; a new head's vocabulary is draft_vocab.")
    ranks = Ranks.join(settings.device)
    draft = None if source is None else load_draft(source, target_folder)
    if adds:
        check_room(draft.config, adds)
    sequences = ranks.from_first(load)
    layer_ids = shape.layers_of(layers_of(target_folder))
    if draft is not None:
        layer_ids, found = draft.config.target_layer_ids, draft.config.kind
        if found != shape.module:
            raise ValueError(f"{source} holds a draft of kind {found!r}, and kind is {shape.kind!r}.")
    target = TargetModel.from_pretrained(target_folder, layer_ids, dtype)
    if draft is None:
        draft = new_draft(target, [s for s in sequences if not is_held_out(s)], shape, settings.seed, eos_ids(raw))
    elif adds:
        draft, said = with_lacking(draft, target, sequences, adds)
        if ranks.first:
            print(said, flush=True)
    if settings.device != "cpu":
        target, draft = target.to(settings.device), draft.to(settings.device)
    trainer = Trainer(target, draft, load, out, settings, ranks)
    if resume:
        trainer.resume()
    if not ranks.first:
        trainer.run()
        ranks.leave()
        return trainer
    V = draft.config.decoder.vocab_size
    tokens = sum(len(s.tokens) - s.prompt_length for s in sequences)
    padded = sum(b.tokens.numel() for b in trainer.batches)
    cache = padded * TargetPass.bytes_per_token(target) / 1e9
    memory = min(cache, settings.feature_cache_gb)
    size = sum(p.numel() for p in trainer.parameters) / 1e6
    print(
        f"{len(sequences):,} sequences, {tokens:,} answer tokens, {len(trainer.batches):,} batches, "
        f"{len(trainer.held_out.batches)} held-out batches; {size:.1f}M trained parameters, draft vocabulary "
        f"{draft.config.vocab_out:,} covers {coverage(sequences, draft.draft_to_target(), V):.2%}; features in memory: "
        f"{memory:.1f} of {cache:.1f} GB{disk_plan(trainer, cache - memory)}.",
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
    ranks.leave()
    done = trainer.progress
    minutes = done.seconds / 60
    tired = f"; stopped: the held-out tau has not risen for {done.waited} evaluations" if trainer.tired else ""
    seen = f"{done.blocks:,} blocks, {done.tokens:,} answer tokens seen"
    print(f"{done.step:,} steps, {seen}, {minutes:.1f} minutes{tired}.")
    print(disk_line(trainer.disk))
    return trainer


def with_lacking(
    draft: DraftModel | ArDraft, target: TargetModel, sequences: list[Sequence], count: int
) -> tuple[DraftModel | ArDraft, str]:
    """The head with the `count` most frequent answer tokens that it could not draft (of what is trained on), and what
    share of the answers' tokens its vocabulary held and holds."""
    V, ids = target.config.vocab_size, draft.draft_to_target()
    parts = {
        "training": [s for s in sequences if not is_held_out(s)],
        "held-out": [s for s in sequences if is_held_out(s)],
    }
    wide = extended(draft, target, lacking_tokens(parts["training"], ids, count, V))
    shares = [
        f"{coverage(part, ids, V):.2%} of the {name} answers' tokens, now {coverage(part, wide.draft_to_target(), V):.2%}"
        for name, part in parts.items()
        if part
    ]
    added = wide.config.vocab_out - len(ids)
    return wide, f"{added:,} tokens added to a draft vocabulary of {len(ids):,}: it held {'; '.join(shares)}."


def disk_plan(trainer: Trainer, wanted: float) -> str:
    """What the feature files will hold, of the `wanted` GB that the memory has no room for. Raises ValueError when the
    disk has no room for them."""
    files = trainer.target_pass.files
    if files is None:
        return ""
    folder = next(f for f in (files.folder, *files.folder.parents) if f.exists())
    planned, free = min(wanted, files.limit * trainer.ranks.size / 1e9), shutil.disk_usage(folder).free / 1e9
    if planned > free:
        asked = f"feature_disk_gb is {trainer.settings.feature_disk_gb:g}"
        raise ValueError(f"{asked}; {planned:.2f} GB would be used, and {folder} has {free:.2f} GB free.")
    return f", in files under {files.folder} up to {planned:.2f} GB ({free:.0f} GB free)"


def disk_line(disk: dict[str, int]) -> str:
    """What the run used on disk beside its checkpoints, and what the cached recipe would have."""
    used, cached = disk["tokens"] + disk["features"], disk["cached_recipe"]
    return (
        f"Disk for the data: token ids {disk['tokens'] / 1e6:.1f} MB, features {disk['features'] / 1e6:.1f} MB at most; "
        f"the reference's recipe caches {cached / 1e6:,.1f} MB for the same tokens ({used / cached:.2%} of it used here)."
    )

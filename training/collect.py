"""The `data` command: prompts from anywhere, each once and none of a benchmark, answered on-policy, kept as tokens.

Knows: the order of the steps, what a resumed run must agree on, what a person wants to see. Refuses to know: the shapes
of sources (sources.py), how each answerer is asked (answers.py), drafts.

The folder is that of training/generate.py (shards with token ids, prompts-00.jsonl, meta.json); its prompts are split
into train and held-out by the hash of their token ids, as the trainer does it (training/data.py). held-out.jsonl names
the held-out prompts, for evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from training.answers import Asking, Server, from_engines, from_logs, from_server
from training.checkpoint import checkpoint_hash
from training.data import is_held_out_prompt
from training.generate import ShardWriter, check_settings, progress
from training.sampling import BatchSampler, ChatTokens, Job, draw_temperature
from training.sources import Benchmarks, Chat, once, read, write_chats

ANSWERERS = ("torch", "engines", "server", "logs")
PROMPTS = "prompts-00.jsonl"


@dataclass(frozen=True)
class Collection:
    """What a folder of data is made of. temperature: a number, "recommended" (the target's generation_config.json, else
    1) or "mixed" (0, 0.7 and 1 by turns, as `generate` has it); top_p and top_k None: recommended, else off. seeds: whether a
    server gets a seed with each request."""

    target: Path
    out: Path
    sources: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    count: int = 0
    seed: int = 1
    answers: str = "torch"
    bundle: Path | None = None
    server: Server | None = None
    temperature: str = "recommended"
    top_p: float | None = None
    top_k: int | None = None
    thinking: bool | None = None
    seeds: bool = True
    max_new: int = 320
    max_prompt: int = 448
    shard_size: int = 200
    slots: int = 64

    def __post_init__(self) -> None:
        if self.answers not in ANSWERERS:
            raise ValueError(f"answers is {self.answers!r}; it must be one of {', '.join(ANSWERERS)}.")
        if self.answers == "engines" and self.bundle is None:
            raise ValueError("answers from engines need a bundle; name one with --bundle.")
        if self.answers == "server" and self.server is None:
            raise ValueError("answers from a server need its address and model; name them with --url and --model.")
        if self.temperature not in ("recommended", "mixed"):
            try:
                good = 0 <= float(self.temperature) <= 10
            except ValueError:
                good = False
            if not good:
                raise ValueError(f"temperature is {self.temperature!r}; it must be 0..10, recommended or mixed.")
        for name, least in (("max_new", 1), ("max_prompt", 1), ("shard_size", 1), ("slots", 1), ("count", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if not self.sources:
            raise ValueError("no source is named; give a JSONL file, a folder of chat logs or hf:NAME.")


def collect(plan: Collection, say: Callable[[str], None] = print) -> dict:
    """Makes the folder, or goes on with it; gives this run's counts. Raises ValueError or OSError, one sentence."""
    plan.out.mkdir(parents=True, exist_ok=True)
    tokens = ChatTokens(plan.target)
    sampling = recommended(plan)
    check_settings(plan.out, settings(plan, sampling))
    chats = chosen(plan, tokens, say)
    writer, jobs, long = ShardWriter(plan.out, 0, plan.shard_size), [], 0
    for index, chat in enumerate(chats):
        ids = rendered(tokens, chat, plan.thinking)
        long += len(ids) > plan.max_prompt
        if len(ids) <= plan.max_prompt and index not in writer.done:
            hot = draw_temperature(plan.seed, index) if plan.temperature == "mixed" else float(sampling["temperature"])
            jobs.append(Job(index, ids, hot, plan.max_new))
    before, answered, total = len(writer.done), 0, 0
    say(f"{len(jobs)} prompts to answer by {plan.answers}; {before} are answered already, {long} are too long.")
    try:
        for job, answer in progress(answering(plan, sampling, jobs, chats, tokens), len(jobs), "answers"):
            writer.add(job, answer, chats[job.index].kind)
            answered, total = answered + 1, total + len(answer)
    finally:
        writer.flush()
    return {
        "answered": answered, "answer_tokens": total, "too_long": long, "resumed": before, "shards": writer.number,
        "left_out": len(jobs) - answered,
    }  # fmt: skip


def chosen(plan: Collection, tokens: ChatTokens, say: Callable[[str], None]) -> list[Chat]:
    """The prompts of the folder: those of an earlier run, else read, made unique, cleared of benchmarks, written."""
    file = plan.out / PROMPTS
    if file.exists():
        return list(read(str(file)))
    benchmarks = Benchmarks(chat for source in plan.exclude for chat in read(source))
    found = 0

    def counted() -> Iterator[Chat]:
        nonlocal found
        for source in plan.sources:
            for chat in read(source):
                found += 1
                yield chat

    unique = list(once(counted()))
    kept, out, overlap = benchmarks.split(unique)
    kept = list(islice(kept, plan.count or None))
    if not kept:
        raise ValueError(f"no prompt is left of {found}: {found - len(unique)} repeated, {len(out)} of benchmarks.")
    held = [chat for chat in kept if is_held_out_prompt(rendered(tokens, chat, plan.thinking))]
    say(
        f"{found} prompts read, {found - len(unique)} repeated, {len(out)} left out as a benchmark's; of {len(kept)} "
        f"kept, {len(held)} are held out, and {overlap:.2%} of their 8-grams are in a benchmark."
    )
    write_chats(plan.out / "held-out.jsonl", held)
    write_chats(file, kept)
    return kept


def answering(
    plan: Collection, sampling: dict, jobs: list[Job], chats: list[Chat], tokens: ChatTokens
) -> Iterator[tuple[Job, np.ndarray]]:
    """The answers, from whoever was asked for."""
    seed = plan.seed if plan.seeds or plan.answers != "server" else None
    asking = Asking(seed, float(sampling["top_p"]), int(sampling["top_k"]), plan.thinking)
    by_index = dict(enumerate(chats))
    if plan.answers == "server":
        return from_server(plan.server, jobs, by_index, tokens, asking)
    if plan.answers == "engines":
        return from_engines(plan.bundle, checkpoint_hash(plan.target), jobs, asking)
    if plan.answers == "logs":
        return from_logs(jobs, by_index, tokens)
    if asking.top_p < 1 or asking.top_k:
        raise ValueError("the PyTorch sampler knows no top_p or top_k; use engines, a server, or --top-p 1 --top-k 0.")
    import torch

    from training.target import TargetModel

    model = TargetModel.from_pretrained(plan.target, dtype=torch.bfloat16)
    room = dict(slots=plan.slots, capacity=plan.max_prompt + plan.max_new, max_new=plan.max_new)
    return BatchSampler(model, tokens.eos, plan.seed, **room).run(jobs)


def rendered(tokens: ChatTokens, chat: Chat, thinking: bool | None) -> list[int]:
    """Token ids of the chat up to the assistant's first token, by the target's template."""
    messages = [{"role": role, "content": text} for role, text in chat.messages]
    extra = {} if thinking is None else {"enable_thinking": thinking}
    return tokens.encode(tokens.template.render(messages=messages, add_generation_prompt=True, **extra))


def recommended(plan: Collection) -> dict:
    """temperature, top_p, top_k: as asked, else of the target's generation_config.json, else 1, 1, 0."""
    file = plan.target / "generation_config.json"
    raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    default = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    said = {name: raw.get(name, value) for name, value in default.items()}
    if plan.temperature not in ("recommended", "mixed"):
        said["temperature"] = float(plan.temperature)
    for name in ("top_p", "top_k"):
        if (value := getattr(plan, name)) is not None:
            said[name] = value
    return said


def settings(plan: Collection, sampling: dict) -> dict:
    """What a later run in the same folder must have in common with this one."""
    named = {"sources": list(plan.sources), "exclude": list(plan.exclude), "count": plan.count, "seed": plan.seed}
    asked = {"answers": plan.answers, "thinking": plan.thinking, "max_new": plan.max_new, "max_prompt": plan.max_prompt}
    temperature = "mixed" if plan.temperature == "mixed" else sampling["temperature"]
    drawn = {"temperature": temperature, "top_p": sampling["top_p"], "top_k": sampling["top_k"]}
    by = {}
    if plan.server and plan.answers == "server":
        by = {"model": plan.server.model, "api": plan.server.api} | ({} if plan.seeds else {"seeds": False})
    return {"format": 1, "parts": 1, **named, **asked, **drawn, **by, "target_sha256": checkpoint_hash(plan.target)}

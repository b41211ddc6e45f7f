"""On-policy data: the target answers prompts, and the token sequences are kept in shards.

Knows: the folder of data, resuming, which prompts are asked. Refuses to know: drafts, losses, features.

A folder of data holds `meta.json` (settings, the target's hash), and for each part (process) p `prompts-0p.jsonl` and
`shard-0p-00000.safetensors`, ... each with n sequences (prompt + answer with its end token): tokens [T] int32 (flat),
offsets [n+1] int64, prompt_lengths [n] int32, kind [n] uint8 (index into KINDS), temperature [n] float32,
index [n] int32 (line i of part p's prompts is i * parts + p).
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from training.checkpoint import checkpoint_hash
from training.prompts import KINDS, Prompt, close, openings, prompts, read_prompts, write_prompts
from training.sampling import BatchSampler, ChatTokens, Job, draw_temperature
from training.target import TargetModel

OWN_SHARE = 0.37
FIRST_OPENING = 1_000_000  # jobs that finish prompts are numbered apart: other randomness


@dataclass(frozen=True)
class Sequence:
    """tokens [T] int32 = prompt + answer; the answer is tokens[prompt_length:]."""

    tokens: np.ndarray
    prompt_length: int
    kind: str


def load_sequences(folder: str | Path, hot_share: float = 1.0) -> list[Sequence]:
    """The sequences of the folder's complete shards, in the shards' order; of those sampled at temperature 1 or more
    only the share `hot_share`, chosen by index. Raises FileNotFoundError without any shard."""
    files = sorted(Path(folder).glob("shard-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no shard-*.safetensors file; run `python -m training generate` first.")
    return [sequence for file in files for sequence in _read_shard(file, hot_share)]


def read_shard(file: Path, *names: str) -> list[np.ndarray]:
    """The named tensors of a shard. Raises ValueError, one sentence, for one that is cut off or holds others."""
    try:
        with safe_open(file, framework="numpy") as handle:
            return [handle.get_tensor(name) for name in names]
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is corrupt ({error}); remove it and run the command again, which answers its prompts anew."
        ) from None


def _read_shard(file: Path, hot_share: float) -> Iterator[Sequence]:
    names = ("tokens", "offsets", "prompt_lengths", "kind", "index", "temperature")
    tokens, offsets, lengths, kind, index, temperature = read_shard(file, *names)
    for i, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if temperature[i] < 1.0 or index[i] * 0.6180339887 % 1.0 < hot_share:
            yield Sequence(tokens[start:end], int(lengths[i]), KINDS[kind[i]])


class ShardWriter:
    """Collects finished sequences of one part and writes a shard whenever `size` are there.

    `done` holds the prompt indices that the part's earlier shards answer already.
    """

    def __init__(self, folder: Path, part: int, size: int):
        self.folder, self.part, self.size, self.rows = folder, part, size, []
        self.done: set[int] = set()
        self.number = 0
        for file in sorted(folder.glob(f"shard-{part:02d}-*.safetensors")):
            self.done.update(read_shard(file, "index")[0].tolist())
            self.number = int(file.stem.rsplit("-", 1)[1]) + 1

    def add(self, job: Job, answer: np.ndarray, kind: str) -> None:
        self.rows.append((job, answer, kind))
        if len(self.rows) >= self.size:
            self.flush()

    def flush(self) -> None:
        """Writes what is there; the shard appears under its name only when it is complete."""
        if not self.rows:
            return
        jobs, answers, kinds = zip(*self.rows)
        flat = [np.concatenate([np.asarray(j.tokens, np.int32), a]) for j, a in zip(jobs, answers)]
        tensors = {
            "tokens": np.concatenate(flat),
            "offsets": np.cumsum([0] + [len(f) for f in flat], dtype=np.int64),
            "prompt_lengths": np.array([len(j.tokens) for j in jobs], np.int32),
            "kind": np.array([KINDS.index(k) for k in kinds], np.uint8),
            "index": np.array([j.index for j in jobs], np.int32),
            "temperature": np.array([j.temperature for j in jobs], np.float32),
        }
        name = self.folder / f"shard-{self.part:02d}-{self.number:05d}.safetensors"
        save_file(tensors, name.with_suffix(".part"))
        name.with_suffix(".part").rename(name)
        self.rows, self.number = [], self.number + 1


def generate(
    target: Path, out: Path, *, count: int, seed: int, prompt_file: Path | None = None, part: int = 0, parts: int = 1,
    slots: int = 64, max_new: int = 320, max_prompt: int = 448, shard_size: int = 200, dtype: str = "bfloat16",
    own_share: float = OWN_SHARE, minutes: float = 0.0,
) -> dict:
    """Answers `count` prompts with the target and writes the folder `out`; goes on where an earlier run stopped.

    parts > 1 splits the prompts among as many processes, each started with its own `part`. own_share of the prompts
    are finished by the target itself from openings. minutes > 0 ends the run early. Returns this part's counts.
    Raises ValueError when `out` was begun with other settings.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part is {part}; with parts {parts} it must be one of 0..{parts - 1}.")
    torch.set_flush_denormal(True)
    target, out = Path(target), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = dict(
        format=1, seed=seed, count=count, parts=parts, max_new=max_new, max_prompt=max_prompt, own_share=own_share,
        prompt_file=prompt_file.name if prompt_file else None, target_sha256=checkpoint_hash(target),
        temperatures={"0": 0.4, "0.7": 0.2, "1.0": 0.4}, dtype=dtype,
    )
    check_settings(out, settings)
    chat = ChatTokens(target)
    model = TargetModel.from_pretrained(target, dtype=getattr(torch, dtype))
    sampler = BatchSampler(model, chat.eos, seed, slots=slots, capacity=max_prompt + max_new, max_new=max_new)

    chosen = out / f"prompts-{part:02d}.jsonl"
    if not chosen.exists():
        if prompt_file:
            items = list(itertools.islice(read_prompts(prompt_file), count))[part::parts]
        else:
            items = own_prompts(sampler, chat, count, seed, own_share, part, parts)
        write_prompts(chosen, items)
    items = list(read_prompts(chosen))

    writer, skipped = ShardWriter(out, part, shard_size), 0
    jobs = []
    for i, prompt in enumerate(items):
        index, tokens = i * parts + part, chat.question(prompt.text)
        if len(tokens) > max_prompt:
            skipped += 1
        elif index not in writer.done:
            jobs.append(Job(index, tokens, draw_temperature(seed, index), max_new))
    answered = total = 0
    try:
        for job, answer in progress(sampler.run(jobs, 60 * minutes or math.inf), len(jobs), "answers"):
            writer.add(job, answer, items[job.index // parts].kind)
            answered, total = answered + 1, total + len(answer)
    finally:
        writer.flush()
    return dict(
        answered=answered, answer_tokens=total, too_long=skipped, resumed=len(writer.done), shards=writer.number
    )


def own_prompts(
    sampler: BatchSampler, chat: ChatTokens, count: int, seed: int, own_share: float, part: int, parts: int
) -> list[Prompt]:
    """This part's prompts: (1 - own_share) from the templates, the others finished by the target from openings."""
    written = list(prompts(round(count * (1 - own_share)), seed))[part::parts]
    begun = list(openings(count - round(count * (1 - own_share)), seed))[part::parts]
    longest = min(120, sampler.answers.shape[1])
    jobs = [Job(FIRST_OPENING + i * parts + part, chat.unfinished(p.text), 0.9, longest) for i, p in enumerate(begun)]
    for job, tokens in progress(sampler.run(jobs), len(jobs), "prompts"):
        opening = begun[(job.index - FIRST_OPENING) // parts]
        if tokens[-1] == chat.eos and (prompt := close(opening, chat.decode(tokens))):
            written.append(prompt)
    written = list(dict.fromkeys(sorted(written, key=lambda p: p.text)))
    order = np.random.default_rng((seed, part)).permutation(len(written))
    return [written[i] for i in order]


def progress(results: Iterator, total: int, what: str) -> Iterator:
    """Passes (job, tokens) on, with a bar that shows finished sequences, tok/s of finished ones, and the time left."""
    from tqdm import tqdm

    begin, tokens = time.monotonic(), 0
    with tqdm(total=total, desc=what, unit="seq", mininterval=5.0) as bar:
        for job, answer in results:
            tokens += len(answer)
            bar.update()
            bar.set_postfix(tokens=tokens, tok_s=f"{tokens / (time.monotonic() - begin):.0f}", refresh=False)
            yield job, answer


def check_settings(out: Path, settings: dict) -> None:
    file = out / "meta.json"
    if file.exists():
        before = json.loads(file.read_text())
        other = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in settings.items() if before.get(k) != v]
        if other:
            raise ValueError(f"{out} was begun with other settings ({'; '.join(other)}); choose another folder.")
    file.write_text(json.dumps(settings, indent=2) + "\n")

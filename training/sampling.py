"""Sampling from the target, many sequences at a time: slot refill, prompts as tokens, one random stream a sequence.

Knows: decoding in batches with static caches, the chat template. Refuses to know: where prompts come from, data files.

Legend: B slots (sequences decoded together), R active ones (always the first R rows), S cache positions a slot,
C cache positions attended in a step, V vocabulary, H / H_kv query / key-value heads, D head size.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.target import PackedBatch, TargetModel, rotate

PREFILL_GROUP = 8
C_STEP = 32


_HERE = "<<here>>"


@dataclass(frozen=True)
class Job:
    """One sequence to sample: `tokens` is the prompt; everything random comes from (seed, index)."""

    index: int
    tokens: list[int]
    temperature: float
    max_new: int


class BatchSampler:
    """Keeps B slots decoding: a finished slot takes the next prompt, whose cache was filled before in a small group."""

    def __init__(self, model: TargetModel, eos: int, seed: int, *, slots: int, capacity: int, max_new: int):
        """capacity is S: no prompt plus its answer may be longer. max_new bounds every job's own limit."""
        self.model, self.eos, self.seed, self.slots, self.capacity = model, eos, seed, slots, capacity
        self.caches = model.new_caches(slots, capacity)
        self.turns = {(s.rope, s.head_dim): model.rope_tables(capacity, s) for s in model.shapes}
        self.length = torch.zeros(slots, dtype=torch.int64)  # cache positions filled = position of `token`
        self.token = torch.zeros(slots, dtype=torch.int64)  # sampled, not yet in the cache
        self.produced = torch.zeros(slots, dtype=torch.int64)
        self.limit = torch.zeros(slots, dtype=torch.int64)
        self.temperature = torch.zeros(slots)
        self.uniforms = torch.zeros(slots, max_new)
        self.answers = torch.zeros(slots, max_new, dtype=torch.int64)
        self.jobs: list[Job] = []  # jobs[r] decodes in row r
        self.steps = self.row_steps = 0

    @torch.inference_mode()
    def run(self, jobs: Iterable[Job], seconds: float = math.inf) -> Iterator[tuple[Job, np.ndarray]]:
        """Yields (job, answer tokens with the end token) in the order in which they finish.

        After `seconds` no further job is begun; those under way are finished."""
        begin = time.monotonic()
        queue = itertools.takewhile(
            lambda _: time.monotonic() - begin < seconds, by_length(jobs, window=4 * self.slots)
        )
        ready: deque = deque()
        while True:
            while len(self.jobs) < self.slots:
                if not ready:
                    group = list(itertools.islice(queue, PREFILL_GROUP))
                    if not group:
                        break
                    ready.extend(self._prefill(group))
                self._admit(*ready.popleft())
                yield from self._finished(from_row=len(self.jobs) - 1)
            if not self.jobs:
                return
            self._step()
            yield from self._finished()

    def _prefill(self, group: list[Job]) -> list[tuple]:
        """Fills a small cache for the group; gives (job, caches, row, logits [V]) for each."""
        lengths = [len(j.tokens) for j in group]
        caches = self.model.new_caches(len(group), max(lengths))
        batch = PackedBatch.build([j.tokens for j in group], [0] * len(group), max(lengths))
        logits = self.model(batch, torch.tensor(lengths).cumsum(0) - 1, caches).logits
        return [(job, caches, i, logits[i]) for i, job in enumerate(group)]

    def _admit(self, job: Job, caches: list, i: int, logits: Tensor) -> None:
        """Copies a prefilled row into the first free slot and samples its first answer token."""
        r, n = len(self.jobs), len(job.tokens)
        for (k, v), (new_k, new_v) in zip(self.caches, caches):
            k[r, :, :n], v[r, :, :n] = new_k[i, :, :n], new_v[i, :, :n]
        self.jobs.append(job)
        self.length[r], self.produced[r], self.limit[r], self.temperature[r] = n, 0, job.max_new, job.temperature
        self.uniforms[r] = torch.from_numpy(draws(self.seed, job.index)[1](self.uniforms.shape[1]))
        self._append(slice(r, r + 1), logits[None])

    def _append(self, rows: slice, logits: Tensor) -> None:
        """Samples one token for each of the rows and notes it as the answer's next."""
        at = self.produced[rows, None]
        picked = pick(logits, self.temperature[rows], self.uniforms[rows].gather(1, at)[:, 0])
        self.answers[rows] = self.answers[rows].scatter(1, at, picked[:, None])
        self.token[rows] = picked
        self.produced[rows] += 1

    def _finished(self, from_row: int = 0) -> Iterator[tuple[Job, np.ndarray]]:
        """Takes out the rows that ended; the last active row moves into each gap, so that active rows stay in front."""
        R = len(self.jobs)
        done = (self.token[from_row:R] == self.eos) | (self.produced[from_row:R] >= self.limit[from_row:R])
        for r in reversed((done.nonzero()[:, 0] + from_row).tolist()):
            job, last = self.jobs[r], len(self.jobs) - 1
            yield job, self.answers[r, : self.produced[r]].numpy().astype(np.int32)
            if r != last:
                n = int(self.length[last])
                for k, v in self.caches:
                    k[r, :, :n], v[r, :, :n] = k[last, :, :n], v[last, :, :n]
                for state in (self.length, self.token, self.produced, self.limit, self.temperature):
                    state[r] = state[last]
                self.uniforms[r], self.answers[r] = self.uniforms[last], self.answers[last]
                self.jobs[r] = self.jobs[last]
            self.jobs.pop()

    def _step(self) -> None:
        """One decode step of the R active rows; the query heads of a key-value head are the rows of one product."""
        model, R = self.model, len(self.jobs)
        at = self.length[:R]
        C = min(self.capacity, (int(at.max()) // C_STEP + 1) * C_STEP)
        turns = {key: [table[at][:, None] for table in tables] for key, tables in self.turns.items()}
        x, own = model.embed(self.token[:R])
        biases = {s.window: bias_of(at, C, s.window) for s in model.shapes}
        rows = torch.arange(R)
        for i, (layer, s) in enumerate(zip(model.layers, model.shapes)):
            attn, h, turn, bias = layer.self_attn, layer.input_layernorm(x), turns[s.rope, s.head_dim], biases[s.window]
            k, v = self.caches[s.source]
            if s.source == i:
                k[rows, :, at] = rotate(attn.keys(h), *turn)
                v[rows, :, at] = attn.values(h)
            q = rotate(attn.queries(h), *turn) * s.attention_scale
            q = q.unflatten(1, (attn.kv_heads, -1)).flatten(0, 1)
            scores = torch.bmm(q, k[:R, :, :C].flatten(0, 1).contiguous().transpose(1, 2)).float()
            weights = torch.softmax(scores.unflatten(0, (R, -1)) + bias, -1).to(x.dtype).flatten(0, 1)
            o = torch.bmm(weights, v[:R, :, :C].flatten(0, 1).contiguous()).view(R, -1)
            x = layer.finish(x, o, own[i])
        self.length[:R] += 1
        self._append(slice(0, R), model.head(model.norm(x)))
        self.steps += 1
        self.row_steps += R


def bias_of(at: Tensor, C: int, window: int | None) -> Tensor:
    """at [R], positions of the queries -> [R, 1, 1, C]: 0 = attend, -inf = not."""
    back = at[:, None] - torch.arange(C)
    out = (back < 0) if window is None else (back < 0) | (back >= window)
    return torch.zeros(len(at), C).masked_fill_(out, -torch.inf)[:, None, None]


def pick(logits: Tensor, temperature: Tensor, uniforms: Tensor) -> Tensor:
    """logits [R, V], temperature [R] (0 = greedy), uniforms [R] in [0, 1) -> tokens [R] int64, by inverse CDF."""
    out = logits.argmax(-1)
    hot = (temperature > 0).nonzero()[:, 0]
    if len(hot):
        cdf = torch.softmax(logits[hot].float() / temperature[hot, None], -1).cumsum(-1)
        found = torch.searchsorted(cdf, uniforms[hot, None] * cdf[:, -1:], right=True)
        out[hot] = found[:, 0].clamp(max=logits.shape[-1] - 1)
    return out


def draws(seed: int, index: int) -> tuple[float, Callable[[int], np.ndarray]]:
    """The randomness of one sequence: its draw for the temperature, and n -> n uniforms [n] float32."""
    rng = np.random.default_rng((seed, index))
    return rng.random(), lambda n: rng.random(n, dtype=np.float32)


def draw_temperature(seed: int, index: int) -> float:
    """0 for 40% of the sequences, 0.7 for 20%, 1.0 for 40%."""
    u = draws(seed, index)[0]
    return 0.0 if u < 0.4 else 0.7 if u < 0.6 else 1.0


def by_length(jobs: Iterable[Job], window: int) -> Iterator[Job]:
    """The jobs, sorted inside groups of PREFILL_GROUP taken from windows, so that a prefill group pads little."""
    jobs = iter(jobs)
    while chunk := sorted(itertools.islice(jobs, window), key=lambda j: len(j.tokens)):
        groups = [chunk[i : i + PREFILL_GROUP] for i in range(0, len(chunk), PREFILL_GROUP)]
        for i in np.random.default_rng(len(chunk)).permutation(len(groups)):
            yield from groups[i]


class ChatTokens:
    """The target's tokenizer and chat template, without transformers."""

    def __init__(self, folder: Path):
        import jinja2.sandbox
        from tokenizers import Tokenizer

        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder} holds no {name}; is it a Hugging Face folder?")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        template = folder / "chat_template.jinja"
        source = template.read_text() if template.exists() else _config(folder)["chat_template"]
        self.template = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        ).from_string(source)
        self.eos = self.tokenizer.token_to_id(str(_config(folder)["eos_token"]))

    def question(self, text: str) -> list[int]:
        """Token ids of a user's turn with the template's default system prompt, up to the assistant's first token."""
        messages = [{"role": "user", "content": text}]
        return self.encode(self.template.render(messages=messages, add_generation_prompt=True))

    def unfinished(self, text: str) -> list[int]:
        """The same, cut right behind `text`: the target goes on as the user."""
        messages = [{"role": "user", "content": text + _HERE}]  # a mark, because `text` may be empty
        rendered = self.template.render(messages=messages, add_generation_prompt=False)
        return self.encode(rendered[: rendered.rindex(_HERE)])

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)


def _config(folder: Path) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text())

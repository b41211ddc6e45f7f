"""`record`: held-out on-policy rollouts with every drafted token verified, for calibration and for simulation.

Knows: prompt files with kinds, the arrays below. Refuses to know: what is fitted on them, how a round works.

The text is the target's own (decoding is lossless), so the rounds are on-policy. Because whole blocks are verified
(schedule `fixed`), `accepted` tells for every slot k whether the first k tokens survived, without any selection.

The file (npz; B rounds, G block size):
    confidence_logits [B, G] float32   raw, before temperature and sigmoid
    accepted          [B] int16        leading accepted tokens of the whole block, 0..G
    temperature       [B] float32      the request's (0 = greedy)
    request           [B] int32        which request the round belongs to; rounds of one request are in their order
    position          [B] int32        absolute position of the round's anchor
    kind              [B] str          of the prompt: maths, code, chat, or what the prompt file calls it
    meta              str              JSON: date, bundle, draft_hash, target_hash, dtype, block_size, schedule, ...
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Callable
from typing import Sequence as List

import numpy as np
from numpy import ndarray

from engines import Engines

from .chat import ChatTokenizer
from .generate import progress
from .loop import Loop
from .request import Limits, Request, RequestError, SamplingParams, validate
from .schedule import make
from .trace import RoundTrace

DEFAULT_KIND = "chat"


class RecordError(ValueError):
    """A prompt file or an option that does not fit; one sentence."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt, and its kind."""

    ids: tuple[int, ...]
    kind: str


@dataclass
class Recorder:
    """An observer of the loop that keeps every round whose whole block was verified.

    prompt_lengths: by request id; requests that are not in it are left out. The anchor's position is counted from it:
    the prefill pass gives the token at the prompt's end, each round accepted + 1 more.
    """

    block_size: int
    prompt_lengths: dict[int, int]
    wants_confidence: bool = True
    _anchors: dict[int, int] = field(default_factory=dict)
    _rounds: list[tuple[ndarray, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(ids) for ids, *_ in self._rounds)

    def round(self, trace: RoundTrace) -> None:
        known = np.array([i in self.prompt_lengths for i in trace.ids], bool)
        anchors = np.array([self._anchors.get(i, self.prompt_lengths.get(i, 0)) for i in trace.ids])
        for i, anchor, accepted in zip(trace.ids, anchors.tolist(), trace.accepted.tolist()):
            self._anchors[i] = anchor + accepted + 1
        full = known & trace.drafted & (trace.verified == self.block_size)
        if full.any():
            ids = np.array([i for i, kept in zip(trace.ids, full) if kept], np.int32)
            self._rounds.append(
                (
                    ids,
                    trace.confidence_logits[full].copy(),
                    trace.accepted[full],
                    trace.temperature[full],
                    anchors[full],
                )
            )

    def arrays(self) -> dict[str, ndarray]:
        """The arrays of the file but `kind` and `meta`, ordered by request and then by round."""
        G = self.block_size
        parts = list(zip(*self._rounds)) or [
            [np.zeros((0, G) if column == 1 else 0)] for column in range(5)
        ]
        request, logits, accepted, temperature, position = map(np.concatenate, parts)
        order = np.argsort(request, kind="stable")
        return {
            "confidence_logits": logits[order].astype(np.float32),
            "accepted": accepted[order].astype(np.int16),
            "temperature": temperature[order].astype(np.float32),
            "request": request[order].astype(np.int32),
            "position": position[order].astype(np.int32),
        }


def read_prompts(files: List[Path], tokenizer: ChatTokenizer | None) -> list[Prompt]:
    """The prompts of JSONL files: `messages` or the user's text `prompt` or `turns[0]` (through the chat template), or
    `input_ids`; `kind` where given. Raises RecordError naming the file and line, OSError for a file that cannot be
    read."""
    prompts = []
    for file in files:
        for number, raw in enumerate(Path(file).read_bytes().splitlines(), 1):
            if not raw.strip():
                continue
            try:
                prompts.append(_prompt(json.loads(raw.decode()), tokenizer))
            except (RequestError, ValueError, RecursionError) as error:
                raise RecordError(f"{file}:{number}: {str(error).rstrip('.')}.") from None
    if not prompts:
        raise RecordError(
            f"{', '.join(map(str, files)) or '--prompts'} holds no prompt; lines need prompt, messages or input_ids."
        )
    return prompts


def _prompt(line: object, tokenizer: ChatTokenizer | None) -> Prompt:
    if not isinstance(line, dict):
        raise RequestError("it must be a JSON object.")
    kind = line.get("kind", DEFAULT_KIND)
    if not isinstance(kind, str) or not kind:
        raise RequestError(f"kind is {kind!r}; it must be a text.")
    ids = line.get("input_ids")
    if ids is not None:
        if not isinstance(ids, list) or any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
            raise RequestError("input_ids must be a list of integers.")
        return Prompt(tuple(ids), kind)
    turns, messages = line.get("turns"), line.get("messages")
    if messages is None:
        text = line.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
        if not isinstance(text, str) or not text.strip():
            raise RequestError("it has no prompt, turns, messages or input_ids.")
        messages = [{"role": "user", "content": text}]
    if tokenizer is None:
        raise RequestError("text needs a tokenizer and this bundle has none; send input_ids.")
    return Prompt(tuple(tokenizer.encode_messages(messages)), kind)


def record(
    engines: Engines, prompts: List[Prompt], output: Path, *, temperatures: List[float] = (0.0, 1.0),
    max_tokens: int = 160, requests: int = 0, max_requests: int = 16, seed: int = 0, minutes: float = 0.0,
    least: int = 0, command: str = "",
) -> dict:
    """Decodes each of the first `requests` (0 = all) prompts once at every temperature, mixed in the batch in random
    order, and writes `output` (beside, then renamed). minutes > 0 stops there, once there are `least` rounds; they are
    kept.

    A prompt is cut short by the context's end. Returns the meta. Raises RecordError before anything is decoded.
    """  # fmt: skip
    bundle, G = engines.bundle, engines.bundle.draft.block_size
    options = {"max-tokens": (max_tokens, 2), "requests": (requests, 0), "minutes": (minutes, 0), "least": (least, 0)}
    for name, (value, lowest) in options.items():
        if value < lowest:
            raise RecordError(f"{name} is {value}; it must be {lowest} or more.")
    if not temperatures:
        raise RecordError("temperature is empty; it must hold at least 1 number.")
    limits, todo, kinds = Limits.of(bundle), [], {}
    for i, prompt in enumerate(prompts[: requests or None]):
        for j, temperature in enumerate(temperatures):
            number = i * len(temperatures) + j
            room = min(max_tokens, max(limits.context - len(prompt.ids), 1))
            params = SamplingParams(room, temperature, seed=(seed + number) % (1 << 64))
            todo.append(Request(number, prompt.ids, params))
            kinds[number] = prompt.kind
    for request in todo:
        try:
            validate(request, limits)
        except RequestError as error:
            raise RecordError(f"prompt {request.id // len(temperatures) + 1}: {error}") from None
    recorder = Recorder(G, {r.id: len(r.prompt_ids) for r in todo})
    loop = Loop(engines, make("fixed"), max_requests=max_requests, observers=(recorder,))
    for i in np.random.default_rng(seed).permutation(len(todo)):
        loop.add(todo[i])
    over = lambda seconds: bool(minutes) and seconds >= 60 * minutes and len(recorder) >= least
    seconds, finished = _drive(loop, len(todo), over)
    arrays = recorder.arrays()
    if not len(recorder):
        raise RecordError("no whole block was verified; the answers are too short, or the bundle's draft is not run.")
    meta = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": command,
        "bundle": bundle.folder.name, "draft_hash": bundle.draft.hash, "target_hash": bundle.target.hash,
        "dtype": bundle.dtype, "block_size": G, "depth": bundle.draft.depth, "schedule": "fixed", "accept": "rejection",
        "temperatures": [float(t) for t in temperatures], "prompts": len(prompts[: requests or None]),
        "requests": len(todo), "finished": finished, "max_tokens": max_tokens, "seed": seed, "rounds": len(recorder),
        "seconds": round(seconds, 1), "acceptance_length": round(float(arrays["accepted"].mean()) + 1, 4),
    }  # fmt: skip
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    with partial.open("wb") as file:
        kind = np.array([kinds[r] for r in arrays["request"].tolist()])
        np.savez_compressed(file, **arrays, kind=kind, meta=np.array(json.dumps(meta)))
    partial.replace(output)
    return meta


def _drive(loop: Loop, total: int, over: Callable[[float], bool]) -> tuple[float, int]:
    """Runs the loop to its end or until over(seconds so far). Returns seconds and how many requests ended."""
    started, finished = perf_counter(), 0
    with progress(total, "recording") as advance:
        while loop.has_work and not over(perf_counter() - started):
            for output in loop.step():
                if output.finish_reason == "error":
                    raise RecordError(f"request {output.request_id} failed: {output.error}")
                if output.finish_reason:
                    finished += 1
                    advance()
    return perf_counter() - started, finished

"""`generate`: JSONL in, JSONL out, through the decode loop.

Knows: the line formats below. Refuses to know: how a round works.

An input line is an object with exactly one of
    prompt     text, encoded as it is (no chat template)
    messages   a chat, through the bundle's chat template
    input_ids  token ids
and optionally id, max_tokens, temperature, seed, threshold. An output line, in input order, holds id, output_ids (new
tokens), text, finish_reason, num_input_tokens, num_output_tokens and rounds: [{drafted, verified, accepted}], one for
each verify pass (the prefill pass, which gives the first token, is none). A line that is refused gives {"id", "error"}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Callable

from engines import Engines

from .chat import ChatTokenizer
from .detokenize import Vocabulary, detokenizer
from .loop import Loop, Output
from .request import Request, RequestError, SamplingParams

KEYS = {"prompt", "messages", "input_ids", "id", "max_tokens", "temperature", "seed", "threshold", "ignore_eos"}


@dataclass
class Answer:
    """One line on its way: refused (error), or with what came so far."""

    line: int
    id: Any
    request: Request | None = None
    error: str | None = None
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    rounds: list[dict[str, int]] = field(default_factory=list)

    def take(self, output: Output) -> None:
        self.output_ids += output.token_ids
        self.finish_reason = output.finish_reason
        if output.stats:
            stats = output.stats
            self.rounds.append({"drafted": stats.drafted, "verified": stats.verified, "accepted": stats.accepted})
        if output.error:
            self.error = f"line {self.line}: {output.error}"

    def as_dict(self, vocabulary: Vocabulary | None) -> dict:
        if self.error:
            return {"id": self.id, "error": self.error}
        text = ""
        if vocabulary:
            state = detokenizer(vocabulary)
            text = state.push(self.output_ids) + state.flush()
        return {
            "id": self.id,
            "output_ids": self.output_ids,
            "text": text,
            "finish_reason": self.finish_reason,
            "num_input_tokens": len(self.request.prompt_ids),
            "num_output_tokens": len(self.output_ids),
            "rounds": self.rounds,
        }


def read_answers(file: Path, tokenizer: ChatTokenizer | None, defaults: SamplingParams) -> list[Answer]:
    """One Answer per non-empty line of `file`; a line's default seed is (seed + its number from 0) mod 2^64."""
    answers = []
    with file.open("rb") as handle:
        for number, raw in enumerate((line for line in handle if line.strip()), start=1):
            answer = Answer(line=number, id=number - 1)
            try:
                parsed = _parse(raw)
                answer.id = parsed.get("id", number - 1)
                answer.request = _request(parsed, number - 1, tokenizer, defaults)
            except (RequestError, UnicodeDecodeError) as error:
                reason = "it is not valid UTF-8." if isinstance(error, UnicodeDecodeError) else str(error)
                answer.error = f"line {number}: {reason}"
            answers.append(answer)
    return answers


def _parse(raw: bytes) -> dict:
    try:
        parsed = json.loads(raw.decode())
    except json.JSONDecodeError as error:
        raise RequestError(f"it is not JSON ({error.msg} at column {error.colno}).") from None
    except RecursionError:
        raise RequestError("it is not JSON (nested too deeply).") from None
    if not isinstance(parsed, dict):
        raise RequestError("it must be a JSON object.")
    if unknown := sorted(parsed.keys() - KEYS):
        raise RequestError(f"{unknown[0]!r} is not a known field; the fields are {', '.join(sorted(KEYS))}.")
    return parsed


def _request(parsed: dict, index: int, tokenizer: ChatTokenizer | None, defaults: SamplingParams) -> Request:
    given = [k for k in ("prompt", "messages", "input_ids") if k in parsed]
    if len(given) != 1:
        raise RequestError(f"it holds {len(given)} of prompt, messages and input_ids; it must hold exactly 1.")
    if given[0] == "input_ids":
        ids = parsed["input_ids"]
        if not isinstance(ids, list) or any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
            raise RequestError("input_ids must be a list of integers.")
    elif tokenizer is None:
        raise RequestError(f"{given[0]} needs a tokenizer and this bundle has none; send input_ids.")
    elif given[0] == "messages":
        ids = tokenizer.encode_messages(parsed["messages"])
    elif not isinstance(parsed["prompt"], str):
        raise RequestError("prompt must be a string.")
    else:
        ids = tokenizer.encode(parsed["prompt"])
    if any(not -1 << 63 <= i < 1 << 63 for i in ids):
        raise RequestError("input_ids holds a number outside int64.")
    ignore_eos = parsed.get("ignore_eos", defaults.ignore_eos)
    if not isinstance(ignore_eos, bool):
        raise RequestError(f"ignore_eos is {ignore_eos!r}; it must be true or false.")
    params = SamplingParams(
        max_tokens=parsed.get("max_tokens", defaults.max_tokens),
        temperature=parsed.get("temperature", defaults.temperature),
        seed=parsed.get("seed", (defaults.seed + index) % (1 << 64)),
        ignore_eos=ignore_eos,
        threshold=parsed.get("threshold", defaults.threshold),
    )
    return Request(id=index, prompt_ids=tuple(ids), params=params)


def decode_all(loop: Loop, answers: list[Answer], on_done: Callable[[Answer], None] = lambda answer: None) -> None:
    """Runs every answer's request to its end; what the loop refuses becomes that answer's error."""
    by_id = {}
    for answer in answers:
        if answer.request is None:
            continue
        try:
            loop.add(answer.request)
            by_id[answer.request.id] = answer
        except RequestError as error:
            answer.error = f"line {answer.line}: {error}"
    while loop.has_work:
        for output in loop.step():
            answer = by_id[output.request_id]
            answer.take(output)
            if output.finish_reason:
                on_done(answer)


def load_tokenizer(engines: Engines) -> ChatTokenizer | None:
    """The bundle's tokenizer, None when it has none."""
    return ChatTokenizer(engines.bundle.folder) if engines.bundle.tokenizer_file else None


def run(loop: Loop, answers: list[Answer], output: Path, tokenizer: ChatTokenizer | None) -> dict:
    """Decodes `answers` into `output` (written beside, then renamed). Returns the run's report."""
    started = perf_counter()
    with progress(sum(a.request is not None for a in answers), "decoding") as advance:
        decode_all(loop, answers, lambda answer: advance())
    seconds = perf_counter() - started
    vocabulary = Vocabulary(tokenizer.tokenizer) if tokenizer else None
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text("".join(json.dumps(a.as_dict(vocabulary), ensure_ascii=False) + "\n" for a in answers), "utf-8")
    partial.replace(output)
    metrics = loop.metrics
    return {
        "requests": len(answers),
        "refused": sum(a.error is not None for a in answers),
        "output_tokens": metrics.emitted_tokens,
        "seconds": seconds,
        "tokens_per_second": metrics.emitted_tokens / seconds if seconds else 0.0,
        "acceptance_length": metrics.acceptance_length,
        "acceptance_per_position": [a / v if v else 0.0 for a, v in zip(metrics.accepted_at, metrics.verified_at)],
        "share_outside_engines": metrics.share_outside_engines,
        "metrics": metrics.as_dict(),
    }


class progress:
    """A bar on stderr, shown only after two seconds: `with progress(total, text) as advance: advance()`."""

    def __init__(self, total: int, text: str):
        self.total, self.text, self.done, self.bar, self.started = total, text, 0, None, perf_counter()

    def __enter__(self) -> Callable[[], None]:
        return self._advance

    def _advance(self) -> None:
        self.done += 1
        if self.bar is None and perf_counter() - self.started > 2:
            from rich.console import Console
            from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

            columns = [
                *Progress.get_default_columns()[:2],
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            ]
            self.bar = Progress(*columns, console=Console(file=sys.stderr))
            self.bar.start()
            self.task = self.bar.add_task(self.text, total=self.total)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

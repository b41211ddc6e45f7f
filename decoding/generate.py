"""`generate`: JSONL in, JSONL out, through the decode loop.

Knows: the line formats below. Refuses to know: how a round works.

An input line is an object with exactly one of
    prompt     text, encoded as it is (no chat template)
    messages   a chat, through the bundle's chat template
    input_ids  token ids
and optionally id, stop_words (texts: the answer ends before the first of them) and any field of SamplingParams under
its name: max_tokens, temperature, seed, accept, top_k, top_p, min_p, repetition_penalty, presence_penalty,
frequency_penalty, min_tokens, threshold, ignore_eos, speculative, return_log_probs, bad_words (texts or lists of token
ids) and logit_bias ({"token id": bias} or pairs). An output line, in input order, holds id, output_ids (new tokens),
text, finish_reason, num_input_tokens, num_output_tokens and rounds: [{drafted, verified, accepted}], one for each
verify pass (the prefill pass, which gives the first token, is none), and log_probs where they were asked for. A line
that is refused gives {"id", "error"}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Callable

from engines import Engines

from .chat import ChatTokenizer
from .detokenize import StopWords, Vocabulary, detokenizer
from .loop import Loop, Output
from .request import Request, RequestError, SamplingParams

PARAMETERS = {f.name for f in fields(SamplingParams)}
KEYS = {"prompt", "messages", "input_ids", "id", "stop_words"} | PARAMETERS


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
    log_probs: list[float] = field(default_factory=list)
    stop_words: tuple[str, ...] = ()
    shown: str | None = None  # the text so far, where it is watched for stop words

    def watch(self, vocabulary: Vocabulary) -> None:
        self.shown, self._text, self._stop = "", detokenizer(vocabulary), StopWords(self.stop_words)

    def take(self, output: Output) -> None:
        self.output_ids += output.token_ids
        self.log_probs += output.log_probs or ()
        self.finish_reason = output.finish_reason
        if self.shown is not None:
            self._look_for_stop_words(output)
        if output.stats:
            stats = output.stats
            self.rounds.append({"drafted": stats.drafted, "verified": stats.verified, "accepted": stats.accepted})
        if output.error:
            self.error = f"line {self.line}: {output.error}"

    def _look_for_stop_words(self, output: Output) -> None:
        """Ends the answer at the token that completes a stop word."""
        for k, token in enumerate(output.token_ids, start=1):
            piece, stopped = self._stop.push(self._text.push([token]))
            self.shown += piece
            if stopped:
                dropped = len(output.token_ids) - k
                kept = len(self.output_ids) - dropped
                self.finish_reason = "stop"
                self.output_ids, self.log_probs = self.output_ids[:kept], self.log_probs[:kept]
                return
        if output.finish_reason:
            piece, stopped = self._stop.push(self._text.flush())
            self.shown += piece if stopped else piece + self._stop.flush()

    def as_dict(self, vocabulary: Vocabulary | None) -> dict:
        if self.error:
            return {"id": self.id, "error": self.error}
        text = self.shown or ""
        if vocabulary and self.shown is None:
            state = detokenizer(vocabulary)
            text = state.push(self.output_ids) + state.flush()
        asked = self.request.params.return_log_probs
        return {
            "id": self.id,
            "output_ids": self.output_ids,
            "text": text,
            "finish_reason": self.finish_reason,
            "num_input_tokens": len(self.request.prompt_ids),
            "num_output_tokens": len(self.output_ids),
            "rounds": self.rounds,
            **({"log_probs": self.log_probs} if asked else {}),
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
                answer.stop_words = _stop_words(parsed, tokenizer)
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
    given = {name: parsed[name] for name in PARAMETERS & parsed.keys()}
    given.setdefault("seed", (defaults.seed + index) % (1 << 64))
    if "bad_words" in given:
        given["bad_words"] = _bad_words(given["bad_words"], tokenizer)
    if isinstance(given.get("logit_bias"), dict):
        given["logit_bias"] = tuple((_token_id(key), bias) for key, bias in given["logit_bias"].items())
    return Request(id=index, prompt_ids=tuple(ids), params=replace(defaults, **given))


def _bad_words(words: Any, tokenizer: ChatTokenizer | None) -> tuple[tuple[int, ...], ...]:
    """Texts in all their spellings, token ids as they are; what else is wrong, validate() says."""
    if not isinstance(words, list):
        raise RequestError(f"bad_words is {words!r}; it must be a list of texts or lists of token ids.")
    found: list[tuple[int, ...]] = []
    for word in words:
        if not isinstance(word, str):
            found.append(tuple(word) if isinstance(word, list) else word)
            continue
        if tokenizer is None:
            raise RequestError("bad_words as text needs a tokenizer and this bundle has none; send lists of token ids.")
        if not word:
            raise RequestError("bad_words holds an empty text.")
        spellings = tokenizer.spellings(word)
        if not spellings:
            raise RequestError(f"bad_words holds {word!r}, which no token of this model writes.")
        found += spellings
    return tuple(found)


def _token_id(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise RequestError(f"logit_bias holds the key {key[:40]!r}; a key must be a token id.") from None


def _stop_words(parsed: dict, tokenizer: ChatTokenizer | None) -> tuple[str, ...]:
    words = parsed.get("stop_words", [])
    if not isinstance(words, list) or any(not isinstance(w, str) or not w for w in words):
        raise RequestError(f"stop_words is {words!r}; it must be a list of texts, none of them empty.")
    if words and tokenizer is None:
        raise RequestError("stop_words needs a tokenizer and this bundle has none.")
    return tuple(words)


def decode_all(
    loop: Loop,
    answers: list[Answer],
    on_done: Callable[[Answer], None] = lambda answer: None,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Runs every answer's request to its end; what the loop refuses becomes that answer's error. Stop words need the
    vocabulary."""
    by_id = {}
    for answer in answers:
        if answer.request is None:
            continue
        try:
            loop.add(answer.request)
            by_id[answer.request.id] = answer
            if answer.stop_words:
                answer.watch(vocabulary)
        except RequestError as error:
            answer.error = f"line {answer.line}: {error}"
    while loop.has_work:
        for output in loop.step():
            answer = by_id[output.request_id]
            if answer.finish_reason:  # a stop word had ended it
                continue
            answer.take(output)
            if answer.finish_reason:
                on_done(answer)
                if not output.finish_reason:
                    loop.cancel(output.request_id)


def load_tokenizer(engines: Engines) -> ChatTokenizer | None:
    """The bundle's tokenizer, None when it has none."""
    return ChatTokenizer(engines.bundle.folder) if engines.bundle.tokenizer_file else None


def run(loop: Loop, answers: list[Answer], output: Path, tokenizer: ChatTokenizer | None) -> dict:
    """Decodes `answers` into `output` (written beside, then renamed). Returns the run's report."""
    started = perf_counter()
    vocabulary = Vocabulary(tokenizer.tokenizer) if tokenizer else None
    with progress(sum(a.request is not None for a in answers), "decoding") as advance:
        decode_all(loop, answers, lambda answer: advance(), vocabulary)
    seconds = perf_counter() - started
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

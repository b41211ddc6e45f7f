"""Text of each round: incremental detokenisation, stop words, and what the client is told.

Knows: the state of every stream's text (by the engine's uid) and public outputs. Refuses to know: Triton, the round.

Rounds of one request must arrive in order (one instance of the model, no batching).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .responses import Round
from .text import TextStream, load_vocabulary

log = logging.getLogger(__name__)

Value = str | int | float | list
MAX_STREAMS = 65536  # streams whose end never came (the engine's process died) must not pile up


@dataclass
class _Stream:
    """One request's text: what was said, what is held for the one response of stream = false, how it ended."""

    text: TextStream
    stream: bool
    next_round: int = 0
    index: int = 0
    held_ids: list[int] = field(default_factory=list)
    held_log_probs: list[float] = field(default_factory=list)
    held_text: str = ""
    tokens: int = 0
    cum_log_probs: float = 0.0
    frozen: Round | None = None  # the round in which a stop word was completed: its statistics are the last
    stopping: bool = False


class Postprocessor:
    """stop(uid) tells the engine to end a request (a stop word was found, or the client is gone)."""

    def __init__(self, bundle: Path, stop: Callable[[int], None]):
        self._vocabulary = load_vocabulary(bundle)
        self._stop = stop
        self._streams: dict[int, _Stream] = {}

    def __call__(self, r: Round, *, cancelled: bool) -> dict[str, Value] | None:
        """One round in -> the response's values by the names of description.USER_OUTPUTS, or None when the client gets
        nothing for this round.

        A response has finish_reason "" until the last one; after a stop word no text and no tokens follow.
        """
        uid, reason = r.uid, r.finish_reason
        stream = self._stream(r)
        if stream is None:
            return None
        if cancelled and not reason and not stream.stopping:
            stream.stopping = True
            self._stop(uid)
        text, used = stream.text.push(r.output_ids)
        if reason:
            text += stream.text.flush()
        ids, log_probs = r.output_ids[:used], r.log_probs[:used]
        stream.tokens += used
        stream.cum_log_probs += sum(log_probs)
        if stream.text.stopped:
            if stream.frozen is None:
                stream.frozen = r
            if not reason and not stream.stopping:
                stream.stopping = True
                self._stop(uid)
            if reason:
                reason = "stop"
        if reason:
            del self._streams[uid]
        if not stream.stream:
            stream.held_ids += ids
            stream.held_log_probs += log_probs
            stream.held_text += text
            if not reason:
                return None
            text, ids, log_probs = stream.held_text, stream.held_ids, stream.held_log_probs
        elif not reason and not ids and not text:
            return None  # a heartbeat, or a round after the stop
        response = self._response(stream, stream.frozen or r, text, ids, log_probs, reason)
        stream.index += 1
        return response

    def give_up(self, r: Round) -> dict[str, Value]:
        """Ends a request whose text could not be made: finish_reason error; its later rounds are dropped."""
        stream = self._streams.pop(r.uid, None) or _Stream(TextStream(None, ()), stream=True)
        if not r.finish_reason:
            self._stop(r.uid)
        return self._response(stream, r, "", [], [], "error")

    def _stream(self, r: Round) -> _Stream | None:
        if r.index == 0:
            settings = json.loads(r.settings)
            while len(self._streams) >= MAX_STREAMS:
                self._streams.pop(next(iter(self._streams)))
            self._streams[r.uid] = _Stream(TextStream(self._vocabulary, settings["stop_words"]), settings["stream"])
        stream = self._streams.get(r.uid)
        if stream is None or stream.next_round != r.index:
            log.error("Round %d of request %d came out of order and is dropped.", r.index, r.uid)
            return None
        stream.next_round += 1
        return stream

    @staticmethod
    def _response(stream: _Stream, r: Round, text: str, ids: list, log_probs: list, reason: str) -> dict[str, Value]:
        """r: the round whose totals are shown."""
        accepted = sum(r.accepted_per_position)
        return {
            "text_output": text,
            "output_ids": ids,
            "finish_reason": reason,
            "index": stream.index,
            "num_input_tokens": r.num_input_tokens,
            "num_output_tokens": stream.tokens,
            "num_rounds": r.num_rounds,
            "total_draft_tokens": r.total_draft_tokens,
            "total_accepted_draft_tokens": accepted,
            "accepted_per_position": r.accepted_per_position,
            "acceptance_rate": accepted / r.total_draft_tokens if r.total_draft_tokens else 0.0,
            "output_log_probs": log_probs,
            "cum_log_probs": stream.cum_log_probs,
        }

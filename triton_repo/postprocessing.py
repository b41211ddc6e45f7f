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

import numpy as np

from .tensors import one
from .text import TextStream, load_vocabulary

log = logging.getLogger(__name__)

MAX_STREAMS = 65536  # streams whose end never came (the engine's process died) must not pile up


@dataclass
class _Stream:
    """One request's text: what was said, what is held for the one response of stream = false, how it ended."""

    text: TextStream
    stream: bool
    next_round: int = 0
    index: int = 0
    held_ids: list[int] = field(default_factory=list)
    held_text: str = ""
    tokens: int = 0
    frozen: dict[str, np.ndarray] | None = None  # the statistics of the round in which a stop word was completed
    stopping: bool = False


COUNTS = (
    "num_input_tokens",
    "num_rounds",
    "total_draft_tokens",
    "total_accepted_draft_tokens",
    "accepted_per_position",
)


class Postprocessor:
    """stop(uid) tells the engine to end a request (a stop word was found, or the client is gone)."""

    def __init__(self, bundle: Path, stop: Callable[[int], None]):
        self._vocabulary = load_vocabulary(bundle)
        self._stop = stop
        self._streams: dict[int, _Stream] = {}

    def __call__(self, arrays: dict[str, np.ndarray], *, cancelled: bool) -> dict[str, np.ndarray] | None:
        """One round in -> the response's tensors, or None when the client gets nothing for this round.

        A response has finish_reason "" until the last one; after a stop word no text and no tokens follow.
        """
        uid, reason = int(arrays["uid"][0]), arrays["finish_reason"][0].decode()
        stream = self._stream(uid, arrays)
        if stream is None:
            return None
        if cancelled and not reason and not stream.stopping:
            stream.stopping = True
            self._stop(uid)
        text, ids = self._advance(stream, arrays, last=bool(reason))
        if stream.text.stopped:
            if stream.frozen is None:
                stream.frozen = {name: arrays[name] for name in COUNTS}
            if not reason and not stream.stopping:
                stream.stopping = True
                self._stop(uid)
            if reason:
                reason = "stop"
        if reason:
            del self._streams[uid]
        if not stream.stream:
            stream.held_ids += ids
            stream.held_text += text
            if not reason:
                return None
            text, ids = stream.held_text, stream.held_ids
        elif not reason and not ids and not text:
            return None  # a heartbeat, or a round after the stop
        response = self._response(stream, stream.frozen or arrays, text, ids, reason)
        stream.index += 1
        return response

    def give_up(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Ends a request whose text could not be made: finish_reason error; its later rounds are dropped."""
        uid = int(arrays["uid"][0])
        stream = self._streams.pop(uid, None) or _Stream(TextStream(None, ()), stream=True)
        if not arrays["finish_reason"][0]:
            self._stop(uid)
        return self._response(stream, arrays, "", [], "error")

    def _stream(self, uid: int, arrays: dict[str, np.ndarray]) -> _Stream | None:
        number = int(arrays["index"][0])
        if number == 0:
            settings = json.loads(arrays["settings"][0])
            while len(self._streams) >= MAX_STREAMS:
                self._streams.pop(next(iter(self._streams)))
            self._streams[uid] = _Stream(TextStream(self._vocabulary, settings["stop_words"]), settings["stream"])
        stream = self._streams.get(uid)
        if stream is None or stream.next_round != number:
            log.error("Round %d of request %d came out of order and is dropped.", number, uid)
            return None
        stream.next_round += 1
        return stream

    @staticmethod
    def _advance(stream: _Stream, arrays: dict[str, np.ndarray], *, last: bool) -> tuple[str, list[int]]:
        """(new text, the ids it used): the ids end with the one that completed a stop word."""
        ids = arrays["output_ids"].tolist()
        text, used = stream.text.push(ids)
        if last:
            text += stream.text.flush()
        stream.tokens += used
        return text, ids[:used]

    @staticmethod
    def _response(stream: _Stream, counts: dict[str, np.ndarray], text: str, ids: list[int], reason: str) -> dict:
        drafted, accepted = int(counts["total_draft_tokens"][0]), int(counts["total_accepted_draft_tokens"][0])
        return {
            "text_output": one(text, np.object_),
            "output_ids": np.asarray(ids, np.int32),
            "finish_reason": one(reason, np.object_),
            "index": one(stream.index, np.int32),
            "num_output_tokens": one(stream.tokens, np.int32),
            "acceptance_rate": one(accepted / drafted if drafted else 0.0, np.float32),
            **{name: counts[name] for name in COUNTS},
        }

"""Tokens to text for one stream, with stop words: one token at a time.

Knows: decoding's detokeniser and stop-word matcher. Refuses to know: requests, Triton.

One token at a time, so that where a stop word ends (and which of two overlapping ones wins) does not depend on how the
rounds happened to cut the tokens: with the same seed the text is the same with and without speculation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from decoding.chat import ChatTokenizer
from decoding.detokenize import StopWords, Vocabulary, detokenizer
from engines import Bundle


def load_vocabulary(folder: Path) -> Vocabulary | None:
    """The bundle's vocabulary; None when it has no tokenizer (texts are then empty)."""
    has_tokenizer = Bundle.load(folder, check_hashes=False).tokenizer_file is not None
    return Vocabulary(ChatTokenizer(folder).tokenizer) if has_tokenizer else None


class TextStream:
    """`push(ids)` -> (text that may be shown, number of ids used); after a stop word nothing is used or shown."""

    def __init__(self, vocabulary: Vocabulary | None, stop_words: Sequence[str]):
        self._decoder = detokenizer(vocabulary) if vocabulary else None
        self._stop = StopWords(stop_words)

    @property
    def stopped(self) -> bool:
        """A stop word was met."""
        return self._stop.stopped

    def push(self, ids: Sequence[int]) -> tuple[str, int]:
        if self.stopped or self._decoder is None:
            return "", 0 if self.stopped else len(ids)
        if not self._stop.words:
            return self._decoder.push(ids), len(ids)
        shown = []
        for used, token in enumerate(ids, start=1):
            text, stopped = self._stop.push(self._decoder.push((token,)))
            shown.append(text)
            if stopped:
                return "".join(shown), used
        return "".join(shown), len(ids)

    def flush(self) -> str:
        """What is still held back; the stream is over."""
        if self.stopped or self._decoder is None:
            return ""
        text, _ = self._stop.push(self._decoder.flush())
        return text + self._stop.flush()

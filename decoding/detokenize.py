"""Token ids to text, piece by piece: never half a character, never a lost space, for any chunking of the ids.

Knows: the `tokenizers` library's tokenizer.json and its decoders. Refuses to know: requests, transports.

The invariant, for any way of cutting `ids` into chunks: "".join(push(chunk) ...) + flush() == tokenizer.decode(ids).
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Iterable

from tokenizers import Tokenizer


class Vocabulary:
    """What both kinds of detokeniser read from a tokenizer, computed once per tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        raw = json.loads(tokenizer.to_str())
        self.special = frozenset(t["id"] for t in raw.get("added_tokens", []) if t["special"])
        decoder = raw.get("decoder") or {}
        self.byte_level = decoder.get("type") == "ByteLevel"
        parts = [decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", []))]
        self.byte_fallback = "ByteFallback" in parts
        self._bytes: dict[int, bytes] = {}

    def visible(self, ids: Iterable[int]) -> list[int]:
        """Without special tokens and ids that the tokenizer does not know (a model's padded vocabulary)."""
        return [i for i in ids if i not in self.special and self.tokenizer.id_to_token(i) is not None]

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a byte-level vocabulary's token; one with a character outside the alphabet is UTF-8 text."""
        known = self._bytes.get(token)
        if known is None:
            text = self.tokenizer.id_to_token(token) or ""
            try:
                known = bytes(_BYTE_OF[c] for c in text)
            except KeyError:
                known = text.encode()
            self._bytes[token] = known
        return known

    def is_byte(self, token: int) -> bool:
        """A byte-fallback token, <0x00> .. <0xFF>."""
        return re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", self.tokenizer.id_to_token(token) or "") is not None


def detokenizer(vocabulary: Vocabulary) -> "ByteDetokenizer | WindowDetokenizer":
    """A fresh state for one stream of generated ids. Special and unknown tokens give no text."""
    return ByteDetokenizer(vocabulary) if vocabulary.byte_level else WindowDetokenizer(vocabulary)


class ByteDetokenizer:
    """Byte-level vocabularies (GPT-2's, Llama 3's, Qwen's, SmolLM2's): tokens are bytes, so an incremental UTF-8
    decoder is exact; it holds back at most three bytes. Constant work per token."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        v = self.vocabulary
        return self.decoder.decode(b"".join(v.bytes_of(i) for i in v.visible(ids)))

    def flush(self) -> str:
        """What is still held back; the stream is over."""
        return self.decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Any other vocabulary, with the library's own decoder on a window of the last two pieces.

    ids[prefix:] is decoded; ids[prefix:read] has been shown. The window's first tokens give a decoder that strips or
    joins at the start (Metaspace) the same start in both, so the difference is exactly the new text.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.ids: list[int] = []  # the window only
        self.read = 0
        self.shown = ""  # decoded ids[:read]

    def push(self, ids: Iterable[int]) -> str:
        v = self.vocabulary
        new = v.visible(ids)
        if not new:
            return ""
        self.ids += new
        if v.byte_fallback and v.is_byte(self.ids[-1]):
            return ""  # a run of byte tokens is one unit: valid or not as a whole
        text = v.tokenizer.decode(self.ids, skip_special_tokens=False)
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self.shown) :]
        rest = self.ids[self.read :]
        alone = v.tokenizer.decode(rest, skip_special_tokens=False)
        if alone:  # enough to anchor the next window; a lone stripped space is not
            self.ids, self.shown = rest, alone
        else:
            self.shown = text
        self.read = len(self.ids)
        return piece

    def flush(self) -> str:
        """What is still held back; the stream is over."""
        text = self.vocabulary.tokenizer.decode(self.ids, skip_special_tokens=False) if self.ids else ""
        piece, self.ids, self.read, self.shown = text[len(self.shown) :], [], 0, ""
        return piece


class StopWords:
    """Ends a text at the first of `words`, across any chunk borders; the word and what follows it are never shown."""

    def __init__(self, words: Iterable[str]):
        self.words = tuple(w for w in words if w)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """New text in, (what may be shown, whether a stop word was met) out.

        Holds back only the longest suffix that could still become a stop word.
        """
        if self.stopped:
            return "", True
        text = self.held + text
        found = [(at + len(word), at) for word in self.words if (at := text.find(word)) >= 0]
        if found:  # the word that is complete first, so that the chunks do not matter
            self.held, self.stopped = "", True
            return text[: min(found)[1]], True
        keep = 0
        for word in self.words:
            for n in range(min(len(word) - 1, len(text)), keep, -1):
                if word.startswith(text[-n:]):
                    keep = n
                    break
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What is still held back; the stream is over."""
        text, self.held = self.held, ""
        return text


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()

"""A user's tensors -> token ids and checked parameters, or one sentence that says what is wrong.

Knows: the public inputs, their defaults and ranges, the bundle's tokenizer and chat template. Refuses to know: Triton.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
from decoding.chat import ChatTokenizer
from decoding.request import Limits, Request, RequestError, SamplingParams, validate
from engines import Bundle

from .description import SAMPLING
from .tensors import DEFAULT_MAX_TOKENS, one, pack_params

PROMPTS = ("text_input", "messages", "input_ids")
MAX_WORDS, MAX_WORD_LENGTH = 64, 1024  # stop_words and bad_words; characters
MAX_BIASES = 1024
TEXTS = ("bad_words", "logit_bias")  # sampling tensors that are no plain value
CHARACTERS_PER_TOKEN = 64  # longer text cannot fit the context: it is refused before it is tokenised


class Preprocessor:
    """Raises BundleError for a folder that is no bundle."""

    def __init__(self, folder: Path):
        self.bundle = Bundle.load(folder, check_hashes=False)
        self.tokenizer = ChatTokenizer(folder) if self.bundle.tokenizer_file else None
        self.limits = Limits.of(self.bundle)

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Tensors by name -> those of description.PREPROCESSING.outputs. Raises RequestError, in one sentence."""
        field, ids = self._prompt(arrays)
        settings = {"stream": bool(_scalar(arrays, "stream", False)), "stop_words": self._words(arrays, "stop_words")}
        params = self._params(arrays, field, ids)
        validate(Request(0, ids, params), self.limits)
        return {
            "input_ids": np.asarray(ids, np.int32),
            "params": pack_params(params),
            "settings": one(json.dumps(settings), np.object_),
        }

    def _prompt(self, arrays: dict[str, np.ndarray]) -> tuple[str, tuple[int, ...]]:
        """(the field that holds the prompt, token ids)."""
        given = [name for name in PROMPTS if name in arrays]
        if len(given) != 1:
            what = " and ".join(given) if given else "none"
            raise RequestError(f"The request has {what} of text_input, messages, input_ids; it must have exactly one.")
        field, raw = given[0], bool(_scalar(arrays, "raw", False))
        if raw and field != "text_input":
            raise RequestError(f"raw is true; it goes with text_input only, and the request has {field}.")
        if field == "input_ids":
            return field, tuple(arrays[field].reshape(-1).tolist())
        if self.tokenizer is None:
            raise RequestError(f"{field} needs a tokenizer and this bundle has none; send input_ids.")
        text = _text(_scalar(arrays, field, b""), field)
        if not text:
            raise RequestError(f"{field} is empty; it must hold at least 1 character.")
        most = CHARACTERS_PER_TOKEN * self.limits.context
        if len(text) > most:
            raise RequestError(f"{field} is {len(text)} characters long; it must hold at most {most}.")
        try:
            return field, tuple(self._tokens(field, text, raw))
        except (UnicodeEncodeError, TypeError):  # a lone surrogate that came through a JSON escape
            raise RequestError(f"{field} holds text that is not valid Unicode.") from None

    def _tokens(self, field: str, text: str, raw: bool) -> list[int]:
        if field == "messages":
            return self.tokenizer.encode_messages(_messages(text))
        if raw:
            return self.tokenizer.encode(text)
        return self.tokenizer.encode_messages([{"role": "user", "content": text}])

    def _params(self, arrays: dict[str, np.ndarray], field: str, ids: tuple[int, ...]) -> SamplingParams:
        """Defaults: those of SamplingParams; max_tokens 256 or what the context leaves; a seed from the system."""
        if not 1 <= len(ids) < self.limits.context:
            raise RequestError(f"{field} is {len(ids)} tokens long; it must have 1..{self.limits.context - 1}.")
        given = {t.name: _scalar(arrays, t.name, None) for t in SAMPLING if t.name in arrays and t.name not in TEXTS}
        given.setdefault("max_tokens", min(DEFAULT_MAX_TOKENS, self.limits.context - len(ids)))
        given.setdefault("seed", secrets.randbits(64))
        if "accept" in given:
            given["accept"] = _text(given["accept"], "accept") or None
        return SamplingParams(**given, bad_words=self._bad_words(arrays), logit_bias=_biases(arrays))

    def _bad_words(self, arrays: dict[str, np.ndarray]) -> tuple[tuple[int, ...], ...]:
        """Every token sequence that writes one of the words, with and without a space before it."""
        sequences: dict[tuple[int, ...], None] = {}
        for i, word in enumerate(self._words(arrays, "bad_words")):
            spellings = self.tokenizer.spellings(word)
            if not spellings:
                raise RequestError(f"bad_words[{i}] is {word!r}, which no token of this model writes.")
            sequences |= dict.fromkeys(spellings)
        return tuple(sequences)

    def _words(self, arrays: dict[str, np.ndarray], name: str) -> list[str]:
        raw = arrays.get(name, np.array([])).reshape(-1)
        words = [_text(word, f"{name}[{i}]") for i, word in enumerate(raw)]
        if len(words) > MAX_WORDS:
            raise RequestError(f"{name} has {len(words)} words; it must have at most {MAX_WORDS}.")
        for i, word in enumerate(words):
            if not 1 <= len(word) <= MAX_WORD_LENGTH:
                raise RequestError(f"{name}[{i}] is {len(word)} characters long; it must be 1..{MAX_WORD_LENGTH}.")
        if words and self.tokenizer is None:
            raise RequestError(f"{name} need a tokenizer and this bundle has none.")
        return words


def _biases(arrays: dict[str, np.ndarray]) -> tuple[tuple[int, float], ...]:
    """logit_bias, {"token id": bias} as JSON, as pairs in its order. What ids and biases may be, validate() says."""
    text = _text(_scalar(arrays, "logit_bias", b""), "logit_bias")
    if not text.strip():
        return ()
    what = 'it must be a JSON object {"token id": bias}'
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        raise RequestError(f"logit_bias is not JSON; {what}.") from None
    if not text.lstrip().startswith("{"):
        raise RequestError(f"logit_bias is no object; {what}.")
    if len(pairs) > MAX_BIASES:
        raise RequestError(f"logit_bias has {len(pairs)} entries; it must have at most {MAX_BIASES}.")
    biases = []
    for key, bias in pairs:
        if not (key.isascii() and key.lstrip("-").isdigit() and len(key) <= 20):
            raise RequestError(f"logit_bias holds the key {key[:40]!r}; a key must be a token id.")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise RequestError(f"logit_bias of token {key} is no number; it must lie in -100..100.")
        biases.append((int(key), bias))
    return tuple(biases)


def _scalar(arrays: dict[str, np.ndarray], name: str, default: Any) -> Any:
    """The value of a [1] tensor, as a Python object; a float32 as the shortest decimal that it is the float32 of
    (0.9 and not 0.8999999761581421: the value that the user wrote, in messages and in the decoder)."""
    if name not in arrays:
        return default
    value = arrays[name].reshape(-1)[0]
    if isinstance(value, np.float32):
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else value


def _text(value: bytes | str, field: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = value[error.start]
        raise RequestError(f"{field} is not valid UTF-8: byte 0x{bad:02x} at position {error.start}.") from None


def _messages(text: str) -> list:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"messages is not JSON: {error.msg} at character {error.pos}.") from None
    except (RecursionError, ValueError):
        raise RequestError("messages is not JSON: it nests too deeply or holds a number that is too long.") from None

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

from .tensors import DEFAULT_MAX_TOKENS, one

PROMPTS = ("text_input", "messages", "input_ids")
# Inputs that other Triton LLM servers take: accepted while they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {"top_k": (0,), "top_p": (1.0,), "min_p": (0.0,), "return_log_probs": (False,)}
MAX_STOP_WORDS, MAX_STOP_LENGTH = 64, 1024
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
        self._refuse_unsupported(arrays)
        settings = {"stream": bool(_scalar(arrays, "stream", False)), "stop_words": self._stop_words(arrays)}
        params = self._params(arrays, field, ids)
        validate(Request(0, ids, params), self.limits)
        return {
            "input_ids": np.asarray(ids, np.int32),
            "max_tokens": one(params.max_tokens, np.int32),
            "temperature": one(params.temperature, np.float32),
            "seed": one(params.seed, np.uint64),
            "ignore_eos": one(params.ignore_eos, np.bool_),
            "speculative": one(params.speculative, np.bool_),
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
        """Defaults: greedy; max_tokens 256 or what the context leaves; a seed from the system's randomness."""
        if not 1 <= len(ids) < self.limits.context:
            raise RequestError(f"{field} is {len(ids)} tokens long; it must have 1..{self.limits.context - 1}.")
        seed = _scalar(arrays, "seed", None)
        return SamplingParams(
            max_tokens=int(_scalar(arrays, "max_tokens", min(DEFAULT_MAX_TOKENS, self.limits.context - len(ids)))),
            temperature=float(_scalar(arrays, "temperature", 0.0)),
            seed=secrets.randbits(64) if seed is None else int(seed),
            ignore_eos=bool(_scalar(arrays, "ignore_eos", False)),
            speculative=bool(_scalar(arrays, "speculative", True)),
        )

    def _stop_words(self, arrays: dict[str, np.ndarray]) -> list[str]:
        raw = arrays.get("stop_words", np.array([])).reshape(-1)
        words = [_text(word, f"stop_words[{i}]") for i, word in enumerate(raw)]
        if len(words) > MAX_STOP_WORDS:
            raise RequestError(f"stop_words has {len(words)} words; it must have at most {MAX_STOP_WORDS}.")
        for i, word in enumerate(words):
            if not 1 <= len(word) <= MAX_STOP_LENGTH:
                raise RequestError(f"stop_words[{i}] is {len(word)} characters long; it must be 1..{MAX_STOP_LENGTH}.")
        if words and self.tokenizer is None:
            raise RequestError("stop_words need a tokenizer and this bundle has none.")
        return words

    @staticmethod
    def _refuse_unsupported(arrays: dict[str, np.ndarray]) -> None:
        for name, allowed in NEUTRAL.items():
            value = _scalar(arrays, name, allowed[0])
            if value not in allowed:
                raise RequestError(f"{name} is {value}; it must be {allowed[0]} (other values are not supported yet).")
        bad = [word for word in arrays.get("bad_words", np.array([])).reshape(-1) if len(word)]
        if bad:
            raise RequestError(f"bad_words has {len(bad)} words; it must be empty (bad words are not supported yet).")


def _scalar(arrays: dict[str, np.ndarray], name: str, default: Any) -> Any:
    """The value of a [1] tensor, as a Python object."""
    if name not in arrays:
        return default
    value = arrays[name].reshape(-1)[0]
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

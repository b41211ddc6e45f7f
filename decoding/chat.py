"""Text to token ids: raw prompts, and message lists through the bundle's chat template in a sandbox.

Knows: tokenizer.json, chat_template.jinja, tokenizer_config.json. Refuses to know: how ids are decoded.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from .request import RequestError

_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTokenizer:
    """The tokenizer and chat template of one bundle."""

    def __init__(self, folder: str | Path):
        """Raises FileNotFoundError when the bundle has no tokenizer.json."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder} holds no tokenizer.json.")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        template, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        raw = json.loads(config.read_text()) if config.is_file() else {}
        self._specials = {name: _content(raw.get(name)) for name in _SPECIALS}
        self._template = _environment().from_string(template.read_text()) if template.is_file() else None

    def encode(self, text: str) -> list[int]:
        """A raw prompt, as the tokenizer encodes it (with the specials its post-processor adds, no template)."""
        return self.tokenizer.encode(_clean(text, "prompt")).ids

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Messages through the template, ending where the assistant's turn begins. Raises RequestError."""
        if self._template is None:
            raise RequestError("messages need a chat template and this bundle has none; send a prompt.")
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages is empty or not a list; it must hold at least 1 message.")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RequestError(f"messages[{i}] must be an object with the strings role and content.")
            if not isinstance(message.get("content"), str):
                raise RequestError(f"messages[{i}].content must be a string.")
            _clean(message["content"], f"messages[{i}].content")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._specials)
        except Exception as error:  # a template's own errors, the sandbox's, and whatever its arithmetic raises
            raise RequestError(f"messages were refused by the chat template: {_line(error)}.") from None

    def encode_messages(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of render(); the template writes the special tokens itself."""
        return self.tokenizer.encode(self.render(messages), add_special_tokens=False).ids

    def spellings(self, word: str) -> tuple[tuple[int, ...], ...]:
        """The token sequences that write `word` in running text: at a text's start, after a line break, and each with a
        space before it. Special tokens' own texts give their id. Without duplicates; empty when no token writes it."""
        encode = lambda text: tuple(self.tokenizer.encode(_clean(text, "word"), add_special_tokens=False).ids)
        line, found = encode("\n"), []
        for text in (word,) if word[:1].isspace() else (word, " " + word):
            found.append(encode(text))
            after = encode("\n" + text)  # a tokenizer that puts a space before every text does not put it here
            if line and after[: len(line)] == line:
                found.append(after[len(line) :])
        return tuple(dict.fromkeys(ids for ids in found if ids))


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja2 as Hugging Face templates expect it, without access to anything but the messages."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _content(token: Any) -> str:
    """A special token of tokenizer_config.json: a string, or an object with `content`."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _clean(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{field} holds a lone surrogate; it must be valid Unicode.") from None
    return text


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

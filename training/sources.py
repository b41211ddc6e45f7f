"""Where prompts come from: JSONL files, folders of chat logs, Hugging Face datasets; each chat once, and none that a
benchmark asks.

Knows: the shapes that people's chats have, what makes two of them the same, n-grams. Refuses to know: tokens, models,
who answers.

A record is one of {"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]} (ShareGPT),
{"turns": [text, ...]} (the first is asked), {"prompt": text}, {"question": text}, {"instruction": text, "input": text};
`kind` (maths, code, chat) where given, else "chat". A log is such a record, or a bare list of messages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from training.jsonl import decode, records
from training.prompts import KINDS

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
NGRAM = 8  # words
BOILERPLATE = 3  # an n-gram of so many benchmark prompts is an instruction, not content
TOO_ALIKE = 0.2  # share of a prompt's n-grams in the benchmarks from which it is left out
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """What is asked: messages ((role, text), ...) that end with a user's turn. answer: the logged one, if there is."""

    messages: tuple[tuple[str, str], ...]
    kind: str = "chat"
    answer: str | None = None

    @property
    def text(self) -> str:
        """What users said, for comparing."""
        return "\n".join(text for role, text in self.messages if role == "user")

    @property
    def key(self) -> str:
        """Equal for chats that differ in case and white space only."""
        return hashlib.sha256(" ".join(self.text.casefold().split()).encode()).hexdigest()


def parse(record: object) -> Chat:
    """Raises ValueError in a few words for a record that asks nothing."""
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    kind = record.get("kind", "chat")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(KINDS)}")
    if isinstance(record.get("messages"), list):
        return _from_messages([(m.get("role"), m.get("content")) for m in _objects(record["messages"])], kind)
    if isinstance(record.get("conversations"), list):
        return _from_messages([(m.get("from"), m.get("value")) for m in _objects(record["conversations"])], kind)
    if isinstance(record.get("turns"), list):
        text: object = record["turns"][0] if record["turns"] else None
    elif isinstance(record.get("instruction"), str):
        text = "\n\n".join(t for t in (record["instruction"], record.get("input")) if isinstance(t, str) and t)
    else:
        text = record.get("prompt", record.get("question"))
        if text is None:
            raise ValueError("it has none of messages, conversations, turns, prompt, question, instruction")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its user text is missing or empty")
    return Chat((("user", text),), kind)


def _objects(items: list) -> list[dict]:
    if bad := [item for item in items if not isinstance(item, dict)]:
        raise ValueError(f"a message is {str(bad[0])[:40]!r}, not an object")
    return items


def _from_messages(pairs: list[tuple[object, object]], kind: str) -> Chat:
    """The messages up to the last user's turn, and what the assistant said then."""
    messages = []
    for role, text in pairs:
        if role not in ROLES:
            raise ValueError(f"a message's role is {role!r}; it must be user, assistant or system")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the {ROLES[role]}'s text is missing or empty")
        messages.append((ROLES[role], text))
    asked = max((i for i, (role, _) in enumerate(messages) if role == "user"), default=None)
    if asked is None:
        raise ValueError("a chat with no user turn")
    answers = [text for role, text in messages[asked + 1 :] if role == "assistant"]
    return Chat(tuple(messages[: asked + 1]), kind, answers[0] if answers else None)


def read(source: str) -> Iterator[Chat]:
    """Chats of a JSONL file, of a folder of logs (*.jsonl, and *.json with a chat or a list of chats, at any depth), or
    of `hf:NAME[:SPLIT]`. What is bad is left out with a warning that names it. Raises FileNotFoundError, ValueError."""
    if source.startswith("hf:"):
        yield from _from_hugging_face(source)
        return
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source} is neither a file nor a folder (a Hugging Face dataset is hf:NAME[:SPLIT]).")
    if path.is_file() and path.suffix != ".json":
        yield from records(path, parse, "no usable prompt; lines need messages, turns, prompt or the like.")
        return
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".json", ".jsonl"))
    if not files:
        raise ValueError(f"{source} holds no *.json and no *.jsonl file.")
    for file in files:
        try:
            yield from records(file, parse, "no usable chat.") if file.suffix == ".jsonl" else _from_json(file)
        except ValueError as error:
            log.warning("%s", error)


def _from_json(file: Path) -> Iterator[Chat]:
    """A file with one chat (an object, or a list of messages) or a list of chats. ValueError where it is none."""
    try:
        found = decode(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} left out: {error}.") from None
    bare = isinstance(found, list) and found and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in found)
    for number, record in enumerate([found] if bare or not isinstance(found, list) else found, 1):
        try:
            yield parse(record)
        except ValueError as error:
            log.warning("%s, chat %d left out: %s.", file, number, error)


def _from_hugging_face(source: str) -> Iterator[Chat]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{source} needs the package `datasets`, which is not installed.") from None
    name, _, split = source.removeprefix("hf:").partition(":")
    for number, row in enumerate(load_dataset(name, split=split or "train", streaming=True), 1):
        try:
            yield parse(row)
        except ValueError as error:
            log.warning("%s, row %d left out: %s.", source, number, error)


def once(chats: Iterable[Chat]) -> Iterator[Chat]:
    """Each chat the first time it comes."""
    seen: set[str] = set()
    for chat in chats:
        if chat.key not in seen:
            seen.add(chat.key)
            yield chat


def ngrams(text: str) -> set[tuple[str, ...]]:
    """Runs of NGRAM words (fewer in a shorter text), case and punctuation aside."""
    words = re.findall(r"\w+", text.casefold())
    n = min(NGRAM, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if n else set()


class Benchmarks:
    """The prompts that nothing may be trained on."""

    def __init__(self, chats: Iterable[Chat]):
        chats = list(once(chats))
        self.keys = {chat.key for chat in chats}
        counts = Counter(gram for chat in chats for gram in ngrams(chat.text))
        self.grams = {gram for gram, n in counts.items() if n < BOILERPLATE}

    def overlap(self, chat: Chat) -> float:
        """Share of the chat's n-grams that a benchmark prompt holds; 1 for a benchmark prompt itself."""
        if chat.key in self.keys:
            return 1.0
        own = ngrams(chat.text)
        return len(own & self.grams) / len(own) if own else 0.0

    def split(self, chats: Iterable[Chat]) -> tuple[list[Chat], list[Chat], float]:
        """(kept, left out, mean overlap of the kept)."""
        kept, out, total = [], [], 0.0
        for chat in chats:
            share = self.overlap(chat)
            (out if share >= TOO_ALIKE else kept).append(chat)
            total += share if share < TOO_ALIKE else 0.0
        return kept, out, total / len(kept) if kept else 0.0


def write_chats(path: Path, chats: Iterable[Chat]) -> None:
    """One JSON object a line: messages, kind, and the answer as a last message where it is logged."""
    beside = path.with_suffix(".part")
    with beside.open("w", encoding="utf-8") as handle:
        for chat in chats:
            turns = [*chat.messages, *([("assistant", chat.answer)] if chat.answer is not None else [])]
            messages = [{"role": role, "content": text} for role, text in turns]
            handle.write(json.dumps({"messages": messages, "kind": chat.kind}, ensure_ascii=False) + "\n")
    beside.rename(path)

"""The repository's own prompts: seeded, so that anyone can make the shipped head's data again without any dataset.

Knows: the template language of `prompt_templates.txt` and prompt files. Refuses to know: tokens, models.

A template is one line of text in which
    [a|b|c]        is one of the alternatives, drawn anew; alternatives nest and may be empty;
    «name»         is a value of the word list `name`, «name2» another one; both stay the same in the whole prompt;
    «x=3..12»      draws a whole number, writes it, and binds it; «x=10..90/5» draws from 10, 15, ...;
    «:x=3..12»     binds without writing; «x» writes it again; «=x*y+2» writes a computed number;
    \\n             is a line break.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from training.jsonl import records

KINDS = ("maths", "code", "chat")
SHARES = {"maths": 0.55, "code": 0.20, "chat": 0.25}
OPENING_SHARES = {"maths": 0.45, "code": 0.20, "chat": 0.35}
MATHS_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
FUNCTION_PREFIX = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
CONTEST_PREFIX = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program\n\n### Question:\n"
)
CONTEST_SUFFIX = (
    "\n\n### Format: Write your code in the following format:\n```python\n# YOUR CODE HERE\n```\n\n"
    "### Answer: (use the provided format with backticks)"
)
TEMPLATES = Path(__file__).with_name("prompt_templates.txt")


@dataclass(frozen=True)
class Prompt:
    """One user turn. kind is one of KINDS."""

    text: str
    kind: str


def prompts(count: int, seed: int) -> Iterator[Prompt]:
    """`count` different prompts, kinds in the proportions of SHARES, in random order."""
    rng, seen = random.Random(f"{seed}-prompts"), set()
    for _ in range(count):
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        for _ in range(1000):
            text = _finished(kind, rng)
            if text not in seen:
                break
        else:
            raise ValueError(f"the {kind} templates give no more new prompts after {len(seen)}; ask for fewer.")
        seen.add(text)
        yield Prompt(text, kind)


def openings(count: int, seed: int) -> Iterator[Prompt]:
    """`count` beginnings of a user's turn (OPENING_SHARES), which the target itself is to finish; see `close`."""
    rng = random.Random(f"{seed}-openings")
    for _ in range(count):
        kind = rng.choices(list(OPENING_SHARES), list(OPENING_SHARES.values()))[0]
        yield Prompt(expand(rng.choice(_section(f"{kind}-opening")), rng), kind)


def close(opening: Prompt, rest: str) -> Prompt | None:
    """The finished prompt: the opening, what the target wrote behind it, and the kind's usual last line.

    None where the target wrote too little to ask anything."""
    text = (opening.text + rest).strip()
    if len(rest.split()) < 4:
        return None
    if opening.kind == "maths":
        text += MATHS_SUFFIX
    elif opening.kind == "code" and text.count("```") % 2:
        text += "\n```"
    return Prompt(text, opening.kind)


def _finished(kind: str, rng: random.Random) -> str:
    if kind == "maths":
        section = rng.choices(("maths-story", "maths-formal"), (0.75, 0.25))[0]
        text = expand(rng.choice(_section(section)), rng)
        if section == "maths-story" and rng.random() < 0.25:
            text = _with_distractor(text, rng)
        return text + MATHS_SUFFIX
    if kind == "code":
        if rng.random() < 0.6:
            return FUNCTION_PREFIX + expand(rng.choice(_section("code-function")), rng) + "\n\n```"
        return CONTEST_PREFIX + expand(rng.choice(_section("code-contest")), rng) + CONTEST_SUFFIX
    return expand(rng.choice(_section("chat")), rng)


def _with_distractor(text: str, rng: random.Random) -> str:
    """Puts a sentence that does not matter behind the first sentence."""
    head, stop, tail = text.partition(". ")
    return f"{head}. {expand(rng.choice(_section('distractor')), rng)} {tail}" if stop else text


@cache
def _sections() -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    for line in TEMPLATES.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            current = sections.setdefault(line[3:].strip(), [])
        elif line.strip() and not line.startswith("#"):
            current.append(line)
    return sections


def _section(name: str) -> list[str]:
    return _sections()[name]


@cache
def _words(name: str) -> list[str]:
    """The word list `name`: lines of section `words` look like `fruit: apple, pear, plum`."""
    for line in _section("words"):
        key, _, values = line.partition(":")
        if key.strip() == name:
            return [v.strip() for v in values.split(",")]
    raise KeyError(f"{TEMPLATES.name} has no word list {name!r}.")


_ALTERNATIVES = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")
_FIELD = re.compile(r"«([^«»]+)»")
_DRAW = re.compile(r"(:?)(\w+)=(-?\d+)\.\.(-?\d+)(?:/(\d+))?$")


def expand(template: str, rng: random.Random) -> str:
    """One text of the template. Raises KeyError for an unknown word list, NameError for an unbound number."""
    while match := _ALTERNATIVES.search(template):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]
    bound: dict[str, object] = {}
    used: set[str] = set()

    def fill(match: re.Match) -> str:
        field = match[1]
        if draw := _DRAW.match(field):
            hidden, name, low, high, step = draw.groups()
            bound[name] = rng.randrange(int(low), int(high) + 1, int(step or 1))
            return "" if hidden else _digits(bound[name])
        if field.startswith("="):
            value = eval(field[1:], {"__builtins__": {}}, bound)  # our own arithmetic, from our own template file
            return _digits(value)
        if field not in bound:
            fresh = [w for w in _words(field.rstrip("0123456789")) if w not in used]
            bound[field] = rng.choice(fresh)
            used.add(bound[field])
        return bound[field] if isinstance(bound[field], str) else _digits(bound[field])

    return _FIELD.sub(fill, template).replace("\\n", "\n").strip()


def _digits(n: int) -> str:
    """Groups of three from five digits on: 4500, but 12,000."""
    return f"{n:,}" if abs(n) >= 10_000 else str(n)


def held_out(
    count: int, seed: int, known: Iterable[Prompt] = (), is_held_out: Callable[[Prompt], bool] = lambda prompt: False
) -> list[Prompt]:
    """`count` different prompts that no head was trained on, maths, code and chat in turn.

    known: the prompts of the training data. Those of them that `is_held_out` (never trained on) come first; the rest
    are new ones from the templates whose text is not among the known. Raises ValueError when the templates are used up.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be 1 or more.")
    known = list(dict.fromkeys(known))
    taken = {p.text for p in known}
    queues = {kind: [p for p in known if p.kind == kind and is_held_out(p)] for kind in KINDS}
    for queue in queues.values():
        random.Random(f"{seed}-held-out").shuffle(queue)
    rng, chosen = random.Random(f"{seed}-prompts"), []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        fresh = (Prompt(_finished(kind, rng), kind) for _ in range(1000))
        prompt = queues[kind].pop() if queues[kind] else next((p for p in fresh if p.text not in taken), None)
        if prompt is None:
            raise ValueError(f"the {kind} templates give no more new prompts after {i}; ask for fewer.")
        taken.add(prompt.text)
        chosen.append(prompt)
    return chosen


def write_prompts(path: Path, items: Iterable[Prompt]) -> None:
    """One JSON object a line: {"prompt": ..., "kind": ...}."""
    lines = (json.dumps(asdict(p), ensure_ascii=False).replace('"text"', '"prompt"', 1) for p in items)
    beside = Path(path).with_suffix(".part")
    beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    beside.rename(path)


def read_prompts(path: str | Path) -> Iterator[Prompt]:
    """The first user turn of each JSONL line with `turns`, `prompt` or `messages`; `kind` where given, else "chat".

    Bad lines and errors: jsonl.records.
    """
    return records(path, parse_prompt, "no usable prompt; lines need `turns`, `prompt` or `messages`.")


def parse_prompt(record: object) -> Prompt:
    """Of one JSONL record. Raises ValueError in a few words."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if isinstance(record.get("prompt"), str):
        text = record["prompt"]
    elif isinstance(record.get("turns"), list) and record["turns"]:
        text = record["turns"][0]
    elif isinstance(record.get("messages"), list):
        users = [m.get("content") for m in record["messages"] if isinstance(m, dict) and m.get("role") == "user"]
        text = users[0] if users else None
    else:
        raise ValueError("it has none of `turns`, `prompt`, `messages`")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its user text is missing or empty")
    kind = record.get("kind", "chat")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(KINDS)}")
    return Prompt(text, kind)

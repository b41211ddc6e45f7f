"""Prompts that the target writes itself: the chat template up to the user's turn, the first words or none, sampled on.

Knows: first words by kind, which of the target's questions are worth an answer. Refuses to know: who answers them.

What a target asks is like what it was instructed with, whatever that was (Magpie, Xu et al. 2024, arXiv 2406.08464): no
data set is needed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator

from training.prompts import MATHS_SUFFIX, Prompt
from training.sampling import ChatTokens, Job

SHARES = {"chat": 0.40, "code": 0.35, "maths": 0.25}
WORDS = {
    "chat": (
        "", "", "", "", "I", "My", "What", "How", "Why", "Can you", "Write", "Write a short", "Explain", "Describe",
        "Give me", "Tell me", "Compare", "Summarize", "Rewrite", "You are", "Please", "Create", "Suggest", "List", "Is",
        "In", "Imagine", "The", "Help me", "Translate",
    ),
    "code": (
        "Write a Python function", "Write a Python function that", "Implement", "Write code", "Fix", "Here is a Python",
        "Complete the following", "Write a program", "Given a list", "Given an integer", "Given a string", "def ",
        "You are given", "How do I in Python", "Write a class", "Write a SQL query", "Write a JavaScript", "```python\n",
    ),
    "maths": (
        "A", "There are", "If", "Tom", "Maria", "A store", "Find", "Solve", "Calculate", "What is the value of", "Let",
        "How many", "Each", "In a class", "The sum", "A train", "John bought", "Sarah has", "Two", "Compute",
        "What is the probability",
    ),
}  # fmt: skip
LEAST = 25  # characters of a question


def beginnings(count: int, seed: int) -> Iterator[Prompt]:
    """`count` first words of a user's turn, kinds by SHARES. Raises ValueError for a count under 1."""
    if count < 1:
        raise ValueError(f"count is {count}; it must be 1 or more.")
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        yield Prompt(rng.choice(WORDS[kind]), kind)


def jobs(begun: list[Prompt], tokens: ChatTokens, *, temperature: float, max_new: int) -> list[Job]:
    """What the target is asked to go on with, as the user."""
    return [Job(i, tokens.unfinished(p.text), temperature, max_new) for i, p in enumerate(begun)]


def questions(written: Iterable[tuple[Prompt, str, bool]], seed: int) -> Iterator[Prompt]:
    """(first words, what the target wrote behind them, whether it came to an end) -> the prompts worth an answer:
    ended, LEAST characters or more, no text twice. Maths without a digit counts as chat; half of the rest is asked for
    a boxed answer."""
    rng, seen = random.Random(f"{seed}-questions"), set()
    for begun, rest, ended in written:
        text, kind = (begun.text + rest).strip(), begun.kind
        if not ended or len(text) < LEAST or text.lower() in seen:
            continue
        seen.add(text.lower())
        if kind == "maths" and not re.search(r"\d", text):
            kind = "chat"
        if kind == "maths" and rng.random() < 0.5:
            text += MATHS_SUFFIX
        yield Prompt(text, kind)

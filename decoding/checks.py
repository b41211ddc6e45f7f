"""One line of the audit, and what all lines say together: a sentence, JSON, the terminal.

Knows: the words ok, warn and fail. Refuses to know: what is checked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class Check:
    """One line of the audit. status: "ok" | "warn" (nothing wrong, something missing) | "fail"."""

    name: str
    schedule: str
    status: str
    detail: str
    figures: dict = field(default_factory=dict)
    seconds: float = 0.0


def verdict(checks: list[Check]) -> tuple[bool, str]:
    """(no check failed, one sentence)."""
    failed = [c for c in checks if c.status == "fail"]
    audited = list(dict.fromkeys(c.schedule for c in checks if c.name == "sampled tokens" and c.schedule != "none"))
    if failed:
        what = ", ".join(dict.fromkeys(f"{c.name} {c.schedule}".strip() for c in failed))
        return False, f"NOT LOSSLESS OR NOT AUDITED: {what}."
    warned = [f"{c.name} {c.schedule}".strip() for c in checks if c.status == "warn"]
    names = ", ".join(audited) or "no schedule"
    text = f"Lossless: {names} give the target's greedy text, its seeded text and its distribution."
    return True, text + (f" Mind: {', '.join(warned)}." if warned else "")


def as_json(checks: list[Check]) -> dict:
    ok, sentence = verdict(checks)
    return {"ok": ok, "verdict": sentence, "checks": [asdict(c) for c in checks]}


_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def show(check: Check) -> None:
    """One line on stdout as the check ends."""
    from rich.console import Console

    status = f"[{_COLOURS[check.status]}]{check.status:4}[/]"
    line = f"{status} {check.name:16} {check.schedule:10} {check.seconds:5.1f} s  "
    Console(soft_wrap=True, highlight=False).print(line, end="")
    Console(soft_wrap=True, highlight=False, markup=False).print(check.detail)

"""From turns to rows: medians, ratios within a round, agreement of texts.

Knows: numbers. Refuses to know: processes, engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..common import median
from .catalogue import OURS
from .rounds import Competitor, Turn


def total(turn: Turn) -> float:
    """New tokens a second, the prompts' time included."""
    return turn.new / turn.seconds


def decode(turn: Turn) -> float:
    """Tokens a second once every prompt had its first token."""
    return turn.after / turn.after_seconds if turn.after_seconds > 0 else float("nan")


def agreement(tokens: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float:
    """Mean share of each answer up to its first token that differs from the reference's."""
    shares = []
    for made, wanted in zip(tokens, reference, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(made, wanted)) if a != b), min(len(made), len(wanted)))
        shares.append(same / len(wanted))
    return sum(shares) / len(shares)


def ratio(measure, turns: Sequence[Turn], ours: Sequence[Turn] | None) -> float | None:
    """Median over the rounds of theirs / ours; None where there is nothing to compare with."""
    if not ours or not turns:
        return None
    return round(median(measure(a) / measure(b) for a, b in zip(turns, ours, strict=True)), 4)


def rows(turns: Mapping[Competitor, Sequence[Turn]], versions: Mapping[Competitor, str], streams: int) -> list[dict]:
    """One row a competitor, in their order.

    ratio_to_ours_*: the row / ours, so under 1 means that ours is faster. same_precision: our target alone (`none`) at
    the row's precision (the fastest of its forms), null for a precision we do not have. best: the fastest of ours by
    total tok/s, whatever its schedule and precision. Both by total tok/s, and by decode tok/s with the prefix decode_.
    agreement: with our fp32 target alone; null without it.
    """
    ours = {c: t for c, t in turns.items() if c.peer == OURS and t}
    speed = lambda played: median(map(total, played))
    alone = {c.precision: t for c, t in sorted(ours.items(), key=lambda x: speed(x[1])) if c.schedule == "none"}
    best = max(ours.values(), key=speed, default=None)
    found = []
    for competitor, played in turns.items():
        if not played:
            continue
        speeds = [total(t) for t in played]
        row = {
            "peer": competitor.peer,
            "version": versions[competitor],
            "variant": competitor.variant,
            "precision": competitor.precision,
            "schedule": competitor.schedule or None,
            "streams": streams,
            "total_tok_s": round(median(speeds), 2),
            "decode_tok_s": round(median(map(decode, played)), 2),
        }
        for prefix, measure in (("", total), ("decode_", decode)):
            row[f"{prefix}ratio_to_ours_same_precision"] = ratio(measure, played, alone.get(competitor.precision))
            row[f"{prefix}ratio_to_ours_best"] = ratio(measure, played, best)
        row["runs"] = len(played)
        row["spread"] = round((max(speeds) - min(speeds)) / median(speeds), 4)
        reference = alone.get("fp32")
        row["agreement"] = round(agreement(played[0].tokens, reference[0].tokens), 4) if reference else None
        found.append(row)
    return found

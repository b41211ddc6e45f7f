"""Named optimisation profiles: which sizes each engine is compiled for.

Knows: the symbols of docs/structures.md and what a decode round does with them. Refuses to know: TensorRT, graphs,
weights. A profile gives (least, typical, most) for each symbol of an engine's inputs, and for the values of an input
that sizes others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

Range = tuple[int, int, int]
TOP_MOST = 3840  # TensorRT's TopK takes no more
WIDE_BYTES = 256 << 20  # of one [Mw, V] float32 matrix of the verify engine
EDITS = 1024  # edits a wide row may have beyond one a cached position: logit_bias, bad_words
LENGTH_STEP = 64


@dataclass(frozen=True)
class Limits:
    """What a bundle is compiled for: requests decoding at once, prompt tokens a pass, G, the target's vocabulary V,
    the static length of a cache row (max_context and room for a pass's padded slots), and whether a block has G slots
    or, its anchor's drafting nothing, G + 1; none at all where it is drafted by steps."""

    requests: int
    chunk: int
    block: int
    vocab: int
    cache: int
    sample_from_anchor: bool = True
    autoregressive: bool = False

    @property
    def block_slots(self) -> int:
        return 0 if self.autoregressive else self.block + (0 if self.sample_from_anchor else 1)

    @property
    def rows(self) -> int:
        """Rows of one verify pass: every request with a whole block."""
        return self.requests * (self.block + 1)

    @property
    def wide_rows(self) -> int:
        """Wide rows of one verify call (Engines.verify_rows)."""
        return max(self.block + 1, min(self.rows, WIDE_BYTES // (4 * self.vocab)))


@dataclass(frozen=True)
class Profile:
    """name; sizes: symbol -> range; values: input that is a shape -> range of its one value."""

    name: str
    sizes: dict[str, Range]
    values: dict[str, Range]

    def as_json(self) -> dict:
        return asdict(self)


def limits_for(
    *, requests: int, chunk: int, block: int, vocab: int, max_context: int, sample_from_anchor: bool = True,
    autoregressive: bool = False,
) -> Limits:  # fmt: skip
    """Raises ValueError, one sentence, for a number outside its range."""
    for name, value in (("max_requests", requests), ("chunk", chunk)):
        if not 1 <= value <= 4096:
            raise ValueError(f"{name} is {value}; it must lie in 1..4096.")
    length = max_context + chunk + block + 1
    length = -(-length // LENGTH_STEP) * LENGTH_STEP
    return Limits(requests, chunk, block, vocab, length, sample_from_anchor, autoregressive)


def profiles_of(limits: Limits) -> dict[str, tuple[Profile, ...]]:
    """{engine: its profiles, in the order of their indices}."""
    R, G, chunk, rows, S = limits.requests, limits.block, limits.chunk, limits.rows, limits.cache
    B, most_slots = limits.block_slots, G + 1 + limits.block_slots  # a round's new context, then the block
    some, context = -(-R // 2), (1, S // 2, S)
    requests, packed = (1, some, R), (1, some * (G + 1), rows)
    one, cached = (1, 1, 1), {"C": context} if limits.autoregressive else {}

    def profile(name: str, values: dict[str, Range] | None = None, **sizes: Range) -> Profile:
        return Profile(name, sizes, values or {})

    lists = {name: (0, 1, limits.wide_rows) for name in ("Mw", "Mf", "Mc", "Mx")}
    top = (1, min(64, limits.vocab), min(TOP_MOST, limits.vocab))
    edits = limits.wide_rows * min(limits.vocab, S + EDITS)
    return {
        "target": (
            profile("decode", N=requests, R=requests, Q=one, C=context, M=requests),
            profile("verify", N=packed, R=requests, Q=(1, G + 1, G + 1), C=context, M=packed),
            profile("prefill", N=(1, chunk, chunk + rows), R=(1, 1, R), Q=(1, chunk, chunk), C=context, M=(0, 1, rows)),
        ),
        "backbone": (
            profile("decode", F=(1, 2 * some, rows), R=requests, Q=(1, min(B + 2, most_slots), most_slots), C=context),
            profile("prefill", F=(1, chunk, chunk + rows), R=(1, 1, R), Q=(1, chunk + B, chunk + B), C=context),
        ),
        "markov": (profile("decode", R=requests, Rs=(0, some, R), Rc=(0, 1, R), **cached),),
        "confidence": (profile("decode", R=requests),),
        "verify": (
            profile(
                "verify", {"top_count": top}, M=packed, R=requests, E=(0, 1, edits),
                Rs=(0, some, R), Rq=(1, some, R), Ml=(0, 1, rows), **lists,
            ),
        ),
    }  # fmt: skip


def size(shape: tuple[int | str, ...], profile: Profile, end: int) -> tuple[int, ...]:
    """The shape with its symbols as numbers; end 0 = least, 1 = typical, 2 = most."""
    return tuple(profile.sizes[n][end] if isinstance(n, str) else n for n in shape)

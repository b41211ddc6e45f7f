"""What the five engines take and give: docs/structures.md as a table, and the comparison of a manifest with it.

Knows: names, dtypes and shapes of every input and output. Refuses to know: files, sessions, how a graph computes.
"""

from __future__ import annotations

from .manifest import REMAKE, BundleError
from .specs import DraftSpec, TargetSpec, TensorSpec

Tensors = dict[str, tuple[str, tuple]]  # {name: (dtype, shape)}
OPTIONAL = {"block_position_ids"}  # inputs: attention by engines/kernels finds a block's positions among position_ids
I64, F32 = "int64", "float32"


def contract(target: TargetSpec, draft: DraftSpec) -> dict[str, tuple[Tensors, Tensors]]:
    """What docs/structures.md says each engine takes and gives: {engine: (inputs, outputs)}.

    Strings in a shape are symbols; the dtype "mask" stands for bool or a float dtype (an additive mask).
    """
    t, d = target, draft
    V, Vd, G, hidden, rank = t.vocab_size, d.vocab_size, d.block_size, t.hidden_size, d.markov_rank
    width = len(d.layer_ids) * hidden
    i64, f32 = I64, F32

    def caches(spec: TargetSpec | DraftSpec, prefix: str) -> Tensors:
        names = (f"{prefix}.{i}.{part}" for i in range(len(spec.cache_shapes) // 2) for part in ("key", "value"))
        return {name: ("cache", ("R", heads, "C", size)) for name, (heads, size) in zip(names, spec.cache_shapes)}

    embeddings = {"markov_embeddings": (f32, ("R", G, rank))} if rank else {}
    past = caches(d, "past_key_values")
    context, newest, before = (_by_rows if d.autoregressive else _by_block)(d, width, hidden, past)
    return {
        "target": (
            {
                "token_ids": (i64, ("N",)),
                "pad_index": (i64, ("R", "Q")),
                "pack_index": (i64, ("N",)),
                "position_ids": (i64, ("R", "Q")),
                "write_index": (i64, ("R",)),
                "mask": ("mask", ("R", 1, "Q", "C")),
                "logit_rows": (i64, ("M",)),
                **caches(t, "past_key_values"),
            },
            {
                "logits": (f32, ("M", V)),
                "features": (f32, ("N", width)),
                **caches(t, "present"),
            },
        ),
        "backbone": (context, {**newest, **caches(d, "present")}),
        "markov": (
            {
                **before,
                "sample_index": (i64, ("Rs",)),
                "temperature": (f32, ("Rs",)),
                "uniforms": (f32, ("Rs", G)),
                "match_index": (i64, ("Rc",)),
                "match_temperature": (f32, ("Rc",)),
                "noise": (f32, ("Rc", G, V)),
            },
            {
                "draft_tokens": (i64, ("R", G)),
                "draft_indices": (i64, ("R", G)),
                "draft_probs": (f32, ("Rs", G, Vd)),
                **embeddings,
            },
        ),
        "confidence": (
            {"hidden": newest["hidden"], **(embeddings if d.confidence_with_markov else {})},
            {"confidence_logits": (f32, ("R", G))},
        ),
        "verify": (
            {
                "logits": (f32, ("M", V)),
                "row_index": (i64, ("R", G + 1)),
                "draft_tokens": (i64, ("R", G)),
                "num_draft": (i64, ("R",)),
                "wide_rows": (i64, ("Mw",)),
                "temperature": (f32, ("Mw",)),
                "edit_at": (i64, ("E", 2)),
                "edit_scale": (f32, ("E",)),
                "edit_add": (f32, ("E",)),
                "filter_rows": (i64, ("Mf",)),
                "top_k": (i64, ("Mf",)),
                "top_p": (f32, ("Mf",)),
                "min_p": (f32, ("Mf",)),
                "top_count": (i64, (1,)),
                "match_rows": (i64, ("Mc",)),
                "noise": (f32, ("Mc", V)),
                "match_filtered": (i64, ("Mx",)),
                "sample_index": (i64, ("Rs",)),
                "sample_rows": (i64, ("Rs", G + 1)),
                "draft_rows": (i64, ("Rs",)),
                "draft_indices": (i64, ("Rs", G)),
                "draft_probs": (f32, ("Rq", G, Vd)),
                "accept_uniforms": (f32, ("Rs", G)),
                "next_uniforms": (f32, ("Rs", G + 1)),
                "log_prob_rows": (i64, ("Ml",)),
                "log_prob_at": (i64, ("Ml", 2)),
            },
            {
                "accepted": (i64, ("R",)),
                "next_tokens": (i64, ("R",)),
                "complete": ("bool", ("Mf",)),
                "log_probs": (f32, ("Ml",)),
            },
        ),
    }


def _by_block(d: DraftSpec, width: int, hidden: int, past: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """What the backbone of a draft of whole blocks takes and gives, caches aside in the latter, and what its markov
    engine takes beside the numbers to draw with."""
    G, B, rank = d.block_size, d.block_slots, d.markov_rank
    given = {"hidden": (F32, ("R", G, hidden)), "base_logits": (F32, ("R", G, d.vocab_size))}
    taken = {
        "features": (F32, ("F", width)),
        "anchor_ids": (I64, ("R",)),
        "pad_index": (I64, ("R", "Q")),
        "position_ids": (I64, ("R", "Q")),
        "block_position_ids": (I64, ("R", B)),
        "write_index": (I64, ("R",)),
        "mask": ("mask", ("R", 1, B, "C")),
        **past,
    }
    heads = {
        **({"hidden": given["hidden"]} if rank and d.markov_head_type != "vanilla" else {}),
        "base_logits": given["base_logits"],
        **({"anchor_ids": (I64, ("R",))} if rank else {}),
    }
    return taken, given, heads


def _by_rows(d: DraftSpec, width: int, hidden: int, past: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """The same of an autoregressive draft; only with more than one layer do rows attend in the backbone, only with more
    than one token a block are there steps."""
    given = {"hidden": (F32, ("R", 1, hidden)), "base_logits": (F32, ("R", 1, d.vocab_size))}
    every_row = {"pack_index": (I64, ("F",)), "mask_rows": ("mask", ("R", 1, "Q", "C"))}
    taken = {
        "features": (F32, ("F", width)),
        "next_ids": (I64, ("F",)),
        "pad_index": (I64, ("R", "Q")),
        "position_ids": (I64, ("R", "Q")),
        "write_index": (I64, ("R",)),
        "last_index": (I64, ("R",)),
        "last_position_ids": (I64, ("R", 1)),
        "mask": ("mask", ("R", 1, 1, "C")),
        **(every_row if d.depth > 1 else {}),
        **past,
    }
    steps = {**given, "position_ids": (I64, ("R",)), "mask": ("mask", ("R", 1, 1, "C")), **past}
    return taken, given, steps if d.block_size > 1 else {"base_logits": given["base_logits"]}


def compare(where: str, kind: str, want: Tensors, have: tuple[TensorSpec, ...]) -> None:
    """Names must be equal as sets; ranks and the integers of the contract equal; symbols stand for anything.

    Raises BundleError, one sentence that begins with `where`; kind: input | output."""
    names = {spec.name: spec for spec in have}
    if missing := sorted(want.keys() - names.keys() - OPTIONAL):
        raise BundleError(f"{where} lacks the {kind} {missing[0]!r}; {REMAKE}.")
    if extra := sorted(names.keys() - want.keys()):
        raise BundleError(f"{where} has an unknown {kind} {extra[0]!r}; {REMAKE}.")
    halves = ("float16", "bfloat16")
    allowed = {"mask": ("bool", "float32", *halves), "cache": ("float32", *halves)}
    for name, (dtype, shape) in want.items():
        if (spec := names.get(name)) is None:
            continue
        if spec.dtype not in allowed.get(dtype, (dtype,)):
            raise BundleError(f"{where}: {kind} {name!r} is {spec.dtype}, expected {dtype}; {REMAKE}.")
        fits = len(spec.shape) == len(shape) and all(
            isinstance(w, str) or isinstance(h, str) or w == h for w, h in zip(shape, spec.shape)
        )
        if not fits:
            raise BundleError(f"{where}: {kind} {name!r} is {list(spec.shape)}, expected {list(shape)}; {REMAKE}.")

"""The parts of a bundle as frozen dataclasses: its target, its draft, its five graphs and their tensors.

Knows: which keys each part has in manifest.json, and their types.
Refuses to know: whether the parts fit each other (contract.py), the files on the disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .manifest import get

ENGINE_NAMES = ("target", "backbone", "markov", "confidence", "verify")
Spec = TypeVar("Spec")


@dataclass(frozen=True)
class TargetSpec:
    """The target model of a bundle; `eos_token_ids` may be empty, `bos_token_id` None."""

    model_type: str
    hash: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    name: str
    bos_token_id: int | None = None


@dataclass(frozen=True)
class DraftSpec:
    """The draft module of a bundle; `vocab_size` is V_d, `block_size` G."""

    hash: str
    block_size: int
    depth: int
    num_kv_heads: int
    head_dim: int
    layer_ids: tuple[int, ...]
    mask_token_id: int
    markov_rank: int
    markov_head_type: str
    has_confidence: bool
    confidence_with_markov: bool
    vocab_size: int


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output: a shape of ints and symbols (docs/structures.md's legend), a numpy dtype name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class EngineSpec:
    """One graph: its file (relative to the bundle), hashes, inputs and outputs in the graph's order; in a TensorRT
    bundle `plans`, an entry a compute capability (engines/trt/plans.py)."""

    path: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    data_sha256: str | None = None
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)


def spec_of(cls: type[Spec], raw: dict, where: str) -> Spec:
    """TargetSpec or DraftSpec from its JSON object. Raises BundleError, one sentence that begins with `where`."""
    kinds = {"int": int, "str": str, "bool": bool, "tuple[int, ...]": tuple}
    values = {}
    for key in fields(cls):
        if key.type == "int | None":
            values[key.name] = raw.get(key.name)
        else:
            kind = kinds[key.type]
            values[key.name] = get(raw, key.name, kind, where, of=(int,) if kind is tuple else ())
    return cls(**values)


def engine_specs(raw: dict, file: Path) -> dict[str, EngineSpec]:
    """{engine: its spec} from the JSON object `engines` of `file`. Raises BundleError for an engine that is missing."""
    specs = {}
    for name in ENGINE_NAMES:
        entry, where = get(raw, name, dict, f"{file}: engines"), f"{file}: engine {name}"
        specs[name] = EngineSpec(
            path=get(entry, "path", str, where),
            sha256=get(entry, "sha256", str, where),
            inputs=_tensors(get(entry, "inputs", tuple, where, of=(dict,)), where),
            outputs=_tensors(get(entry, "outputs", tuple, where, of=(dict,)), where),
            data_sha256=entry.get("data_sha256"),
            plans=get(entry, "plans", dict, where) if "plans" in entry else {},
        )
    return specs


def _tensors(raw: tuple, where: str) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            get(t, "name", str, where), get(t, "dtype", str, where), get(t, "shape", tuple, where, of=(int, str))
        )
        for t in raw
    )

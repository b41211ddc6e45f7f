"""The parts of a bundle as frozen dataclasses: its target, its draft, its five graphs and their tensors.

Knows: which keys each part has in manifest.json, and their types.
Refuses to know: whether the parts fit each other (contract.py), the files on the disk.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from .manifest import REMAKE, BundleError, get

ENGINE_NAMES = ("target", "backbone", "markov", "confidence", "verify")
DRAFT_KINDS = ("parallel", "eagle3", "mtp")
Spec = TypeVar("Spec")


@dataclass(frozen=True)
class TargetSpec:
    """The target model of a bundle; `eos_token_ids` may be empty, `bos_token_id` None. caches: (H_kv, D) of each layer
    that keeps keys and values, the first layers; empty where all of them do, num_kv_heads of head_dim each."""

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
    caches: tuple[tuple[int, int], ...] = ()

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(H_kv, D) of each cache: a layer's keys, its values, the next layer's keys, ..."""
        layers = self.caches or ((self.num_kv_heads, self.head_dim),) * self.num_layers
        return tuple(shape for shape in layers for _ in range(2))


@dataclass(frozen=True)
class DraftSpec:
    """The draft module of a bundle; `vocab_size` is V_d, `block_size` G, the tokens drafted at once.

    sample_from_anchor false: the block is [anchor, mask x G] and the anchor's slot drafts nothing (DFlash). kind: how
    tokens are drafted: "parallel" (a block at once), or by steps, "eagle3" or "mtp" (engines/autoregressive.py)."""

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
    sample_from_anchor: bool = True
    kind: str = "parallel"

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """As TargetSpec.cache_shapes."""
        return ((self.num_kv_heads, self.head_dim),) * (2 * self.depth)

    @property
    def autoregressive(self) -> bool:
        return self.kind != "parallel"

    @property
    def block_slots(self) -> int:
        """B, the cache slots of a block: G, and one more where the anchor's drafts nothing; none for one drafted by
        steps."""
        return 0 if self.autoregressive else self.block_size + (0 if self.sample_from_anchor else 1)


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


def masks_of(spec: EngineSpec) -> dict[str, str]:
    """{mask input of a graph: its dtype}."""
    return {s.name: s.dtype for s in spec.inputs if s.name in ("mask", "mask_rows")}


def spec_of(cls: type[Spec], raw: dict, where: str) -> Spec:
    """TargetSpec or DraftSpec from its JSON object. Raises BundleError, one sentence that begins with `where`."""
    kinds = {"int": int, "str": str, "bool": bool, "tuple[int, ...]": tuple}
    values = {}
    for key in fields(cls):
        if key.default is not MISSING and key.name not in raw:
            values[key.name] = key.default
        elif key.name == "caches":
            values[key.name] = _pairs(get(raw, key.name, tuple, where), f"{where}: caches")
        elif key.type == "int | None":
            values[key.name] = raw.get(key.name)
        else:
            kind = kinds[key.type]
            values[key.name] = get(raw, key.name, kind, where, of=(int,) if kind is tuple else ())
    return cls(**values)


def _pairs(raw: tuple, where: str) -> tuple[tuple[int, int], ...]:
    """[[H_kv, D], ...] of positive whole numbers."""
    number = lambda n: isinstance(n, int) and not isinstance(n, bool) and n > 0
    if not all(isinstance(p, (list, tuple)) and len(p) == 2 and all(map(number, p)) for p in raw):
        raise BundleError(f"{where} is {list(raw)}, it must be pairs of positive whole numbers; {REMAKE}.")
    return tuple((p[0], p[1]) for p in raw)


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

"""The manifest of a bundle as frozen dataclasses, checked before any engine is opened.

Knows: manifest.json, the files it names, and the contract of the five engines (docs/structures.md).
Refuses to know: how an engine is run, what a request is.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2
ENGINE_NAMES = ("target", "backbone", "markov", "confidence", "verify")
DTYPES = ("fp32", "int8")
_REMAKE = "export the bundle again (python -m export)"
_RECALIBRATE = "calibrate the bundle again (make calibrate)"
_TYPES = {int: "an integer", str: "a string", bool: "true or false", tuple: "a list", dict: "an object"}


class BundleError(ValueError):
    """A bundle that does not fit; the message is one sentence that names what, and what to run."""


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
    """One graph: its file (relative to the bundle), hashes, inputs and outputs in the graph's order."""

    path: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    data_sha256: str | None = None


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. `max_context` is S, the positions its rotary tables hold."""

    folder: Path
    backend: str
    dtype: str
    created: str
    target: TargetSpec
    draft: DraftSpec
    max_context: int
    engines: dict[str, EngineSpec]
    builder: dict[str, Any]
    parity: tuple[dict[str, Any], ...]
    confidence_temperatures: tuple[float, ...] | None = None
    sps: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None

    def temperatures(self, sampled: bool) -> tuple[float, ...]:
        """[G] temperatures of the confidence logits of sampled or of greedy requests; 1.0 in a bundle without any."""
        own = (self.calibration or {}).get("sampled" if sampled else "greedy") or self.confidence_temperatures
        return tuple(own or (1.0,) * self.draft.block_size)

    def biases(self, sampled: bool) -> tuple[float, ...]:
        """[G] added to the confidence logits after the temperature (calibration.bias); 0.0 in a bundle without any."""
        bias = (self.calibration or {}).get("bias") or {}
        return tuple(bias.get("sampled" if sampled else "greedy") or (0.0,) * self.draft.block_size)

    @property
    def tokenizer_file(self) -> Path | None:
        """tokenizer.json, or None for a target without a tokenizer."""
        path = self.folder / "tokenizer.json"
        return path if path.is_file() else None

    @classmethod
    def load(cls, folder: str | Path, *, check_hashes: bool = True) -> "Bundle":
        """Reads and checks `folder`/manifest.json. Raises BundleError, in one sentence, for whatever does not fit."""
        folder = Path(folder)
        file = folder / "manifest.json"
        if not file.is_file():
            raise BundleError(f"{folder} holds no manifest.json; it is not a bundle: make one with python -m export.")
        try:
            raw = json.loads(file.read_text())
        except (ValueError, OSError) as error:
            raise BundleError(f"{file} is not readable JSON ({error}); {_REMAKE}.") from None
        if not isinstance(raw, dict):
            raise BundleError(f"{file} is not a JSON object; {_REMAKE}.")
        if raw.get("format_version") != FORMAT_VERSION:
            raise BundleError(
                f"{file}: format_version is {raw.get('format_version')!r}, this version reads {FORMAT_VERSION}; {_REMAKE}."
            )
        bundle = cls(
            folder=folder,
            backend=_get(raw, "backend", str, file),
            dtype=_get(raw, "dtype", str, file),
            created=_get(raw, "created", str, file),
            target=_spec(TargetSpec, _get(raw, "target", dict, file), f"{file}: target"),
            draft=_spec(DraftSpec, _get(raw, "draft", dict, file), f"{file}: draft"),
            max_context=_get(raw, "max_context", int, file),
            engines=_engines(_get(raw, "engines", dict, file), file),
            builder=_get(raw, "builder", dict, file),
            parity=tuple(_get(raw, "parity", tuple, file)),
            confidence_temperatures=_temperatures(raw, file),
            sps=raw.get("sps"),
            calibration=raw.get("calibration"),
        )
        bundle._check(file)
        if check_hashes:
            bundle._check_hashes()
        return bundle

    def _check(self, file: Path) -> None:
        """Every engine's declared inputs and outputs against the contract and this bundle's dimensions."""
        if self.backend != "onnxruntime":
            raise BundleError(f"{file}: backend is {self.backend!r}, this version runs 'onnxruntime'; {_REMAKE}.")
        if self.dtype not in DTYPES:
            raise BundleError(f"{file}: dtype is {self.dtype!r}, it must be one of {', '.join(DTYPES)}; {_REMAKE}.")
        temperatures = self.confidence_temperatures
        if temperatures is not None and (
            len(temperatures) != self.draft.block_size or any(not t > 0 for t in temperatures)
        ):
            raise BundleError(
                f"{file}: confidence_temperatures is {list(temperatures)}, it must be {self.draft.block_size} "
                f"positive numbers; {_REMAKE}."
            )
        for key in ("greedy", "sampled"):
            self._check_calibration(file, key)
        for name, (inputs, outputs) in contract(self).items():
            spec = self.engines[name]
            for kind, want, have in (("input", inputs, spec.inputs), ("output", outputs, spec.outputs)):
                _compare(f"{file}: engine {name}", kind, want, have)
            if not (self.folder / spec.path).is_file():
                raise BundleError(f"{self.folder / spec.path} is missing although the manifest names it; {_REMAKE}.")

    def _check_calibration(self, file: Path, key: str) -> None:
        if self.calibration is None:
            return
        if not isinstance(self.calibration, dict):
            raise BundleError(f"{file}: calibration is {self.calibration!r}, it must be an object; {_RECALIBRATE}.")
        check_calibration(self.calibration, self, str(file), key)

    def _check_hashes(self) -> None:
        verdicts = _HashCache()
        for name, spec in self.engines.items():
            path = self.folder / spec.path
            for file, want in ((path, spec.sha256), (path.with_name(path.name + ".data"), spec.data_sha256)):
                if want is None:
                    continue
                if not file.is_file():
                    raise BundleError(f"{file} is missing although the manifest hashes it; {_REMAKE}.")
                if verdicts.sha256(file) != want:
                    raise BundleError(f"{file} is not the file the manifest describes (sha256 differs); {_REMAKE}.")
        verdicts.save()


def check_calibration(calibration: dict[str, Any], bundle: Bundle, where: str, key: str) -> None:
    """Raises BundleError when the temperatures or biases `key` (greedy | sampled) do not fit `bundle`, or when they were
    fitted for another draft or target. `where` begins the sentence."""
    G, bias = bundle.draft.block_size, calibration.get("bias") or {}
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < float("inf")
    values = calibration.get(key)
    if not isinstance(values, list) or len(values) != G or not all(number(v) and v > 0 for v in values):
        raise BundleError(f"{where}: calibration.{key} is {values!r}, it must be {G} positive numbers; {_RECALIBRATE}.")
    values = bias.get(key, [0.0] * G) if isinstance(bias, dict) else bias
    if not isinstance(values, list) or len(values) != G or not all(map(number, values)):
        raise BundleError(f"{where}: calibration.bias.{key} is {values!r}, it must be {G} finite numbers; {_RECALIBRATE}.")
    for name, have in (("draft", bundle.draft.hash), ("target", bundle.target.hash)):
        other = calibration.get(f"{name}_hash", have)
        if other != have:
            raise BundleError(
                f"{where}: calibration was fitted for the {name} {str(other)[:12]}, the bundle's {name} is {have[:12]}; {_RECALIBRATE}."
            )


def update_manifest(folder: str | Path, **keys: Any) -> None:
    """Sets top-level keys of `folder`/manifest.json; a reader sees the old file or the new one, never a part."""
    file = Path(folder) / "manifest.json"
    raw = {**json.loads(file.read_text()), **keys}
    temporary = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(json.dumps(raw, indent=1) + "\n")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def contract(bundle: Bundle) -> dict[str, tuple[dict[str, tuple[str, tuple]], dict[str, tuple[str, tuple]]]]:
    """What docs/structures.md says each engine takes and gives: {engine: (inputs, outputs)}, {name: (dtype, shape)}.

    Strings in a shape are symbols; the dtype "mask" stands for bool or a float dtype (an additive mask).
    """
    t, d = bundle.target, bundle.draft
    V, Vd, G, hidden, rank = t.vocab_size, d.vocab_size, d.block_size, t.hidden_size, d.markov_rank
    width = len(d.layer_ids) * hidden
    i64, f32 = "int64", "float32"

    def caches(layers: int, heads: int, size: int, prefix: str) -> dict[str, tuple[str, tuple]]:
        shape = ("R", heads, "C", size)
        return {f"{prefix}.{i}.{part}": ("cache", shape) for i in range(layers) for part in ("key", "value")}

    embeddings = {"markov_embeddings": (f32, ("R", G, rank))} if rank else {}
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
                **caches(t.num_layers, t.num_kv_heads, t.head_dim, "past_key_values"),
            },
            {
                "logits": (f32, ("M", V)),
                "features": (f32, ("N", width)),
                **caches(t.num_layers, t.num_kv_heads, t.head_dim, "present"),
            },
        ),
        "backbone": (
            {
                "features": (f32, ("F", width)),
                "anchor_ids": (i64, ("R",)),
                "pad_index": (i64, ("R", "Q")),
                "position_ids": (i64, ("R", "Q")),
                "block_position_ids": (i64, ("R", G)),
                "write_index": (i64, ("R",)),
                "mask": ("mask", ("R", 1, G, "C")),
                **caches(d.depth, d.num_kv_heads, d.head_dim, "past_key_values"),
            },
            {
                "hidden": (f32, ("R", G, hidden)),
                "base_logits": (f32, ("R", G, Vd)),
                **caches(d.depth, d.num_kv_heads, d.head_dim, "present"),
            },
        ),
        "markov": (
            {
                **({"hidden": (f32, ("R", G, hidden))} if rank and d.markov_head_type != "vanilla" else {}),
                "base_logits": (f32, ("R", G, Vd)),
                **({"anchor_ids": (i64, ("R",))} if rank else {}),
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
            {"hidden": (f32, ("R", G, hidden)), **(embeddings if d.confidence_with_markov else {})},
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


def _compare(where: str, kind: str, want: dict[str, tuple[str, tuple]], have: tuple[TensorSpec, ...]) -> None:
    """Names must be equal as sets; ranks and the integers of the contract equal; symbols stand for anything."""
    names = {spec.name: spec for spec in have}
    if missing := sorted(want.keys() - names.keys()):
        raise BundleError(f"{where} lacks the {kind} {missing[0]!r}; {_REMAKE}.")
    if extra := sorted(names.keys() - want.keys()):
        raise BundleError(f"{where} has an unknown {kind} {extra[0]!r}; {_REMAKE}.")
    allowed = {"mask": ("bool", "float32", "float16"), "cache": ("float32", "float16")}
    for name, (dtype, shape) in want.items():
        spec = names[name]
        if spec.dtype not in allowed.get(dtype, (dtype,)):
            raise BundleError(f"{where}: {kind} {name!r} is {spec.dtype}, expected {dtype}; {_REMAKE}.")
        fits = len(spec.shape) == len(shape) and all(
            isinstance(w, str) or isinstance(h, str) or w == h for w, h in zip(shape, spec.shape)
        )
        if not fits:
            raise BundleError(f"{where}: {kind} {name!r} is {list(spec.shape)}, expected {list(shape)}; {_REMAKE}.")


def _get(raw: dict, key: str, kind: type, where: object) -> Any:
    if key not in raw:
        raise BundleError(f"{where} lacks the key {key!r}; {_REMAKE}.")
    value = tuple(raw[key]) if kind is tuple and isinstance(raw[key], list) else raw[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BundleError(f"{where}: {key} is {raw[key]!r}, it must be {_TYPES[kind]}; {_REMAKE}.")
    return value


def _spec(cls: type, raw: dict, where: str) -> Any:
    kinds = {"int": int, "str": str, "bool": bool, "tuple[int, ...]": tuple}
    values = {}
    for field in fields(cls):
        if field.type == "int | None":
            values[field.name] = raw.get(field.name)
        else:
            values[field.name] = _get(raw, field.name, kinds[field.type], where)
    return cls(**values)


def _engines(raw: dict, file: Path) -> dict[str, EngineSpec]:
    specs = {}
    for name in ENGINE_NAMES:
        entry, where = _get(raw, name, dict, f"{file}: engines"), f"{file}: engine {name}"
        specs[name] = EngineSpec(
            path=_get(entry, "path", str, where),
            sha256=_get(entry, "sha256", str, where),
            inputs=_tensors(_get(entry, "inputs", tuple, where), where),
            outputs=_tensors(_get(entry, "outputs", tuple, where), where),
            data_sha256=entry.get("data_sha256"),
        )
    return specs


def _tensors(raw: tuple, where: str) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(_get(t, "name", str, where), _get(t, "dtype", str, where), _get(t, "shape", tuple, where))
        for t in raw
    )


def _temperatures(raw: dict, file: Path) -> tuple[float, ...] | None:
    values = raw.get("confidence_temperatures")
    if values is None:
        return None
    try:
        return tuple(float(v) for v in values)
    except (TypeError, ValueError):
        raise BundleError(f"{file}: confidence_temperatures is {values!r}, it must be numbers; {_REMAKE}.") from None


class _HashCache:
    """sha256 of files, remembered by (path, size, mtime) in the user's temporary folder; losing it costs a second."""

    def __init__(self) -> None:
        user = os.getuid() if hasattr(os, "getuid") else "user"
        self.file = Path(tempfile.gettempdir()) / f"dspark-hashes-{user}.json"
        self.changed = False
        try:
            known = json.loads(self.file.read_text()) if self.file.stat().st_uid == user else {}
            self.known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            self.known = {}

    def sha256(self, file: Path) -> str:
        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in self.known:
            with file.open("rb") as handle:
                self.known[key] = hashlib.file_digest(handle, "sha256").hexdigest()
            self.changed = True
        return self.known[key]

    def save(self) -> None:
        if not self.changed:
            return
        temporary = self.file.with_suffix(f".{os.getpid()}")
        try:
            temporary.write_text(json.dumps(dict(list(self.known.items())[-500:])))
            temporary.replace(self.file)
        except OSError:  # a cache only
            pass

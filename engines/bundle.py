"""A bundle: its manifest as one frozen dataclass, checked before any engine is opened.

Knows: what must fit together in a bundle, and the calibration of its confidences.
Refuses to know: how an engine is run, what a request is. What others need of manifest.py, specs.py and contract.py
is imported from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contract import compare, contract
from .hashes import HashCache
from .manifest import FORMAT_VERSION, REMAKE, BundleError, get, read, update_manifest
from .native import KernelsSpec
from .specs import DRAFT_KINDS, ENGINE_NAMES, DraftSpec, EngineSpec, TargetSpec, TensorSpec, engine_specs, spec_of

__all__ = [
    "ENGINE_NAMES", "FORMAT_VERSION", "Bundle", "BundleError", "DraftSpec", "EngineSpec", "TargetSpec", "TensorSpec",
    "check_calibration", "contract", "update_manifest",
]  # fmt: skip
TENSORRT_DTYPES = ("fp16", "bf16", "int8")  # int8: weights alone, products in float16
DTYPES = {  # by backend; int8-block64: scales per 64 inputs everywhere in the target, faster for one request, slower for many
    "onnxruntime": ("fp32", "int8", "int8-block64"), "tensorrt": TENSORRT_DTYPES, "tensorrt-rtx": TENSORRT_DTYPES,
}  # fmt: skip
_RECALIBRATE = "calibrate the bundle again (make calibrate)"


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
    tensorrt: dict[str, Any] | None = None
    kernels: KernelsSpec | None = None

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
        raw = read(file)
        bundle = cls(
            folder=folder,
            backend=get(raw, "backend", str, file),
            dtype=get(raw, "dtype", str, file),
            created=get(raw, "created", str, file),
            target=spec_of(TargetSpec, get(raw, "target", dict, file), f"{file}: target"),
            draft=spec_of(DraftSpec, get(raw, "draft", dict, file), f"{file}: draft"),
            max_context=get(raw, "max_context", int, file),
            engines=engine_specs(get(raw, "engines", dict, file), file),
            builder=get(raw, "builder", dict, file),
            parity=tuple(get(raw, "parity", tuple, file)),
            confidence_temperatures=_temperatures(raw, file),
            sps=raw.get("sps"),
            calibration=raw.get("calibration"),
            tensorrt=get(raw, "tensorrt", dict, file) if "tensorrt" in raw else None,
            kernels=KernelsSpec.of(get(raw, "kernels", dict, file), f"{file}: kernels") if "kernels" in raw else None,
        )
        bundle._check(file)
        if check_hashes:
            bundle._check_hashes()
        return bundle

    def _check(self, file: Path) -> None:
        """Every engine's declared inputs and outputs against the contract and this bundle's dimensions."""
        if self.backend not in DTYPES:
            raise BundleError(f"{file}: backend is {self.backend!r}, it must be one of {', '.join(DTYPES)}; {REMAKE}.")
        if self.dtype not in (dtypes := DTYPES[self.backend]):
            raise BundleError(f"{file}: dtype is {self.dtype!r}, it must be one of {', '.join(dtypes)}; {REMAKE}.")
        if self.draft.kind not in DRAFT_KINDS:
            kinds = ", ".join(DRAFT_KINDS)
            raise BundleError(f"{file}: draft.kind is {self.draft.kind!r}, it must be one of {kinds}; {REMAKE}.")
        if (self.tensorrt is None) != (self.backend == "onnxruntime"):
            raise BundleError(f"{file}: backend is {self.backend!r}, the key 'tensorrt' does not go with it; {REMAKE}.")
        temperatures = self.confidence_temperatures
        if temperatures is not None and (
            len(temperatures) != self.draft.block_size or any(not t > 0 for t in temperatures)
        ):
            raise BundleError(
                f"{file}: confidence_temperatures is {list(temperatures)}, it must be {self.draft.block_size} "
                f"positive numbers; {REMAKE}."
            )
        for key in ("greedy", "sampled"):
            self._check_calibration(file, key)
        for name, (inputs, outputs) in contract(self.target, self.draft).items():
            spec = self.engines[name]
            for kind, want, have in (("input", inputs, spec.inputs), ("output", outputs, spec.outputs)):
                compare(f"{file}: engine {name}", kind, want, have)
            if not (self.folder / spec.path).is_file():
                raise BundleError(f"{self.folder / spec.path} is missing although the manifest names it; {REMAKE}.")

    def _check_calibration(self, file: Path, key: str) -> None:
        if self.calibration is None:
            return
        if not isinstance(self.calibration, dict):
            raise BundleError(f"{file}: calibration is {self.calibration!r}, it must be an object; {_RECALIBRATE}.")
        check_calibration(self.calibration, self, str(file), key)

    @property
    def library(self) -> Path | None:
        """The bundle's own CPU operators, where its graphs call any."""
        return self.folder / self.kernels.path if self.kernels else None

    def packed(self, engine: str) -> bool:
        """Whether the engine's attention works on packed rows: nothing is written for an empty slot, and no position is read that
        is not attended."""
        return self.kernels is not None and engine in self.kernels.attention

    @property
    def hashes(self) -> dict[str, str]:
        """{engine, "kernels": sha256} of what computes: a speed that was measured holds for these."""
        kernels = {"kernels": self.kernels.sha256} if self.kernels else {}
        return {name: spec.sha256 for name, spec in self.engines.items()} | kernels

    def _check_hashes(self) -> None:
        verdicts = HashCache()
        files = [(self.library, self.kernels.sha256)] if self.kernels else []
        for spec in self.engines.values():
            path = self.folder / spec.path
            files += [(path, spec.sha256), (path.with_name(path.name + ".data"), spec.data_sha256)]
        for file, want in files:
            if want is None:
                continue
            if not file.is_file():
                raise BundleError(f"{file} is missing although the manifest hashes it; {REMAKE}.")
            if verdicts.sha256(file) != want:
                raise BundleError(f"{file} is not the file the manifest describes (sha256 differs); {REMAKE}.")
        verdicts.save()


def check_calibration(calibration: dict[str, Any], bundle: Bundle, where: str, key: str) -> None:
    """Raises BundleError when the temperatures or biases `key` (greedy | sampled) do not fit `bundle`.

    They do not fit when they were fitted for another draft or target either. `where` begins the sentence."""
    G, bias = bundle.draft.block_size, calibration.get("bias") or {}
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < float("inf")
    values = calibration.get(key)
    if not isinstance(values, list) or len(values) != G or not all(number(v) and v > 0 for v in values):
        raise BundleError(f"{where}: calibration.{key} is {values!r}, it must be {G} positive numbers; {_RECALIBRATE}.")
    values = bias.get(key, [0.0] * G) if isinstance(bias, dict) else bias
    if not isinstance(values, list) or len(values) != G or not all(map(number, values)):
        raise BundleError(
            f"{where}: calibration.bias.{key} is {values!r}, it must be {G} finite numbers; {_RECALIBRATE}."
        )
    for name, have in (("draft", bundle.draft.hash), ("target", bundle.target.hash)):
        other = calibration.get(f"{name}_hash", have)
        if other != have:
            raise BundleError(
                f"{where}: calibration was fitted for the {name} {str(other)[:12]}, the bundle's {name} is "
                f"{have[:12]}; {_RECALIBRATE}."
            )


def _temperatures(raw: dict, file: Path) -> tuple[float, ...] | None:
    values = raw.get("confidence_temperatures")
    if values is None:
        return None
    try:
        return tuple(float(v) for v in values)
    except (TypeError, ValueError):
        raise BundleError(f"{file}: confidence_temperatures is {values!r}, it must be numbers; {REMAKE}.") from None

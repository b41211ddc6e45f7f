"""The plans of a bundle: compiled where something changed, kept where nothing did, checked before anything opens them.

Knows: where plans lie in a bundle, their entries in its manifest, what must be equal for a plan to be used again.
Refuses to know: the builder's calls, how a plan is run.

    engines.NAME.plans.CAPABILITY = {path, summary, key, sha256, bytes, kernels, attention: {nodes, unfused: [names]},
        seconds, peak_bytes, memory}          (summary: JSON of the plan's kernels with their tactics and ONNX nodes)
    tensorrt = {backend, version, limits, profiles: {engine: [{name, sizes, values}]}, workspace}
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..bundle import Bundle
from ..hashes import HashCache
from ..manifest import BundleError
from ..specs import TensorSpec
from .api import Api, load_api
from .build import Job, Plan, compile_graph
from .device import gpu_capability
from .profiles import Limits, Profile, profiles_of


@dataclass(frozen=True)
class GraphFile:
    """An exported graph: its name, model.onnx, the hashes of model.onnx and of its data ("" without), its inputs."""

    name: str
    path: Path
    sha256: str
    data_sha256: str
    inputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Built:
    """What became of one graph for one capability; `entry` is its manifest entry, `unfused` its decomposed
    attentions."""

    engine: str
    capability: str
    entry: dict
    unfused: tuple[str, ...]
    reused: bool


@dataclass(frozen=True)
class Compiler:
    """What all plans of a bundle are compiled with. timings: file of TensorRT's timing cache, None = none."""

    api: Api
    limits: Limits
    workspace: int
    timings: Path | None = None

    def settings(self) -> dict:
        """The manifest's `tensorrt`."""
        profiles = {engine: [p.as_json() for p in each] for engine, each in profiles_of(self.limits).items()}
        return {
            "backend": self.api.backend,
            "version": self.api.version,
            "limits": asdict(self.limits),
            "profiles": profiles,
            "workspace": self.workspace,
        }

    def compile(
        self,
        graph: GraphFile,
        capability: str,
        folder: Path,
        previous: Path,
        progress: Callable[[float], None] = lambda share: None,
    ) -> Built:
        """Writes plans/CAPABILITY/NAME.plan and .json under `folder`, from the bundle `previous` when its plan still
        fits.

        Raises BuildError (build.compile_graph). Nothing under a plan's name is ever half written."""
        profiles = profiles_of(self.limits)[graph.name]
        key = plan_key(self.api, graph, capability, profiles, self.workspace)
        entry = _kept(previous, graph.name, capability, key)
        target = plan_path(graph.name, capability)
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if entry is not None:
            for name in (entry["path"], entry["summary"]):
                _link(previous / name, folder / name)
            return Built(graph.name, capability, entry, tuple(entry["attention"]["unfused"]), reused=True)
        timings = self.timings.read_bytes() if self.timings and self.timings.is_file() else b""
        job = Job(graph.name, graph.path, graph.inputs, profiles, capability, self.workspace, folder / target, timings)
        plan = compile_graph(self.api, job, progress)
        if self.timings and plan.timings:
            self.timings.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.timings, plan.timings)
        write_whole(folder / target.with_suffix(".json"), summary(plan))
        return Built(graph.name, capability, entry_of(plan, target, key), plan.unfused, reused=False)


def plan_path(engine: str, capability: str) -> Path:
    return Path("plans") / f"sm{capability.replace('.', '')}" / f"{engine}.plan"


def plan_key(api: Api, graph: GraphFile, capability: str, profiles: tuple[Profile, ...], workspace: int) -> str:
    """sha256 of all that a plan is made of; the dtype is in the graph. A plan's own bytes differ from build to
    build."""
    parts = [
        api.backend,
        api.version,
        capability,
        graph.sha256,
        graph.data_sha256,
        [p.as_json() for p in profiles],
        workspace,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def entry_of(plan: Plan, path: Path, key: str) -> dict:
    return {
        "path": str(path),
        "summary": str(path.with_suffix(".json")),
        "key": key,
        "sha256": plan.sha256,
        "bytes": plan.size,
        "kernels": len(plan.kernels),
        "attention": {"nodes": len(plan.attentions), "unfused": list(plan.unfused)},
        "seconds": round(plan.seconds, 2),
        "peak_bytes": plan.peak,
        "memory": plan.memory,
    }


def summary(plan: Plan) -> bytes:
    """The plan's kernels as JSON, one a line."""
    rows = [json.dumps(asdict(kernel)) for kernel in plan.kernels]
    return ("[\n" + ",\n".join(rows) + "\n]\n").encode()


def check_plan(bundle: Bundle, engine: str, *, backend: str, version: str, capability: str | None) -> Path:
    """The plan file of an engine for this builder version and GPU, its bytes checked.

    Raises BundleError, one sentence with what to run, before anything deserialises it."""
    made, where = bundle.tensorrt or {}, f"{bundle.folder}"
    again = f"python -m export --backend {bundle.backend}"
    if made.get("backend") != backend:
        raise BundleError(
            f"{where}: its plans are {made.get('backend')}'s, this process has {backend}; "
            f"run python -m export --backend {backend}."
        )
    if made.get("version") != version:
        raise BundleError(
            f"{where}: its plans were compiled by {backend} {made.get('version')}, this machine has {version}; "
            f"run {again}."
        )
    if capability is None:
        raise BundleError(
            f"{where}: its plans need an NVIDIA GPU, and there is none here; "
            f"run python -m export --backend onnxruntime."
        )
    plans = bundle.engines[engine].plans
    if capability not in plans:
        raise BundleError(
            f"{where}: its plan of {engine} is for compute capability {', '.join(sorted(plans)) or 'none'}, "
            f"this GPU has {capability}; "
            f"run {again} --compute-capability {capability}."
        )
    entry, hashes = plans[capability], HashCache()
    file = bundle.folder / entry["path"]
    if not file.is_file():
        raise BundleError(f"{file} is missing although the manifest names it; run {again}.")
    if hashes.sha256(file) != entry["sha256"]:
        raise BundleError(f"{file} is not the plan the manifest describes (sha256 differs); run {again}.")
    hashes.save()
    return file


def check_bundle(bundle: Bundle, device: int = 0) -> tuple[Api, dict[str, Path]]:
    """(the builder's package, {engine: its plan}) for GPU `device` of this machine. Raises BundleError (load_api,
    check_plan)."""
    api, capability = load_api(bundle.backend), gpu_capability(device)
    check = lambda name: check_plan(bundle, name, backend=api.backend, version=api.version, capability=capability)
    return api, {name: check(name) for name in bundle.engines}


def compiled_for(bundle: Bundle) -> tuple[Limits, dict[str, tuple[Profile, ...]]]:
    """(limits, {engine: its profiles in the order of their indices}) as the manifest has them. Raises BundleError."""
    made = bundle.tensorrt or {}
    try:
        ranges = lambda raw: {name: tuple(int(n) for n in each) for name, each in raw.items()}
        profile = lambda p: Profile(p["name"], ranges(p["sizes"]), ranges(p["values"]))
        profiles = {name: tuple(map(profile, made["profiles"][name])) for name in bundle.engines}
        return Limits(**made["limits"]), profiles
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"{bundle.folder}: manifest.json: tensorrt.limits or tensorrt.profiles is not as the export writes it "
            f"({error!r}); run python -m export --backend {bundle.backend}."
        ) from None


def _kept(previous: Path, engine: str, capability: str, key: str) -> dict | None:
    """The entry of a plan of the bundle `previous` with this key, whole on the disk; else None."""
    try:
        entry = json.loads((previous / "manifest.json").read_text())["engines"][engine]["plans"][capability]
        if entry["key"] != key or not (previous / entry["summary"]).is_file():
            return None
        with (previous / entry["path"]).open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
        return entry if whole and isinstance(entry["attention"]["unfused"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # another file system
        shutil.copyfile(source, destination)


def write_whole(file: Path, data: bytes) -> None:
    """A reader sees the old file or the new one, never a part."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)

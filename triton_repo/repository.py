"""Generates the model repository (config.pbtxt and model.py of each model) from triton_repo/description.py.

Knows: Triton's folder layout and ModelConfig. Refuses to know: what the models do (triton_repo/models, decoding).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from decoding.request import ACCEPT_RULES
from decoding.schedule import LOAD_AWARE, SCHEDULES
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from .description import CHAIN, DSPARK, ENGINE, ENSEMBLE, POSTPROCESSING, USER_INPUTS, Model, Tensor, wire
from .placement import CPU, GPU, Placement

MODELS = Path(__file__).parent / "models"
PROFILES = ("never", "missing", "always")


@dataclass(frozen=True)
class Settings:
    """What the served models are told, as parameters of their config.pbtxt.

    schedule: a name of decoding.schedule.SCHEDULES; threshold in 0..1: for `threshold`, confidence under which
    nothing more is verified; accept: rule of requests that name none; profile: when the server measures the SPS
    table at its start that `causal` and `lagged` need (never: a missing or foreign one is an error; missing:
    then; always); max_requests: requests decoded together; token_budget: tokens a round; threads: of the engines
    (0 = they choose); response_ms: least milliseconds between two responses of a request while there is no more than one
    request a core, in proportion more with more (0 = one a round; the first and the last tokens never wait).
    """

    schedule: str = "lagged"
    threshold: float = 0.5
    accept: str = "rejection"
    profile: str = "missing"
    max_requests: int = 16
    token_budget: int = 512
    threads: int = 0
    response_ms: int = 50

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("accept", ACCEPT_RULES), ("profile", PROFILES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold is {self.threshold}; it must lie in 0..1.")
        if self.max_requests < 1:
            raise ValueError(f"max_requests is {self.max_requests}; it must be 1 or more.")
        if self.token_budget < 1:
            raise ValueError(f"token_budget is {self.token_budget}; it must be 1 or more.")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}; it must be 0 (the engines choose) or more.")
        if not 0 <= self.response_ms <= 10_000:
            raise ValueError(f"response_ms is {self.response_ms}; it must lie in 0..10000 (0 = a response a round).")

    @property
    def needs_table(self) -> bool:
        """The scheduler decides by the SPS table."""
        return self.schedule in LOAD_AWARE

    @classmethod
    def from_parameters(cls, values: dict[str, str]) -> "Settings":
        """From a model's string parameters (missing ones keep their defaults). Raises ValueError naming the bad one."""
        read = {}
        for field in fields(cls):
            if field.name in values:
                try:
                    read[field.name] = type(field.default)(values[field.name])
                except ValueError:
                    value = values[field.name]
                    raise ValueError(f"The model parameter {field.name} is {value!r}; it must be a number.") from None
        return cls(**read)


def build(bundle: Path, out: Path, settings: Settings = Settings(), placement: Placement = Placement()) -> Path:
    """Writes the repository at `out` (written beside, then renamed) and returns it.

    config.pbtxt of dspark has `placement`; beside it lie configs/cpu.pbtxt and configs/gpu.pbtxt for
    `tritonserver --model-config-name`, the GPU one with placement's GPUs, or GPU 0. The bundle is named relative to the
    repository, so that the folder that holds both can be moved or mounted.
    Raises FileNotFoundError when `bundle` has no manifest.json, and FileExistsError when `out` is some other folder.
    """
    bundle, out = Path(bundle).resolve(), Path(out).resolve()
    if not (bundle / "manifest.json").is_file():
        raise FileNotFoundError(f"{bundle} is not a bundle: it has no manifest.json.")
    if out.exists() and any(out.iterdir()) and not (out / ENSEMBLE / "config.pbtxt").is_file():
        raise FileExistsError(f"{out} exists and is not a model repository; name another folder.")
    values = {name: str(value) for name, value in asdict(settings).items()}
    values["bundle"] = os.path.relpath(bundle, out)
    beside = out.with_name(f"{out.name}.{os.getpid()}.new")
    shutil.rmtree(beside, ignore_errors=True)
    for model in CHAIN:
        (beside / model.name / "1").mkdir(parents=True)
        if model is not ENGINE:
            (beside / model.name / "config.pbtxt").write_text(render(model_config(model, values)))
        shutil.copyfile(MODELS / f"{model.name}.py", beside / model.name / "1" / "model.py")
    variants = {CPU: Placement(), GPU: Placement((0,))} | {placement.name: placement}
    (beside / DSPARK / "configs").mkdir()
    for name, variant in variants.items():
        config = render(model_config(ENGINE, values, variant))
        (beside / DSPARK / "configs" / f"{name}.pbtxt").write_text(config)
        if name == placement.name:
            (beside / DSPARK / "config.pbtxt").write_text(config)
    (beside / ENSEMBLE / "1").mkdir(parents=True)
    (beside / ENSEMBLE / "1" / ".keep").touch()  # Triton wants the version folder, git and archives drop an empty one
    (beside / ENSEMBLE / "config.pbtxt").write_text(render(ensemble_config()))
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)
    return out


def bundle_folder(model_repository: str, value: str) -> Path:
    """The bundle that a model's `bundle` parameter names; `model_repository` is the model's own folder (args[...])."""
    return (Path(model_repository).parent / value).resolve()


def model_config(model: Model, values: dict[str, str], placement: Placement = Placement()) -> pb.ModelConfig:
    """One python-backend model; placement is for dspark alone (a second `postprocessing` would mix the texts of a
    stream)."""
    config = pb.ModelConfig(name=model.name, backend="python", max_batch_size=0)
    config.input.extend(_input(t) for t in (*model.inputs, *model.control))
    config.output.extend(_output(t) for t in (*model.outputs, *model.answers))
    config.instance_group.extend(placement.groups())
    if model.decoupled:
        config.model_transaction_policy.decoupled = True
    for name in model.parameters:
        config.parameters[name].string_value = values[name]
    return config


def ensemble_config() -> pb.ModelConfig:
    """The chain preprocessing -> dspark -> postprocessing under its public tensor names."""
    config = pb.ModelConfig(name=ENSEMBLE, platform="ensemble", max_batch_size=0)
    config.input.extend(_input(t) for t in USER_INPUTS)
    config.output.extend(_output(t) for t in POSTPROCESSING.outputs)
    for step in wire():
        entry = config.ensemble_scheduling.step.add(model_name=step.model, model_version=-1)
        entry.input_map.update(step.inputs)
        entry.output_map.update(step.outputs)
    return config


def render(config: pb.ModelConfig) -> str:
    """Protobuf text. Raises ValueError when a value is left empty or as a ${placeholder}."""
    text = text_format.MessageToString(config)
    if "${" in text:
        raise ValueError(f"The config of {config.name} holds an unfilled ${{placeholder}}.")
    for name, parameter in config.parameters.items():
        if not parameter.string_value:
            raise ValueError(f"The parameter {name} of {config.name} is empty.")
    return text


def _input(t: Tensor) -> pb.ModelInput:
    return pb.ModelInput(name=t.name, data_type=getattr(pb, f"TYPE_{t.dtype}"), dims=t.dims, optional=t.optional)


def _output(t: Tensor) -> pb.ModelOutput:
    return pb.ModelOutput(name=t.name, data_type=getattr(pb, f"TYPE_{t.dtype}"), dims=t.dims)

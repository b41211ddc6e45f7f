"""The generated repository, and the description that it is generated from."""

from __future__ import annotations

import ast
import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from client.client import PARAMETERS
from decoding.request import SamplingParams
from triton_repo.description import CHAIN, ENGINE, POSTPROCESSING, PREPROCESSING, SAMPLING, USER_INPUTS, Tensor, wire
from triton_repo.placement import Placement, device_of
from triton_repo.repository import Settings, build, bundle_folder, model_config, render


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    return tmp_path


def config(repository: Path, model: str) -> pb.ModelConfig:
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), pb.ModelConfig())


def test_models_and_their_parameters(folder):
    settings = Settings("threshold", 0.25, "coupled", "never", max_requests=3, token_budget=64, threads=2)
    repository = build(folder / "bundle", folder / "repo", settings)
    assert sorted(p.name for p in repository.iterdir()) == ["dspark", "ensemble", "postprocessing", "preprocessing"]
    values = {name: p.string_value for name, p in config(repository, "dspark").parameters.items()}
    assert Settings.from_parameters(values) == settings
    assert bundle_folder(str(repository / "dspark"), values["bundle"]) == folder / "bundle"
    decoupled = {m.name: config(repository, m.name).model_transaction_policy.decoupled for m in CHAIN}
    assert decoupled == {"preprocessing": False, "dspark": True, "postprocessing": True}


def test_one_instance_and_no_batching(folder):
    repository = build(folder / "bundle", folder / "repo")
    for model in ("preprocessing", "dspark", "postprocessing"):
        c = config(repository, model)
        assert [(g.count, g.kind) for g in c.instance_group] == [(1, pb.ModelInstanceGroup.KIND_CPU)]
        assert c.max_batch_size == 0 and not c.HasField("dynamic_batching")


def test_the_folder_can_be_moved(folder):
    build(folder / "bundle", folder / "here" / "repo")
    shutil.move(folder, folder.with_name("moved"))
    repository = folder.with_name("moved") / "here" / "repo"
    value = config(repository, "dspark").parameters["bundle"].string_value
    assert (bundle_folder(str(repository / "dspark"), value) / "manifest.json").is_file()


def test_building_again_replaces_it_whole(folder):
    repository = build(folder / "bundle", folder / "repo")
    (repository / "left over").touch()
    assert build(folder / "bundle", folder / "repo", Settings(schedule="none")) == repository
    assert not (repository / "left over").exists()
    assert [p.name for p in folder.iterdir() if p.name.startswith("repo")] == ["repo"]


def test_models_are_plain_python_3_10():
    for file in (Path(__file__).parents[2] / "triton_repo" / "models").glob("*.py"):
        ast.parse(file.read_text(), feature_version=(3, 10))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"schedule": "best"}, "schedule is 'best'; it must be one of none, fixed, threshold, causal, lagged."),
        ({"accept": "all"}, "accept is 'all'; it must be one of rejection, coupled."),
        ({"profile": "often"}, "profile is 'often'; it must be one of never, missing, always."),
        ({"threshold": 1.5}, "threshold is 1.5; it must lie in 0..1."),
        ({"max_requests": 0}, "max_requests is 0; it must be 1 or more."),
        ({"token_budget": 0}, "token_budget is 0; it must be 1 or more."),
        ({"response_ms": -1}, "response_ms is -1; it must lie in 0..10000 (0 = a response a round)."),
        ({"threads": -1}, "threads is -1; it must be 0 (the engines choose) or more."),
    ],
)
def test_settings_out_of_range(change, sentence):
    with pytest.raises(ValueError) as error:
        Settings(**change)
    assert str(error.value) == sentence


def test_a_parameter_that_is_no_number():
    with pytest.raises(ValueError, match="The model parameter max_requests is 'many'; it must be a number."):
        Settings.from_parameters({"max_requests": "many"})


def test_what_is_no_bundle_or_no_repository(folder):
    with pytest.raises(FileNotFoundError, match="is not a bundle: it has no manifest.json"):
        build(folder, folder / "repo")
    (folder / "other").mkdir()
    (folder / "other" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="exists and is not a model repository"):
        build(folder / "bundle", folder / "other")
    assert (folder / "other" / "thesis.txt").exists()


def test_nothing_is_left_unfilled():
    values = {name: "1" for name in ENGINE.parameters}
    render(model_config(ENGINE, values))
    with pytest.raises(ValueError, match=r"holds an unfilled \$\{placeholder\}"):
        render(model_config(ENGINE, {**values, "bundle": "${bundle}"}))
    with pytest.raises(ValueError, match="The parameter bundle of dspark is empty"):
        render(model_config(ENGINE, {**values, "bundle": ""}))


def test_a_tensor_that_nobody_makes():
    strange = replace(POSTPROCESSING, inputs=(*POSTPROCESSING.inputs, Tensor("logits", "FP32")))
    with pytest.raises(ValueError, match="postprocessing needs the tensor 'logits', which no earlier step"):
        wire((PREPROCESSING, ENGINE, strange))
    other = replace(ENGINE, inputs=(Tensor("input_ids", "INT64"),))
    with pytest.raises(ValueError, match="dspark reads 'input_ids' as INT64, but it is made as INT32"):
        wire((PREPROCESSING, other, POSTPROCESSING))


def test_every_step_reads_the_newest_tensor_and_no_control():
    steps = {step.model: step for step in wire()}
    assert steps["preprocessing"].inputs["input_ids"] == "input_ids"
    assert steps["dspark"].inputs["input_ids"] == "_preprocessing_input_ids"
    assert not {"stop", "drain", "uid"} & steps["dspark"].inputs.keys()
    assert steps["dspark"].inputs["params"] == "_preprocessing_params"
    assert steps["postprocessing"].inputs == {"round": "_dspark_round"}
    assert steps["postprocessing"].outputs["output_ids"] == "output_ids"


def test_every_field_of_a_request_is_a_tensor_and_the_client_knows_it():
    assert {t.name for t in SAMPLING} == {f.name for f in dataclasses.fields(SamplingParams)}
    named = {t.name: t.dtype.replace("STRING", "BYTES") for t in USER_INPUTS}
    own = ("text_input", "messages", "input_ids", "stream")
    assert {name: kind for name, (kind, _) in PARAMETERS.items()} == {n: k for n, k in named.items() if n not in own}


def test_placements_by_name(folder):
    """configs/NAME.pbtxt for tritonserver --model-config-name: the same model, placed otherwise."""
    repository = build(folder / "bundle", folder / "repo", placement=Placement.of("cuda:0,2"))
    dspark = repository / "dspark"
    read = lambda path: text_format.Parse(path.read_text(), pb.ModelConfig())
    cpu, gpu = (read(dspark / "configs" / f"{name}.pbtxt") for name in ("cpu", "gpu"))
    assert read(dspark / "config.pbtxt") == gpu
    groups = [(g.count, g.kind, list(g.gpus)) for c in (cpu, gpu) for g in c.instance_group]
    assert groups == [(1, pb.ModelInstanceGroup.KIND_CPU, []), (1, pb.ModelInstanceGroup.KIND_GPU, [0, 2])]
    for c in (cpu, gpu):
        del c.instance_group[:]
    assert cpu == gpu
    assert not (repository / "postprocessing" / "configs").exists()
    assert read(build(folder / "bundle", folder / "repo") / "dspark" / "config.pbtxt").instance_group[0].gpus == []


@pytest.mark.parametrize(
    "device, placement",
    [("cpu", Placement()), ("cuda", Placement((0,))), ("cuda:3", Placement((3,))), ("cuda:1,0", Placement((1, 0)))],
)
def test_devices(device, placement):
    assert Placement.of(device) == placement


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:a", "cuda:0,0", "cuda:0,", "CPU"])
def test_what_is_no_device(device):
    with pytest.raises(ValueError, match=f"^device is '{device}'; it must be cpu, cuda, or cuda: with different GPU numbers"):
        Placement.of(device)


def test_an_instance_learns_its_device():
    assert device_of({"model_instance_kind": "GPU", "model_instance_device_id": "2"}) == "cuda:2"
    assert device_of({"model_instance_kind": "CPU", "model_instance_device_id": "0"}) is None

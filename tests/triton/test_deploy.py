"""The files of triton_repo/deploy: what can be said of them without Docker or a cluster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "triton_repo" / "deploy"
KUBERNETES = "1.32"
PORTS = {8000, 8001, 8002}  # triton_repo serve's own: HTTP, gRPC, metrics


@pytest.fixture(scope="module")
def dockerfile(tmp_path_factory):
    parser = DockerfileParser(str(tmp_path_factory.mktemp("docker")))
    parser.content = (DEPLOY / "Dockerfile").read_text()
    return parser


def steps(dockerfile: DockerfileParser, instruction: str) -> list[str]:
    return [step["value"] for step in dockerfile.structure if step["instruction"] == instruction]


def yaml_of(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def pins() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(line.split("==")[0]) for line in lines if line and line[0] != "#"}


def needed(requirements: list[str]) -> set[str]:
    """Names of all that pip would install for them, by the metadata of what is installed here."""
    found, waiting = set(), [(Requirement(text), ("",)) for text in requirements]
    while waiting:
        requirement, extras = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        key = canonicalize_name(requirement.name), tuple(sorted(requirement.extras))
        if key not in found:
            found.add(key)
            children = metadata.distribution(requirement.name).requires or []
            waiting += [(Requirement(text), key[1] or ("",)) for text in children]
    return {name for name, _ in found}


def test_the_image_needs_no_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = needed(project["dependencies"] + project["optional-dependencies"]["container"])
    assert {"numpy", "onnxruntime", "tokenizers", "grpcio", "protobuf"} <= names
    assert not names & {"torch", "transformers", "accelerate", "onnx", "nvidia-pytriton"}
    assert names <= pins()
    assert "torch" in needed(project["optional-dependencies"]["train"])  # the walk sees it where it is


def test_the_image_installs_the_pinned_extra(dockerfile):
    assert dockerfile.baseimage.startswith("nvcr.io/nvidia/tritonserver:") and dockerfile.baseimage.endswith("-py3")
    runs = " ".join(steps(dockerfile, "RUN"))
    assert '-c constraints.txt ".[container]"' in runs and "torch" not in runs
    argument = next(text for text in steps(dockerfile, "ARG") if text.startswith("ENGINES="))
    engines = argument.split("=", 1)[1].strip('"').split()
    assert engines and set(engines) <= set((ROOT / "constraints.txt").read_text().splitlines())
    user = steps(dockerfile, "USER")[-1].split(":")[0]
    assert user.isdigit() and int(user) > 0  # Kubernetes takes no name for runAsNonRoot


def test_what_the_image_copies_is_enough_to_serve(dockerfile, tmp_path):
    """The copied files alone, with torch and transformers out of reach: they import, and the entry point answers."""
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for text in steps(dockerfile, "COPY"):
        *sources, _ = text.split()
        for source in sources:
            assert f"!{source}" in ignored, f"the build context lacks {source}"
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, tmp_path / source)
    entry = json.loads(steps(dockerfile, "ENTRYPOINT")[-1])
    line = entry[entry.index("python3") + 1 :]
    assert line[:3] == ["-m", "triton_repo", "serve"] and line[3:5] == ["--bundle", "/bundle"]
    code = (
        "import sys, runpy; sys.path = [p for p in sys.path if p != {root!r}]; sys.path.insert(0, {here!r});"
        "sys.modules.update(torch=None, transformers=None, onnx=None);"
        "import triton_repo.engine, decoding.loop, engines.onnxruntime, client;"
        "assert triton_repo.engine.__file__.startswith({here!r}), triton_repo.engine.__file__;"
        "sys.argv = ['triton_repo', *{line!r}]; runpy.run_module('triton_repo', run_name='__main__')"
    ).format(root=str(ROOT), here=str(tmp_path), line=line[2:5] + ["--device", "nonsense"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("triton_repo: device is 'nonsense'; it must be cpu"), done.stderr


def test_commands_are_options_of_serve(dockerfile):
    from typer.main import get_command

    from triton_repo.__main__ import app

    options = {o for p in get_command(app).commands["serve"].params for o in p.opts}
    lines = [json.loads(steps(dockerfile, name)[-1]) for name in ("ENTRYPOINT", "CMD")]
    lines += [service["command"] for service in yaml_of("compose.yaml")[0]["services"].values()]
    pods = kserve_pod(), yaml_of("kubernetes.yaml")[0]["spec"]["template"]["spec"]
    lines += [pod["containers"][0]["args"] for pod in pods]
    given = {word for line in lines for word in line if word.startswith("--")}
    assert {"--bundle", "--device", "--address", "--profile"} == given <= options


def test_compose():
    text = (DEPLOY / "compose.yaml").read_text()
    # What docker compose fills in from the environment; the parser wants the values.
    filled = re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)\}", lambda m: m[2] or "/a/bundle", text)
    merged = yaml.safe_load(filled)
    parsed = PyCompose.from_yaml(yaml.safe_dump({k: v for k, v in merged.items() if not k.startswith("x-")}))
    parsed.validate()
    assert set(parsed.service_names()) == {"gpu", "cpu"}
    for name, service in merged["services"].items():
        assert service["profiles"] == [name] and service["shm_size"] == "1gb"
        assert {int(p.rsplit(":", 1)[1]) for p in service["ports"]} == PORTS
        assert all(p.startswith("127.0.0.1:") for p in service["ports"])
        build = service["build"]
        assert (DEPLOY / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
    assert merged["services"]["cpu"]["build"]["args"]["ENGINES"] in (ROOT / "constraints.txt").read_text().splitlines()


def test_compose_check_can_fail():
    with pytest.raises(Exception):
        PyCompose.from_yaml("services: {a: {image: x, shm_sise: 1gb}}").validate()


def test_kubernetes():
    documents = yaml_of("kubernetes.yaml")
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    deployment, service = documents
    template = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    named = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert set(named.values()) == PORTS
    assert {named[p["targetPort"]] for p in service["spec"]["ports"]} == PORTS


def kserve_pod() -> dict:
    """The predictor's fields that are a pod's: a v1beta1 predictor is a pod's spec with some more keys."""
    (document,) = yaml_of("kserve.yaml")
    assert (document["apiVersion"], document["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert document["spec"].keys() == {"predictor"}
    return {k: v for k, v in document["spec"]["predictor"].items() if k != "minReplicas"}


def test_kserve():
    pod = kserve_pod()
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "dspark"}, "spec": pod}
    kubernetes_validate.validate(whole, KUBERNETES, strict=True)
    (container,) = pod["containers"]
    assert container["name"] == "kserve-container"  # the name that KServe looks for
    deployment = yaml_of("kubernetes.yaml")[0]["spec"]["template"]["spec"]
    same = lambda c: {k: v for k, v in c.items() if k not in ("name", "ports")}
    assert same(container) == same(deployment["containers"][0]) and pod["volumes"] == deployment["volumes"]


def test_kubernetes_check_can_fail():
    broken = yaml_of("kubernetes.yaml")[0]
    broken["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_a_pod_outlives_the_drain():
    from inspect import signature

    from triton_repo.server import EXIT_SECONDS, TritonServer

    seconds = signature(TritonServer).parameters["drain_timeout"].default + EXIT_SECONDS
    assert kserve_pod()["terminationGracePeriodSeconds"] > seconds
    assert int(yaml_of("compose.yaml")[0]["x-server"]["stop_grace_period"].rstrip("s")) > seconds

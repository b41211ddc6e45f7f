"""The life of a real server: a dead stub, an orderly end, and starts that fail in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client import Client, ClientError
from tests.triton.support import settled_metrics, tiny_server, wait_until
from triton_repo import control, runtime
from triton_repo.ledger import ledger_file
from triton_repo.runtime import Ports, ServerError, Wheel, shm_files
from triton_repo.server import TritonServer


def stub(server: TritonServer, model: str) -> int:
    """Process id of a model's stub."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if line[0].endswith(b"triton_python_backend_stub") and str(server.folder / "repo" / model).encode() in line[1]:
                return int(entry.name)
    raise AssertionError(f"no stub of {model}")


def test_dead_stub_then_orderly_end(bundle, tmp_path, alone):
    """One server's life: its engine's process dies, the probe finds it, a new server serves; then it is stopped in mid-stream."""
    with tiny_server(bundle, tmp_path) as server:
        client = Client(server.grpc_url, timeout=120)
        assert server.check(timeout=60)
        stream = client.stream("hangs", max_tokens=4000, ignore_eos=True, speculative=False)
        next(stream)
        os.kill(stub(server, "dspark"), signal.SIGKILL)
        assert not server.check(timeout=10)
        with pytest.raises(ClientError):  # it does not hang: its connection is gone
            list(stream)
        assert "The probe failed, tritonserver is started again" in " ".join(server.said)
        assert list(client.generate("again", max_tokens=9).output_ids) == alone.decode("again", max_tokens=9)

        long = {"max_tokens": 1500, "ignore_eos": True, "speculative": False}
        stream = client.stream("to the end", **long)
        ids = list(next(stream).output_ids)
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(server.stop)
            refused = wait_until(lambda: refusal(client), "the refusal of new requests")
            ids += [t for chunk in stream for t in chunk.output_ids]
            stopping.result(60)
        assert "draining" in refused
        assert len(ids) == 1500
        assert ids == alone.decode("to the end", schedule="none", **{**long, "speculative": True})
    assert not server.alive
    assert shm_files(server._shm_prefix) == [] and not ledger_file(server.process.pid).exists()
    with pytest.raises(ClientError, match="cannot be reached"):
        client.generate("x")


def refusal(client: Client) -> str:
    try:
        client.generate("late", max_tokens=1)
    except ClientError as error:
        return str(error)
    return ""


def test_kill_leaves_nothing_either(bundle, tmp_path):
    server = tiny_server(bundle, tmp_path, schedule="threshold").start()
    shm, pid = server._shm_prefix, server.process.pid
    assert shm_files(shm) and ledger_file(pid).exists()
    server.kill()
    assert shm_files(shm) == [] and not ledger_file(pid).exists()
    server.stop()  # of a dead server: nothing to do, no error


def test_a_bundle_that_does_not_fit_is_named(bundle, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    with (broken / "onnx" / "verify" / "model.onnx").open("ab") as graph:
        graph.write(b"\0")
    with pytest.raises(ServerError, match="did not start: .*verify.* is not the file the manifest describes"):
        tiny_server(broken, tmp_path / "build").start()


def linked(bundle: Path, folder: Path, **manifest) -> Path:
    """The bundle again with other keys in its manifest; None removes one."""
    shutil.copytree(bundle, folder, copy_function=os.link)
    raw = {**json.loads((bundle / "manifest.json").read_text()), **manifest}
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return folder


def test_lagged_measures_a_missing_table_and_serves(bundle, tmp_path, alone):
    """The default: says so in one line, keeps the table, and a coupled seed gives the target's own text however it schedules."""
    own = linked(bundle, tmp_path / "own", sps=None)
    sampling = {"max_tokens": 40, "temperature": 1.0, "seed": 9, "accept": "coupled", "ignore_eos": True}
    want = [alone.decode(f"lagged {i}", schedule="none", **sampling) for i in range(6)]
    with tiny_server(own, tmp_path / "build", schedule="lagged", accept="coupled") as server:
        (said,) = [sentence for sentence in server.said if "measuring step times" in sentence]
        assert said.startswith("own: measuring step times, about 30 s, because ") and "\n" not in said
        client = Client(server.grpc_url, timeout=120)
        ask = lambda i: list(client.generate(f"lagged {i}", **{**sampling, "accept": None}).output_ids)
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, range(6))) == want
        metrics = settled_metrics(server)
        rounds = metrics["dspark_request_rounds_total"]
        assert rounds > 0 and metrics["dspark_scheduled_tokens_count"] > 0
        assert metrics["dspark_scheduled_tokens_sum"] <= rounds * 4
    table = json.loads((own / "manifest.json").read_text())["sps"]
    assert table["threads"] == 1 and table["target"]
    with tiny_server(own, tmp_path / "build", schedule="causal", profile="never") as server:  # and it is used again
        assert not [sentence for sentence in server.said if "measuring" in sentence]


@pytest.mark.parametrize(
    "manifest, settings, sentence",
    [
        ({"sps": None}, {"schedule": "lagged"}, "did not start: /.* has no SPS table, .*run make profile"),
        ({"sps": {"hardware": {"cpu": "Z80", "cores": 1}}}, {"schedule": "causal"}, "taken on .*Z80.*run make profile"),
        ({"confidence_temperatures": [1.0]}, {}, r"confidence_temperatures is \[1.0\]"),
        ({"calibration": {"sampled": [1.0], "greedy": [1.0]}}, {}, "calibration"),
    ],
    ids=["no table", "foreign table", "temperatures", "calibration"],
)
def test_what_does_not_fit_is_refused_at_the_start(bundle, tmp_path, manifest, settings, sentence):
    own = linked(bundle, tmp_path / "own", **manifest)
    with pytest.raises(ServerError, match=sentence) as error:
        tiny_server(own, tmp_path / "build", profile="never", **settings).start()
    assert "Traceback" not in str(error.value) and "\n" not in str(error.value) and "Error:" not in str(error.value)


def test_no_bundle(tmp_path):
    with pytest.raises(ServerError, match="holds no manifest.json"):
        tiny_server(tmp_path, tmp_path / "build").start()


def test_port_taken(bundle, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = TritonServer(bundle, ports=Ports(0, port, 0), build_dir=tmp_path)
        with pytest.raises(ServerError, match=f"^The gRPC port 127.0.0.1:{port} cannot be used: Address already in use"):
            server.start()
    assert not (tmp_path / "triton").exists()


def test_command_line(bundle, tmp_path):
    """serve says where it listens, serves, and ends on SIGTERM; errors are one sentence and exit code 1."""
    line = [sys.executable, "-m", "triton_repo"]
    failed = subprocess.run([*line, "serve", "--bundle", str(tmp_path)], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("triton_repo: ") and failed.stderr.count("\n") == 1
    failed = subprocess.run([*line, "serve", "--bundle", str(bundle), "--schedule", "x"], capture_output=True, text=True)
    assert failed.stderr == "triton_repo: schedule is 'x'; it must be one of none, fixed, threshold, causal, lagged.\n"
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--threads", "1", "--schedule", "fixed"]
    process = subprocess.Popen(
        [*line, "serve", "--bundle", str(bundle), *ports], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path
    )
    try:
        url = process.stdout.readline().split()[1]
        done = subprocess.run(
            [sys.executable, "-m", "client", "--url", url, "--max-tokens", "5", "hello", "--stream"], capture_output=True, text=True
        )
        assert done.returncode == 0 and " out" in done.stderr
    finally:
        process.terminate()
        rest = process.stdout.read()
        assert process.wait(60) == 0
    assert "Stopping" in rest


def test_a_killed_launcher_takes_its_server_along(bundle, tmp_path):
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--threads", "1", "--schedule", "fixed"]
    line = [sys.executable, "-m", "triton_repo", "serve", "--bundle", str(bundle), *ports]
    launcher = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path)
    url = launcher.stdout.readline().split()[1]
    assert control.counts(url, timeout=60) == (0, 0)
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    wait_until(lambda: not listens(url), "the server's end")


def listens(url: str) -> bool:
    host, port = url.split(":")
    with socket.socket() as s:
        return s.connect_ex((host, int(port))) == 0


def test_wheel_is_missing(monkeypatch):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match="needs the wheel nvidia-pytriton"):
        Wheel.find()


def test_no_stub_for_this_python(monkeypatch):
    monkeypatch.setattr(runtime.sys, "version_info", type("V", (), {"major": 3, "minor": 7}))
    with pytest.raises(ServerError, match=r"^This is Python 3.7; the wheel nvidia-pytriton has stubs for Python 3.8, .*3.13\.$"):
        Wheel.find()


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_out_of_range(port):
    with pytest.raises(ServerError, match=rf"The HTTP port is {port}; it must lie in 0..65535"):
        Ports(port, 0, 0).resolve("127.0.0.1")


def test_free_ports_differ():
    ports = Ports(0, 0, 0).resolve("127.0.0.1")
    assert len({ports.http, ports.grpc, ports.metrics}) == 3 and min(ports.http, ports.grpc, ports.metrics) > 0


def test_the_backend_is_assembled_once(tmp_path):
    wheel = Wheel.find()
    folder = runtime.assemble_backend(wheel, tmp_path)
    stub = folder / "python" / "triton_python_backend_stub"
    assert os.access(stub, os.X_OK)
    before = stub.stat().st_mtime_ns, stub.stat().st_ino
    assert runtime.assemble_backend(wheel, tmp_path) == folder
    assert (stub.stat().st_mtime_ns, stub.stat().st_ino) == before
    stub.write_bytes(b"half a copy")
    runtime.assemble_backend(wheel, tmp_path)
    assert stub.stat().st_size == wheel.stub.stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backends"]

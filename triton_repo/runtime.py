"""The tritonserver on this machine, of the nvidia-pytriton wheel or of NVIDIA's container: its files, and the command
and environment it needs.

Knows: files, ports, environment variables. Refuses to know: models, requests, how long a server lives (server.py).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import sysconfig
import threading
from dataclasses import dataclass
from pathlib import Path


class ServerError(RuntimeError):
    """The server cannot be started, does not answer, or died: one sentence."""


@dataclass(frozen=True)
class Wheel:
    """The parts of nvidia-pytriton that we run: its binary, its python backend, the stub of this Python version."""

    binary: Path
    backend: Path
    stub: Path
    libraries: Path
    libpython: Path

    @classmethod
    def find(cls) -> "Wheel":
        """Raises ServerError when the wheel, the stub or libpython of this Python is missing."""
        spec = importlib.util.find_spec("pytriton")  # found, never imported: that starts threads and costs seconds
        if spec is None or spec.origin is None:
            raise ServerError("The embedded server needs the wheel nvidia-pytriton: pip install nvidia-pytriton.")
        site = Path(spec.origin).parents[1]
        root, version = site / "pytriton" / "tritonserver", f"{sys.version_info.major}.{sys.version_info.minor}"
        stubs = root / "python_backend_stubs"
        have = sorted((p.name for p in stubs.glob("3.*")), key=lambda v: int(v.split(".")[1]))
        if version not in have:
            known = ", ".join(have) or "(none)"
            raise ServerError(f"This is Python {version}; the wheel nvidia-pytriton has stubs for Python {known}.")
        libdir = Path(sysconfig.get_config_var("LIBDIR") or "")
        multiarch = sysconfig.get_config_var("MULTIARCH")
        name = f"libpython{version}.so.1.0"
        places = [libdir, *([libdir / multiarch] if multiarch else [])]
        libpython = next((p / name for p in places if (p / name).is_file()), None)
        if libpython is None:
            raise ServerError(f"{name} is not in {libdir}; the python backend needs a Python with a shared library.")
        return cls(
            root / "bin" / "tritonserver",
            root / "backends" / "python",
            stubs / version / "triton_python_backend_stub",
            site / "nvidia_pytriton.libs",
            libpython,
        )


    def backends(self, folder: Path) -> Path:
        """The backend directory, assembled in `folder`."""
        return assemble_backend(self, folder)

    def environment(self) -> dict[str, str]:
        return environment(self)


@dataclass(frozen=True)
class Container:
    """tritonserver as NVIDIA's images have it: binary and backends in one place, for the image's own Python."""

    root: Path

    @property
    def binary(self) -> Path:
        return self.root / "bin" / "tritonserver"

    def backends(self, folder: Path) -> Path:
        """Nothing is assembled."""
        return self.root / "backends"

    def environment(self) -> dict[str, str]:
        return {"TOKENIZERS_PARALLELISM": "false", **os.environ}


CONTAINER = Path("/opt/tritonserver")


def find_server() -> "Wheel | Container":
    """The container's where there is one, else the wheel's. Raises ServerError."""
    container = Container(CONTAINER)
    return container if container.binary.is_file() else Wheel.find()


def assemble_backend(wheel: Wheel, folder: Path) -> Path:
    """Puts the python backend and its stub side by side (in the wheel they are not); returns the backend directory.

    Written beside and renamed, so that two servers may start at once; reused while the wheel is the same.
    """
    files = (
        wheel.backend / "libtriton_python.so",
        wheel.backend / "triton_python_backend_utils.py",
        wheel.stub,
    )
    target = folder / "backends" / "python"
    if all((target / f.name).is_file() and _same(f, target / f.name) for f in files):
        return target.parent
    beside = folder / f"backends.{os.getpid()}.new"
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "python").mkdir(parents=True)
    for f in files:
        shutil.copy2(f, beside / "python" / f.name)
    (beside / "python" / wheel.stub.name).chmod(0o755)
    old = folder / f"backends.{os.getpid()}.old"
    if target.parent.exists():
        target.parent.rename(old)
    try:
        beside.rename(target.parent)
    except OSError:  # another process was first
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return target.parent


def environment(wheel: Wheel) -> dict[str, str]:
    """The server's environment. PATH decides whose site-packages the stub uses (PYTHONPATH does not); without
    libpython's folder the stub takes the system's Python, without the wheel's libraries it does not start at all."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), env.get("PATH", os.defpath)])
    env["LD_LIBRARY_PATH"] = os.pathsep.join([str(wheel.libpython.parent), str(wheel.libraries)])
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    return env


@dataclass(frozen=True)
class Ports:
    http: int
    grpc: int
    metrics: int

    def resolve(self, address: str) -> "Ports":
        """0 becomes a free port. Raises ServerError when a named port is taken or out of range."""
        held, found = [], []
        try:
            for name, port in (("HTTP", self.http), ("gRPC", self.grpc), ("metrics", self.metrics)):
                if not 0 <= port <= 65535:
                    raise ServerError(f"The {name} port is {port}; it must lie in 0..65535 (0 picks a free one).")
                s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                held.append(s)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    s.bind((address, port))
                    s.listen(1)
                except OSError as error:
                    raise ServerError(f"The {name} port {address}:{port} cannot be used: {error.strerror}.") from None
                found.append(s.getsockname()[1])
        finally:
            for s in held:
                s.close()
        return Ports(*found)


def command(
    binary: Path, backends: Path, repository: Path, address: str, ports: Ports, shm_prefix: str, config_name: str
) -> list[str]:
    """Model control stays off: with it any client could load code of its own into the server. config_name: a model
    takes configs/<name>.pbtxt where it has that, else config.pbtxt."""
    return [
        str(binary),
        f"--model-repository={repository}",
        f"--model-config-name={config_name}",
        f"--backend-directory={backends}",
        f"--http-address={address}",
        f"--grpc-address={address}",
        f"--metrics-address={address}",
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        "--exit-timeout-secs=10",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
    ]


# Runs a command that gets SIGTERM when the thread that started it dies (prctl PR_SET_PDEATHSIG): a launcher that is
# killed leaves no server behind. argv: the launcher's process id, the command.
LEASH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def leashed(line: list[str]) -> list[str]:
    """The command `line`, ended with this process. Only for the main thread: another one may end before the process."""
    if threading.current_thread() is not threading.main_thread():
        return line
    return [sys.executable, "-I", "-S", "-c", LEASH, str(os.getpid()), *line]


def shm_files(prefix: str) -> list[Path]:
    """Shared-memory files of a server that were left behind."""
    return sorted(Path("/dev/shm").glob(f"{prefix}*")) if Path("/dev/shm").is_dir() else []


def _same(a: Path, b: Path) -> bool:
    x, y = a.stat(), b.stat()
    return x.st_size == y.st_size and int(x.st_mtime) == int(y.st_mtime)

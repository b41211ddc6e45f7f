"""The life of one embedded tritonserver: start, wait until ready, probe, start again, drain, stop, tidy up.

Knows: the process, its ports, its log, its shared memory. Refuses to know: what the models do.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from engines import Bundle, BundleError

from . import control
from .ledger import ledger_file
from .placement import Placement
from .repository import Settings, build
from .runtime import Ports, ServerError, command, find_server, leashed, shm_files

EXIT_SECONDS = 15.0  # tritonserver's own bound (--exit-timeout-secs) is 10; it may miss it and exit with 1
SERVED = 'nv_inference_request_success{model="postprocessing",version="1"}'
SAYING = "dspark: "  # begins what the model dspark says in the log while it is loaded
GRACE_SECONDS = 0.25  # from dspark's last response to its leaving the ensemble


class TritonServer:
    """`with TritonServer(bundle) as server:` serves `bundle` on loopback; `server.grpc_url` is host:port.

    ports: 0 picks a free one. say(sentence) hears what takes time. The log and the generated repository lie in
    build_dir/triton/<bundle>-<gRPC port>/. Raises ServerError, one sentence, when it cannot be started.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        settings: Settings = Settings(),
        placement: Placement = Placement(),
        ports: Ports = Ports(8000, 8001, 8002),
        address: str = "127.0.0.1",
        build_dir: str | Path = "build",
        start_timeout: float = 300.0,
        drain_timeout: float = 30.0,
        say: Callable[[str], None] = lambda sentence: print(sentence, file=sys.stderr, flush=True),
    ):
        self.bundle, self.settings, self.placement, self.address = Path(bundle), settings, placement, address
        self.build_dir, self.start_timeout, self.drain_timeout = Path(build_dir).resolve(), start_timeout, drain_timeout
        self._wanted, self._say = ports, say
        self.ports = ports
        self.process: subprocess.Popen | None = None
        self._shm_prefix = f"dspark_{os.getpid()}_{secrets.token_hex(3)}_"
        self._closing = threading.Event()

    @property
    def grpc_url(self) -> str:
        return f"{self.address}:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        return f"{self.address}:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        return f"{self.address}:{self.ports.metrics}"

    @property
    def folder(self) -> Path:
        return self.build_dir / "triton" / f"{self.bundle.resolve().name}-{self.ports.grpc}"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def __enter__(self) -> "TritonServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> "TritonServer":
        """Starts the server and waits until a probe has gone through all its models."""
        try:
            Bundle.load(self.bundle, check_hashes=False)  # the hashes are checked by the model that opens the engines
        except BundleError as error:
            raise ServerError(str(error)) from None
        installation = find_server()
        _check_installed()
        self._closing.clear()
        self.ports = self._wanted.resolve(self.address)
        backends = installation.backends(self.build_dir / "runtime")
        repository = build(self.bundle, self.folder / "repo", self.settings, self.placement)
        where = (installation.binary, backends, repository, self.address, self.ports, self._shm_prefix)
        self._line = command(*where, self.placement.name)
        self._environment = installation.environment()
        self._spawn()
        return self

    def _spawn(self) -> None:
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches the launcher, which drains first.
            self.process = subprocess.Popen(
                leashed(self._line),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._await_ready()
        except BaseException:
            self.kill()
            raise

    def _await_ready(self) -> None:
        started = heard = time.monotonic()
        told = self.log.read_text(errors="replace").count(SAYING)  # by the servers before it
        while not self._ready():
            now = time.monotonic()
            if self.process.poll() is not None:
                raise ServerError(f"tritonserver did not start: {_reason(self.log)} (log: {self.log})")
            if now - started > self.start_timeout:
                raise ServerError(f"tritonserver was not ready after {self.start_timeout:g} s (log: {self.log}).")
            if now - heard >= 2:
                heard = now
                self._say(f"tritonserver loads {self.bundle.name} ({now - started:.0f} s; log: {self.log})")
            for saying in self._sayings()[told:]:
                told, heard = told + 1, now
                self._say(f"{self.bundle.name}: {saying}")
            time.sleep(0.05)
        control.probe(self.grpc_url, timeout=self.start_timeout)

    def _sayings(self) -> list[str]:
        """What dspark has said in the log while it was loaded."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.split(SAYING, 1)[1].rstrip('"') for line in lines if SAYING in line]

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http_url}/v2/health/ready", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def watch(self, every: float = 10.0, timeout: float = 30.0) -> None:
        """check() every so many seconds until close() is called."""
        while not self._closing.wait(every):
            self.check(timeout)

    def check(self, timeout: float = 30.0) -> bool:
        """Probes once; False when the server had to be started again. Raises ServerError when that failed.

        A probe that only waits (all slots are taken) while other streams get their text is no bad sign. A new server
        and not new models: the streams of a dead stub hang without an error until their connection breaks.
        """
        served = self._served()
        try:
            if not self.alive:
                raise ServerError(f"tritonserver exited with code {self.process.returncode} (log: {self.log}).")
            control.probe(self.grpc_url, timeout)
            return True
        except control.Silence as error:
            if served is not None and (self._served() or 0) > served:
                return True
            reason = error
        except ServerError as error:
            reason = error
        self._say(f"The probe failed, tritonserver is started again: {reason}")
        self.kill()
        self._spawn()
        self._say("tritonserver serves again.")
        return False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _served(self) -> float | None:
        """Rounds that went through the last model; None when the metrics page cannot be read."""
        try:
            return control.metrics(self.metrics_url).get(SERVED)
        except OSError:
            return None

    def close(self) -> None:
        """Ends watch() (from a signal handler or another thread)."""
        self._closing.set()

    def stop(self) -> None:
        """Drains, then stops: no new requests, every stream ends or `drain_timeout` passes, SIGTERM, SIGKILL.

        Without draining first, ensemble streams in flight would stall without an error and the server would hang.
        """
        self.close()
        if self.alive:
            self._drain()
        self._terminate()

    def _drain(self) -> None:
        """Waits until every request has got its last response; a server that does not answer is not waited for."""
        started = heard = time.monotonic()
        try:
            while left := control.drain(self.grpc_url):
                now = time.monotonic()
                if now - started > self.drain_timeout:
                    self._say(f"{left} requests were still running after {self.drain_timeout:g} s and are cut off.")
                    return
                if now - heard >= 2:
                    heard = now
                    self._say(f"draining: {left} requests are still running ({now - started:.0f} s)")
                time.sleep(0.1)
            time.sleep(GRACE_SECONDS)
        except ServerError:
            pass

    def _terminate(self) -> None:
        if self.alive:
            self.process.terminate()
            try:
                self.process.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the server and its stubs, then removes the shared memory they leave."""
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        for file in (*shm_files(self._shm_prefix), ledger_file(self.process.pid)):
            file.unlink(missing_ok=True)


def _check_installed() -> None:
    """The stubs see the environment's site-packages only, not the launcher's folder or PYTHONPATH."""
    line = [sys.executable, "-I", "-c", "import decoding, engines, triton_repo"]
    done = subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        what = done.stderr.strip().rsplit("\n", 1)[-1]
        raise ServerError(f"The project is not installed in {sys.prefix} ({what}): pip install -e .")


def _reason(log: Path) -> str:
    """Why the server did not start: the sentence of the model that failed, or the last line of the log."""
    text = log.read_text(errors="replace")
    # The log escapes line breaks.
    found = re.search(r"failed to load '\w+' version \d+: [\w ]+: (?:TritonModelException: )?(.+?)(?:\\n|$)", text, re.M)
    lines = [found[1]] if found else [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip().strip('";') if lines else "it left no log"

"""`python -m triton_repo build | serve`: the model repository, and the embedded server."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from decoding.schedule import SCHEDULES

from .placement import Placement
from .repository import Settings, build
from .runtime import Ports, ServerError
from .server import TritonServer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Bundle = Annotated[Path, typer.Option(help="Folder that `python -m export` wrote.")]
Schedule = Annotated[str, typer.Option(help=f"How many draft tokens are verified: {', '.join(SCHEDULES)}.")]
Threshold = Annotated[float, typer.Option(help="For threshold: confidence under which nothing more is verified.")]
Accept = Annotated[str, typer.Option(help="Accept rule of requests that name none: rejection or coupled.")]
Profile = Annotated[str, typer.Option(help="Measure step times at the start: never, missing (none that fit), always.")]
MaxRequests = Annotated[int, typer.Option(help="Requests decoded together.")]
TokenBudget = Annotated[int, typer.Option(help="Tokens fed to the target in one round.")]
Threads = Annotated[int, typer.Option(help="Threads of the engines; 0 lets them choose.")]
Device = Annotated[str, typer.Option(help="cpu, cuda (GPU 0), or cuda:0,1,.. for an instance of the model on each.")]
ResponseMs = Annotated[int, typer.Option(help="Least ms between two responses of a request on a core; 0: one a round.")]


@app.command("build")
def build_command(
    bundle: Bundle,
    out: Annotated[Path, typer.Option(help="Folder of the model repository.")],
    schedule: Schedule = Settings.schedule,
    threshold: Threshold = 0.5,
    accept: Accept = "rejection",
    profile: Profile = "missing",
    max_requests: MaxRequests = 16,
    token_budget: TokenBudget = 512,
    threads: Threads = 0,
    response_ms: ResponseMs = 50,
    device: Device = "cpu",
) -> None:
    """Write a model repository for any tritonserver with the python backend."""
    with _sentences():
        values = (schedule, threshold, accept, profile, max_requests, token_budget, threads, response_ms)
        print(build(bundle, out, Settings(*values), Placement.of(device)))


@app.command()
def serve(
    bundle: Bundle,
    schedule: Schedule = Settings.schedule,
    threshold: Threshold = 0.5,
    accept: Accept = "rejection",
    profile: Profile = "missing",
    max_requests: MaxRequests = 16,
    token_budget: TokenBudget = 512,
    threads: Threads = 0,
    response_ms: ResponseMs = 50,
    device: Device = "cpu",
    http_port: Annotated[int, typer.Option(help="0 picks a free port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0 picks a free port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="0 picks a free port.")] = 8002,
    address: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    probe_every: Annotated[float, typer.Option(help="Seconds between two probes.")] = 10.0,
    probe_timeout: Annotated[float, typer.Option(help="Seconds a probe may take.")] = 30.0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests may take at the end.")] = 30.0,
) -> None:
    """Serve a bundle on an embedded tritonserver until Ctrl-C; a dead model is found and the server started again."""
    with _sentences():
        settings = Settings(schedule, threshold, accept, profile, max_requests, token_budget, threads, response_ms)
        ports = Ports(http_port, grpc_port, metrics_port)
        where = dict(placement=Placement.of(device), ports=ports, address=address)
        server = TritonServer(bundle, settings=settings, **where, drain_timeout=drain_timeout)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        try:
            with server:
                for number in (signal.SIGINT, signal.SIGTERM):  # from now on: end watch(), then drain
                    signal.signal(number, lambda *_: server.close())
                print(f"gRPC {server.grpc_url}   HTTP {server.http_url}   metrics {server.metrics_url}/metrics")
                print(f"log {server.log}")
                print(f'Try: python -m client "Hello" --stream --url {server.grpc_url}      Ctrl-C stops.', flush=True)
                server.watch(every=probe_every, timeout=probe_timeout)
                print("Stopping: running requests finish first.", flush=True)
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class _sentences:
    """Turns the errors a user can cause into one sentence on stderr and exit code 1."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (ServerError, ValueError, FileNotFoundError, FileExistsError)):
            print(f"triton_repo: {error}", file=sys.stderr)
            raise SystemExit(1) from None


if __name__ == "__main__":
    app()

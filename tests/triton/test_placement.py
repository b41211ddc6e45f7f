"""Configurations by name and several instances of the engine model, on a real server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from client import Client, ClientError
from tests.triton.support import in_flight, settled_metrics, tiny_server, wait_until
from triton_repo import control
from triton_repo.placement import Placement
from triton_repo.runtime import ServerError


def test_a_gpu_that_is_not_there_is_one_sentence(bundle, tmp_path):
    """--model-config-name=gpu takes dspark's configs/gpu.pbtxt: the server itself refuses it where there is no GPU."""
    server = tiny_server(bundle, tmp_path, placement=Placement((0, 1)))
    with pytest.raises(ServerError, match="did not start: instance group dspark_0 of model dspark .* gpu id 0") as error:
        server.start()
    assert "\n" not in str(error.value)


def test_two_instances(bundle, tmp_path, alone):
    """Both decode, each in a process of its own; cancelling, counting and draining reach whichever has the request."""
    with tiny_server(bundle, tmp_path, placement=Placement(instances=2)) as server:
        client = Client(server.grpc_url, timeout=120)
        ask = lambda i: list(client.generate(f"two {i}", max_tokens=30, ignore_eos=True).output_ids)
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(ask, range(8)))
        assert got == [alone.decode(f"two {i}", max_tokens=30, ignore_eos=True) for i in range(8)]
        long = {"max_tokens": 4000, "ignore_eos": True, "speculative": False}
        streams = [client.stream(f"long {i}", **long) for i in range(4)]
        for stream in streams:
            next(stream)
        assert in_flight(server) == 4
        for stream in streams:
            stream.close()
        wait_until(lambda: in_flight(server) == 0, "the cancellation of all four")
        metrics = settled_metrics(server)
        assert metrics['dspark_requests_total{finish_reason="cancelled"}'] == 4
        control.drain(server.grpc_url)
        for i in range(4):  # whichever instance is asked
            with pytest.raises(ClientError, match="draining"):
                client.generate(f"late {i}", max_tokens=1)

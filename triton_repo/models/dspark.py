"""Triton model `dspark` (decoupled): responses with the tokens of one decoding round or more (triton_repo/service.py).

Besides requests it takes control calls, told by their input: `stop` + `uid` cancels a request, `drain` refuses new
ones; both answer with the number of requests that are active and waiting.
"""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils
from decoding.request import RequestError
from triton_repo.engine import open_service
from triton_repo.placement import device_of
from triton_repo.repository import Settings, bundle_folder
from triton_repo.tensors import engine_request, pack_round, read, sentence, write


class Sink:
    """Sends the rounds of one request."""

    def __init__(self, sender):
        self.sender = sender

    def send(self, response, *, final):
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        tensor = pb_utils.Tensor("round", pack_round(response))
        self.sender.send(pb_utils.InferenceResponse(output_tensors=[tensor]), flags=flags)

    def fail(self, message):
        error = pb_utils.TritonError(sentence(message), pb_utils.TritonError.INVALID_ARG)
        self.sender.send(pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        values = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        self.names = [t["name"] for t in config["input"]]
        bundle = bundle_folder(args["model_repository"], values["bundle"])
        settings = Settings.from_parameters(values)
        say = lambda text: pb_utils.Logger.log_info(f"dspark: {text}")
        try:
            self.service = open_service(bundle, settings, pb_utils, os.getppid(), say, device_of(args))
        except ValueError as error:  # BundleError, ScheduleError: one sentence, no stack trace
            raise pb_utils.TritonModelException(sentence(error)) from None

    def execute(self, requests):
        for request in requests:
            sink = Sink(request.get_response_sender())
            try:
                self.take(read(pb_utils, request, self.names), sink)
            except RequestError as error:
                sink.fail(str(error))

    def take(self, arrays, sink):
        if "stop" in arrays or "drain" in arrays:
            self.control(arrays, sink)
        else:
            settings = arrays["settings"][0].decode() if "settings" in arrays else ""
            self.service.submit(*engine_request(arrays), sink, settings)

    def control(self, arrays, sink):
        if "stop" in arrays and "uid" in arrays and bool(arrays["stop"][0]):
            self.service.stop(int(arrays["uid"][0]))
        if "drain" in arrays:
            self.service.drain(bool(arrays["drain"][0]))
        active, waiting = self.service.counts()
        counts = {"active_requests": np.array([active], np.int32), "waiting_requests": np.array([waiting], np.int32)}
        response = pb_utils.InferenceResponse(output_tensors=write(pb_utils, counts))
        sink.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self):
        self.service.close()

"""Triton model `postprocessing` (decoupled, ONE instance): text of each round (triton_repo/postprocessing.py).

Decoupled, so that it may answer a round with nothing: a heartbeat, or a round of a request with stream = false, whose
one response comes at its end.
"""

import json
import os
import traceback

import triton_python_backend_utils as pb_utils
from triton_repo.description import ENGINE
from triton_repo.ledger import Ledger, ledger_file
from triton_repo.postprocessing import Postprocessor
from triton_repo.repository import bundle_folder
from triton_repo.tensors import read, stop_arrays, write

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        bundle = bundle_folder(args["model_repository"], config["parameters"]["bundle"]["string_value"])
        self.names = [t["name"] for t in config["input"]]
        self.postprocessor = Postprocessor(bundle, self.stop)
        self.ledger = None  # dspark makes it

    def execute(self, requests):
        for request in requests:
            sender, arrays = request.get_response_sender(), read(pb_utils, request, self.names)
            try:
                response = self.postprocessor(arrays, cancelled=request.is_cancelled())
            except Exception:  # never an error: it would leave the ensemble's request open for ever
                pb_utils.Logger.log_error(traceback.format_exc())
                response = self.postprocessor.give_up(arrays)
            if response is None:
                sender.send(flags=FINAL)
            else:
                sender.send(pb_utils.InferenceResponse(output_tensors=write(pb_utils, response)), flags=FINAL)
            if self.ledger is None:
                self.ledger = Ledger(ledger_file(os.getppid()), make=False)
            self.ledger.write(int(arrays["uid"][0]), int(arrays["index"][0]) + 1)

    def stop(self, uid):
        """Cancelling an ensemble request does not reach the engine model: tell it."""
        call = pb_utils.InferenceRequest(
            model_name=ENGINE.name, requested_output_names=["active_requests"], inputs=write(pb_utils, stop_arrays(uid))
        )
        for response in call.exec(decoupled=True):
            if response.has_error():
                pb_utils.Logger.log_error(f"dspark did not take a stop: {response.error().message()}")

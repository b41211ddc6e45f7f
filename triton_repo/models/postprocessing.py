"""Triton model `postprocessing` (decoupled, ONE instance): text of each round (triton_repo/postprocessing.py).

Decoupled, so that it may answer a round with nothing: a heartbeat, or a round of a request with stream = false, whose
one response comes at its end.
"""

import json
import os
import time
import traceback

import triton_python_backend_utils as pb_utils
from triton_repo.description import ENGINE, USER_OUTPUTS
from triton_repo.ledger import Ledger, ledger_file
from triton_repo.postprocessing import Postprocessor
from triton_repo.repository import bundle_folder
from triton_repo.tensors import Writer, stop_arrays, unpack_round, write

# Seconds between two questions whether a request's client has left (each is a message to the server and back): at
# least the first, and the second for each request.
ASK_SECONDS, ASK_SHARE = 0.2, 0.05
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        bundle = bundle_folder(args["model_repository"], config["parameters"]["bundle"]["string_value"])
        self.postprocessor = Postprocessor(bundle, self.stop)
        self.tensors = Writer(pb_utils, USER_OUTPUTS, rare=("text_output", "acceptance_rate", "cum_log_probs"))
        self.ledger = None  # dspark makes it
        self.asked = {}  # uid: when

    def execute(self, requests):
        for request in requests:
            sender, r = request.get_response_sender(), unpack_round(request.inputs()[0].as_numpy())
            try:
                response = self.postprocessor(r, cancelled=self.is_cancelled(request, r))
            except Exception:  # never an error: it would leave the ensemble's request open for ever
                pb_utils.Logger.log_error(traceback.format_exc())
                response = self.postprocessor.give_up(r)
                self.asked.pop(r.uid, None)
            if response is None:
                sender.send(flags=FINAL)
            else:
                sender.send(pb_utils.InferenceResponse(output_tensors=self.tensors(response)), flags=FINAL)
            if self.ledger is None:
                self.ledger = Ledger(ledger_file(os.getppid()), make=False)
            self.ledger.write(r.uid, r.index + 1)

    def is_cancelled(self, request, r):
        now = time.monotonic()
        if r.finish_reason:
            self.asked.pop(r.uid, None)
            return False  # it is over: nothing to stop
        if now - self.asked.setdefault(r.uid, now) < max(ASK_SECONDS, ASK_SHARE * len(self.asked)):
            return False
        self.asked[r.uid] = now
        return request.is_cancelled()

    def stop(self, uid):
        """Cancelling an ensemble request does not reach the engine model: tell it."""
        call = pb_utils.InferenceRequest(
            model_name=ENGINE.name, requested_output_names=["active_requests"], inputs=write(pb_utils, stop_arrays(uid))
        )
        for response in call.exec(decoupled=True):
            if response.has_error():
                pb_utils.Logger.log_error(f"dspark did not take a stop: {response.error().message()}")

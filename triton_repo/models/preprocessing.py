"""Triton model `preprocessing`: user's tensors in, ids and checked parameters out (triton_repo/preprocessing.py)."""

import json
import traceback

import triton_python_backend_utils as pb_utils
from decoding.request import RequestError
from triton_repo.preprocessing import Preprocessor
from triton_repo.repository import bundle_folder
from triton_repo.tensors import read, sentence, write


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        bundle = bundle_folder(args["model_repository"], config["parameters"]["bundle"]["string_value"])
        self.names = [t["name"] for t in config["input"]]
        self.preprocessor = Preprocessor(bundle)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            arrays = self.preprocessor(read(pb_utils, request, self.names))
        except RequestError as error:
            return self.refusal(sentence(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:
            pb_utils.Logger.log_error(traceback.format_exc())
            what = f"The request could not be prepared: {type(error).__name__}: {error}"
            return self.refusal(sentence(what), pb_utils.TritonError.INTERNAL)
        return pb_utils.InferenceResponse(output_tensors=write(pb_utils, arrays))

    def refusal(self, message, code):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))

"""Triton model `preprocessing`: user's tensors in, token ids and checked parameters out (triton_repo/preprocessing.py)."""

import json

import triton_python_backend_utils as pb_utils
from decoding.request import RequestError
from triton_repo.preprocessing import Preprocessor
from triton_repo.repository import bundle_folder
from triton_repo.tensors import read, write


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
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse(output_tensors=write(pb_utils, arrays))

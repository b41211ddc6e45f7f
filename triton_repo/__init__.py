"""The Triton model repository and an embedded server: `server.TritonServer(bundle)`, `python -m triton_repo serve`."""

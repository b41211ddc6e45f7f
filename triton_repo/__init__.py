"""The Triton model repository and the launcher of an embedded server: `TritonServer(bundle)`, `python -m triton_repo`."""

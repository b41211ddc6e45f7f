"""TensorRT and TensorRT-RTX: graphs compiled ahead of time into plans, and plans checked before anything opens them.

Names used alike in every file, so that a test can check each call against both packages: trt (the module), builder,
config, network, parser, profile, layer, attention, tensor, cache, monitor, severity.
"""

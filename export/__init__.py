"""PyTorch checkpoints -> ONNX graphs, checked against PyTorch -> a bundle. Start at __main__.py."""

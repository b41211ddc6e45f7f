"""Scripts that run under the Python of a peer (ours: the project's); each loads one engine and serves protocol.py."""

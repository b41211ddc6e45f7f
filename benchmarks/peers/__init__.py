"""Other CPU engines beside ours: the same weights, prompts and lengths, in turns on the same cores.

Knows: how each peer is installed into a venv of its own and asked for tokens. Refuses to know: why one is
faster. Nothing here is a dependency of the project: `python -m benchmarks.peers install` makes
what `run` uses, under build/peers.
"""

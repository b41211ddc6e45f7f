"""Tiny models run on one thread: a second one only waits, and for long when the machine is busy."""

import torch

torch.set_num_threads(1)

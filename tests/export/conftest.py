"""The tiny models of these tests gain nothing from a second thread."""

import torch

torch.set_num_threads(1)

"""Which class a decoder's layers have.

Knows: the families. Refuses to know: what a layer computes (layers.py, gemma4.py).
"""

from __future__ import annotations

from torch import nn

from training.decoder_config import DecoderConfig
from training.gemma4 import Gemma4Layer
from training.layers import DecoderLayer


def decoder_layer(c: DecoderConfig, i: int) -> nn.Module:
    """Layer i of a decoder; its interface is that of training/layers.py."""
    return DecoderLayer(c) if c.gemma4 is None else Gemma4Layer(c, i)

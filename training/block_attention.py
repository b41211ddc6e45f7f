"""Attention of draft blocks: each block sees its context and, in both directions, itself.

Knows: the products and their softmax. Refuses to know: projections, positions, who the blocks belong to.

Legend: B sequences, S context positions, A anchors (blocks) a sequence, G slots of a block, H / H_kv query / key-value
heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def block_attention(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_block: Tensor, v_block: Tensor, bias: Tensor, G: int,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Each block attends its visible context and, in both directions, itself.

    q [B, A*G, H, D], k/v_context [B, S, H_kv, D], k/v_block [B, A*G, H_kv, D], bias [B, A, S] (0 or -inf);
    scale of the products, None = D ** -0.5.
    Returns [B, A*G, H*D]. Blocks never meet, so the [A*G, A*G] part is kept block-diagonal.
    """
    B, T, H, D = q.shape
    S, groups, A = k_context.shape[1], H // k_context.shape[2], T // G
    heads = lambda x: x.repeat_interleave(groups, dim=2).transpose(1, 2) if groups > 1 else x.transpose(1, 2)
    q = q.transpose(1, 2) * (D**-0.5 if scale is None else scale)  # [B, H, T, D]
    k_context, v_context = heads(k_context), heads(v_context)
    k_block, v_block = heads(k_block).unflatten(2, (A, G)), heads(v_block).unflatten(2, (A, G))
    to_context = (q @ k_context.transpose(-1, -2)).unflatten(2, (A, G)) + bias[:, None, :, None].to(q.dtype)
    to_block = q.unflatten(2, (A, G)) @ k_block.transpose(-1, -2)  # [B, H, A, G, G]
    weights = F.softmax(torch.cat([to_context, to_block], dim=-1).float(), dim=-1).to(q.dtype)
    o = weights[..., :S].flatten(2, 3) @ v_context + (weights[..., S:] @ v_block).flatten(2, 3)
    return o.transpose(1, 2).flatten(2)

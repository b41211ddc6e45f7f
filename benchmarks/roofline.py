"""Step times of GPUs that are not here, from a roofline: what the simulator feeds the scheduler's cost table with.

Knows: data-sheet figures of cards, shapes of models, and the arithmetic below. Refuses to know: schedulers, requests.
Nothing here is a measurement. A step of N packed tokens of R requests, each with C cached positions, takes

    max(bytes read / bandwidth, operations / compute) + layers x (launch + exchange between cards) + host

bytes = weights touched (all dense ones; of the experts those that N tokens reach) + R x C x cache bytes a token;
operations = 2 x active parameters x N' + attention's 4 x N x C x heads x head size x layers, with N' = N rounded up to
the CUDA-graph bucket it replays in (that is what makes the table jagged). Both peaks are derated by `EFFICIENCY`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

EFFICIENCY = {"bandwidth": 0.80, "compute": 0.60}  # shares of the data sheet that serving stacks commonly reach
LAUNCH_US = 6.0  # a layer's kernels behind one another inside a CUDA graph, beyond their own bytes and operations
HOST_MS = 0.25  # between two steps: scheduling, copies of ids, the replay itself
GROUP_EFFICIENCY = 0.75  # of several cards acting as one
EXCHANGE_US = 100.0  # a layer's two exchanges of tokens between the cards of a group


@dataclass(frozen=True)
class Gpu:
    """One card. tflops: dense, at the model's own precision of matrix products; bandwidth in TB/s; memory in GB."""

    name: str
    bf16_tflops: float
    fp8_tflops: float
    bandwidth: float
    memory: float


GPUS = {
    g.name: g
    for g in (
        Gpu("H100", 989, 1979, 3.35, 80),
        Gpu("H200", 989, 1979, 4.8, 141),
        Gpu("B200", 2250, 4500, 8.0, 180),
    )
}


@dataclass(frozen=True)
class Model:
    """Parameters in billions, without the input embedding. `experts` 0 = dense; `cards`: how many GPUs act as one.

    dense: read for every step (attention, shared experts, lm_head); expert: of ONE routed expert over all layers;
    cache_bytes: keys and values of one token over all layers; weight_bytes: mean bytes of a parameter.
    draft: parameters of the drafter's backbone and heads, read once a block (its lm_head is the target's shape).
    """

    name: str
    layers: int
    hidden: int
    dense: float
    cache_bytes: float
    attention_width: int  # query heads x head size
    draft: float
    draft_layers: int
    weight_bytes: float = 2.0
    expert: float = 0.0
    experts: int = 0
    routed: int = 0
    cards: int = 1
    fp8: bool = False
    reach: float = 1.0  # share of the cached positions that a layer's attention reads (sliding windows, compression)

    def touched(self, tokens: ndarray) -> ndarray:
        """Billions of parameters that a step of `tokens` reads: an expert is read once however many tokens chose it;
        uniform routing, so a fraction 1 - (1 - routed / experts)^N of them is reached."""
        if not self.experts:
            return np.full_like(tokens, self.dense, dtype=float)
        reached = self.experts * (1 - (1 - self.routed / self.experts) ** np.asarray(tokens, float))
        return self.dense + self.expert * reached

    @property
    def active(self) -> float:
        """Billions of parameters that multiply one token."""
        return self.dense + self.routed * self.expert


def kv(layers: int, heads: int, size: int, bytes_each: float = 2.0) -> float:
    return 2 * layers * heads * size * bytes_each


MODELS = {
    m.name: m
    for m in (
        # Qwen3: public configurations (36/36/40 layers, 8 key-value heads of 128); drafts of 5 layers as released.
        Model("Qwen3-4B", 36, 2560, 4.02, kv(36, 8, 128), 32 * 128, draft=0.5 + 0.39 + 0.08, draft_layers=5),
        Model("Qwen3-8B", 36, 4096, 7.57, kv(36, 8, 128), 32 * 128, draft=0.96 + 0.62 + 0.08, draft_layers=5),
        Model("Qwen3-14B", 40, 5120, 13.99, kv(40, 8, 128), 40 * 128, draft=1.65 + 0.78 + 0.08, draft_layers=5),
        # Gemma4-12B: 48 layers after the reference's layer ids; the rest assumed like Gemma 3 12B (5 of 6 layers see
        # 1,024).
        Model("Gemma4-12B", 48, 3840, 11.8, kv(48, 8, 256), 16 * 256, draft=1.15 + 1.0 + 0.13, draft_layers=5, reach=0.45),
        # DeepSeek-V4-Flash: 284 B total, 13 B active, 43 layers, 6 of 256 experts and a shared one; FP4 experts, FP8
        # rest; one shared latent of 512 a position, compressed 4 and 128 times in most layers. A group of 8 cards.
        Model("DeepSeek-V4-Flash", 43, 4096, 6.6, 43 * 512 * 1.0, 64 * 512, draft=1.3, draft_layers=3, weight_bytes=0.56,
              expert=43 * 3 * 4096 * 2048 / 1e9, experts=256, routed=6, cards=8, fp8=True, reach=0.15),
    )
}  # fmt: skip


def bucket(tokens: ndarray) -> ndarray:
    """The CUDA-graph size that a step of `tokens` is padded to: powers of two to 8, then steps of 8, 16, 32, 64."""
    n = np.asarray(tokens)
    step = np.select([n <= 8, n <= 64, n <= 256, n <= 512], [1, 8, 16, 32], 64)
    power = 2 ** np.ceil(np.log2(np.maximum(n, 1)))
    return np.where(n <= 8, power, -(-n // step) * step)


def target_ms(gpu: Gpu, model: Model, requests: float, tokens: ndarray, context: float) -> ndarray:
    """[...] ms of a verify step of `tokens` [...] packed tokens of `requests` requests with `context` positions
    each."""
    tokens = np.asarray(tokens, float)
    return _ms(gpu, model, requests, tokens, context, model.touched(tokens), model.active, model.layers) + HOST_MS


def draft_ms(gpu: Gpu, model: Model, requests: float, context: float, block: int) -> float:
    """ms of one block for every request: the backbone over `block` slots each, then the sequential head.

    The backbone reads its own cache of the context (its layers' share of the target's). The head's steps are serial:
    one small gather and product each, bound by launches.
    """
    tokens = np.asarray(float(requests * block))
    parameters = np.full_like(tokens, model.draft)
    share = model.draft_layers / model.layers
    return float(_ms(gpu, model, requests, tokens, context * share, parameters, model.draft, model.draft_layers)) + (
        block * 3 * LAUNCH_US / 1e3
    )


def _ms(gpu, model, requests, tokens, context, touched, active, layers):
    group = model.cards * (GROUP_EFFICIENCY if model.cards > 1 else 1.0)
    bandwidth = gpu.bandwidth * 1e12 * EFFICIENCY["bandwidth"] * group
    compute = (gpu.fp8_tflops if model.fp8 else gpu.bf16_tflops) * 1e12 * EFFICIENCY["compute"] * group
    read = touched * 1e9 * model.weight_bytes + requests * context * model.reach * model.cache_bytes
    operations = 2 * active * 1e9 * bucket(tokens) + 4 * tokens * context * model.reach * model.attention_width * layers
    launch = LAUNCH_US + (EXCHANGE_US if model.cards > 1 else 0.0)
    return 1e3 * np.maximum(read / bandwidth, operations / compute) + layers * launch / 1e3


def capacity(gpu: Gpu, model: Model, context: float) -> int:
    """Requests of `context` positions whose caches fit beside the weights (90% of the memory used)."""
    total = (model.dense + model.experts * model.expert + model.draft) * 1e9 * model.weight_bytes
    return max(1, int((0.9 * gpu.memory * 1e9 * model.cards - total) / (context * model.cache_bytes)))

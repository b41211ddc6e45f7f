"""The two heads' graphs: the sequential Markov head with its sampling, unrolled over the block, and the confidence
head.

Knows: DraftModel.sample_block and DraftModel.confidence. Refuses to know: the backbone, verification, precision.
Legend: R requests, G block size, d hidden size, V_d draft vocabulary, r Markov rank.
"""

from __future__ import annotations

import numpy as np

from training.draft import DraftModel

from .decoder import Weights
from .graph import Graph
from .rows import argmax, inverse_cdf

ALWAYS_CONFIDENT = 20.0  # the constant logit of a draft without a confidence head


class Picks:
    """A slot's logits to its token, one slot after another. A request's pick is the argmax; for those of `sample_index`
    an inverse CDF at their temperature; for those of `match_index` the argmax of logits / temperature + noise, the
    noise that the target's pick will get (docs/sampling.md)."""

    def __init__(self, g: Graph, model: DraftModel):
        c, self.graph = model.config, g
        G, V, self.V_d = c.block_size, c.decoder.vocab_size, c.vocab_out
        self.G = G
        self.sample_index = g.input("sample_index", "int64", ("Rs",))
        self.temperature = self.column(g.input("temperature", "float32", ("Rs",)))
        uniforms = g.input("uniforms", "float32", ("Rs", G))
        self.match_index = g.input("match_index", "int64", ("Rc",))
        self.match_temperature = self.column(g.input("match_temperature", "float32", ("Rc",)))
        noise = g.input("noise", "float32", ("Rc", G, V))
        uniform = g.op("Split", uniforms, out=tuple(f"uniform.{k}" for k in range(G)), axis=1, num_outputs=G)
        self.uniform = uniform if G > 1 else (uniform,)
        ids = model.draft_to_target().numpy()
        self.to_target = g.weight("draft_to_target", ids, ("d2t",)) if trimmed(model) else None
        self.perturb = split_slots(g, at_tokens(g, noise, ids) if self.to_target else noise, G)
        self.tokens, self.indices, self.probs = [], [], []

    def column(self, x: str) -> str:
        return self.graph.op("Unsqueeze", x, self.graph.const([1]))

    def pick(self, k: int, logits: str) -> str:
        """logits [R, V_d] of slot k -> its tokens [R], target ids."""
        g, V_d, column = self.graph, self.V_d, self.column
        index = argmax(g, logits, V_d)  # [R, 1]
        p = g.op("Softmax", g.op("Div", g.op("Gather", logits, self.sample_index), self.temperature), axis=-1)
        drawn = inverse_cdf(g, p, self.uniform[k], V_d)
        index = g.op("ScatterElements", index, column(self.sample_index), drawn, axis=0)
        matched = g.op("Div", g.op("Gather", logits, self.match_index), self.match_temperature)
        matched = argmax(g, g.op("Add", matched, self.perturb[k]), V_d)
        index = g.op("ScatterElements", index, column(self.match_index), matched, axis=0)
        token = g.op("Gather", self.to_target, index) if self.to_target else index
        self.tokens.append(token), self.indices.append(index), self.probs.append(g.op("Unsqueeze", p, g.const([1])))
        return g.op("Squeeze", token, g.const([1]))

    def outputs(self) -> None:
        """Declares draft_tokens, draft_indices and draft_probs of the slots picked."""
        g, G = self.graph, self.G
        g.op("Concat", *self.tokens, out="draft_tokens", axis=1)
        g.op("Concat", *self.indices, out="draft_indices", axis=1)
        g.op("Concat", *self.probs, out="draft_probs", axis=1)
        g.output("draft_tokens", "int64", ("R", G))
        g.output("draft_indices", "int64", ("R", G))
        g.output("draft_probs", "float32", ("Rs", G, self.V_d))


def build_markov(model: DraftModel) -> Graph:
    """The graph of docs/structures.md, "markov": G steps of bias and pick."""
    c, g = model.config, Graph("markov")
    w = Weights(g, model.state_dict())
    G, r, V_d = c.block_size, c.markov_rank, c.vocab_out
    hidden = g.input("hidden", "float32", ("R", G, c.decoder.hidden_size)) if needs_hidden(model) else None
    base_logits = g.input("base_logits", "float32", ("R", G, V_d))
    previous = g.input("anchor_ids", "int64", ("R",)) if r else None
    base, picks = split_slots(g, base_logits, G), Picks(g, model)
    head = MarkovSteps(w, model, hidden) if r else None
    embeddings = []
    for k in range(G):
        logits = base[k]
        if head is not None:
            embedding, bias = head.step(k, previous)
            embeddings.append(g.op("Unsqueeze", embedding, g.const([1])))
            logits = g.op("Add", logits, bias)
        previous = picks.pick(k, logits)
    picks.outputs()
    if embeddings:
        g.op("Concat", *embeddings, out="markov_embeddings", axis=1)
        g.output("markov_embeddings", "float32", ("R", G, r))
    g.prune()
    return g


def needs_hidden(model: DraftModel) -> bool:
    """Only the gated and the rnn head read the hidden states."""
    return bool(model.config.markov_rank) and model.config.markov_head_type != "vanilla"


def trimmed(model: DraftModel) -> bool:
    return model.config.vocab_out < model.config.decoder.vocab_size


def at_tokens(g: Graph, noise: str, tokens: np.ndarray) -> str:
    """noise [R, G, V] -> [R, G, V_d]. A Gather along the last axis takes eight times as long in ONNX Runtime."""
    shape = g.op("Concat", g.op("Shape", noise, start=0, end=2), g.const([len(tokens)]), axis=0)
    index = g.weight("noise_index", tokens.astype(np.int64)[None, None], ("d2t",))
    return g.op("GatherElements", noise, g.op("Expand", index, shape), axis=2)


def split_slots(g: Graph, x: str, G: int) -> list[str]:
    """[R, G, n] -> G values [R, n]."""
    return [g.op("Gather", x, g.const(k), axis=1) for k in range(G)]


class MarkovSteps:
    """The steps of MarkovHead (vanilla, gated, rnn). What depends on `hidden` alone is computed for all slots at
    once."""

    def __init__(self, w: Weights, model: DraftModel, hidden: str | None):
        self.w, self.g, self.kind = w, w.graph, model.config.markov_head_type
        g, r, G = w.graph, model.config.markov_rank, model.config.block_size
        self.rank = r
        self.w1 = w.plain("markov_head.markov_w1.weight")
        name = "markov_head.markov_w2.weight"
        self.w2 = g.weight(f"{name}.T", w.array(name).T, (name,))
        g.quantizable[self.w2] = "block"
        self.state: str | None = None  # zeros before slot 0: the term is left out there
        if hidden is None:
            return
        layer = "markov_head.gate_proj" if self.kind == "gated" else "markov_head.joint_proj"
        sources = (f"{layer}.weight", f"{layer}.bias")
        d, weight = model.config.decoder.hidden_size, w.array(sources[0])
        parts = {"hidden": d, "embedding": r} if self.kind == "gated" else {"state": r, "embedding": r, "hidden": d}
        starts = np.cumsum([0, *parts.values()])
        self.part = {
            part: g.weight(f"{layer}.{part}.T", weight[:, a:b].T, sources[:1])
            for part, a, b in zip(parts, starts, starts[1:])
        }
        bias = g.weight(f"{layer}.bias", w.array(sources[1]), sources[1:])
        self.from_hidden = split_slots(g, g.op("Add", g.op("MatMul", hidden, self.part["hidden"]), bias), G)

    def step(self, k: int, previous: str) -> tuple[str, str]:
        """Slot k, previous [R] target ids -> (embedding [R, r], logit bias [R, V_d])."""
        g = self.g
        embedding = g.op("Gather", self.w1, previous)
        return embedding, g.op("MatMul", self.latent(k, embedding), self.w2)

    def latent(self, k: int, embedding: str) -> str:
        g = self.g
        if self.kind == "vanilla":
            return embedding
        joint = g.op("Add", self.from_hidden[k], g.op("MatMul", embedding, self.part["embedding"]))
        if self.kind == "gated":
            return g.op("Mul", g.op("Sigmoid", joint), embedding)
        if self.state is not None:
            joint = g.op("Add", joint, g.op("MatMul", self.state, self.part["state"]))
        gate, candidate, out = g.op("Split", joint, out=3, axis=-1, num_outputs=3)
        gate, candidate = g.op("Sigmoid", gate), g.op("Tanh", candidate)
        fresh = g.op("Mul", g.op("Sub", g.const(1.0, "float32"), gate), candidate)
        self.state = fresh if self.state is None else g.op("Add", g.op("Mul", gate, self.state), fresh)
        return g.op("Tanh", out)


def build_confidence(model: DraftModel) -> Graph:
    """The graph of docs/structures.md, "confidence": the logit of c_k, or a constant for a draft without the head."""
    c, g = model.config, Graph("confidence")
    w = Weights(g, model.state_dict())
    slots = c.block_size if c.kind == "parallel" else 1  # an autoregressive draft hands over one row's
    hidden = g.input("hidden", "float32", ("R", slots, c.decoder.hidden_size))
    if not c.enable_confidence_head:
        shape = g.op("Concat", g.op("Shape", hidden, start=0, end=1), g.const([c.block_size]), axis=0)
        g.op("Expand", g.const([[ALWAYS_CONFIDENT]], "float32"), shape, out="confidence_logits")
    else:
        x = hidden
        if c.confidence_head_with_markov:
            x = g.op(
                "Concat", hidden, g.input("markov_embeddings", "float32", ("R", c.block_size, c.markov_rank)), axis=-1
            )
        logits = w.linear(x, "confidence_head.proj", int8=None)
        g.op("Squeeze", logits, g.const([2]), out="confidence_logits")
    g.output("confidence_logits", "float32", ("R", c.block_size))
    g.prune()
    return g

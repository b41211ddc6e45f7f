"""Runs each exported graph in ONNX Runtime and compares it with PyTorch, on random and on real inputs.

Knows: docs/structures.md's tensors, TargetModel, DraftModel, the gates. Refuses to know: how graphs are made, and the
serving engines (a graph must be right on its own).

A case is a ragged batch of three requests whose prompts arrive in two uneven steps, then one draft block each, the
sequential head, the confidence head, a verify pass of the target and the verify engine. "real" starts from tokenised text
(a target without a tokenizer: its own greedy continuation), "random" from random tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from training.draft import DraftModel
from training.target import PackedBatch, TargetModel

from .gates import gate_of
from .graph import DSPARK, Graph
from .kernels import LIBRARY
from .heads import ALWAYS_CONFIDENT
from .parity_steps import Draws, rows_pass, steps_pass
from .precision import HALF
from .reference import draw_errors, pick_errors, softmax, verify_reference
from .runner import MASKED, Runner
from .wide_rows import RULES, WideRows

SPLITS = ((19, 7), (5, 11), (30, 3))  # tokens of each request in the first and the second step
TABLE_WIDTH = 124
TEXT = (
    "The baker took the loaf out of the oven and set it by the window to cool. How many loaves does a shop sell in a week "
    "if it sells 24 each day and closes on Sunday? First, multiply 24 by 6, which gives 144. def area(width, height): return "
    "width * height. Water boils at a lower temperature on a mountain, because the air pressure is lower there."
)


@dataclass(frozen=True)
class Check:
    """One compared tensor. max_abs is absolute; scale is the reference's largest magnitude; agreement is of the argmax."""

    engine: str
    case: str
    cosine: float
    norm_ratio: float
    max_abs: float
    scale: float
    ok: bool
    agreement: float | None = None


class Parity:
    """The comparison of one bundle. `checks` fills as the cases run."""

    def __init__(self, folder: Path, graphs: list[Graph], target: TargetModel, draft: DraftModel, dtype: str, seed: int = 0):
        self.target, self.draft, self.dtype = target, draft, dtype
        self.rng = np.random.default_rng(seed)
        self.G, self.V = draft.config.block_size, target.config.vocab_size
        self.slots, self.by_steps = draft.config.block_slots, draft.config.kind != "parallel"
        # An mtp draft norms each row of the target's last layer. Those of first tokens are ten times as large and so are their
        # errors in the form "int8": alone they decide a raw cosine. Every other feature, and dtype, is compared raw.
        last = draft.config.kind == "mtp" and target.layer_ids == (target.config.num_hidden_layers - 1,)
        self.normed = dtype == "int8" and last
        self.C = max(map(sum, SPLITS)) + 2 * max(self.slots, self.G) + max(max(s) for s in SPLITS)
        self.checks: list[Check] = []
        self.run = {}
        for graph in graphs:
            shared = self.run["backbone"].caches if graph.name == "markov" else None  # an autoregressive draft's
            kernels = folder / LIBRARY if graph.calls(DSPARK) else None
            self.run[graph.name] = Runner(folder / "onnx" / graph.name, graph, len(SPLITS), self.C, shared, kernels)

    def compare(
        self, engine: str, case: str, got: np.ndarray, want, *, exact: bool = False, argmax: bool = False, gate: str = ""
    ) -> None:
        """gate: the name of the gate, where it is not the engine's."""
        want = want.detach().numpy() if isinstance(want, torch.Tensor) else want
        a, b = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
        norm = np.linalg.norm(b)
        cosine = float(a @ b / max(np.linalg.norm(a) * norm, 1e-30)) if norm else float(not a.any())
        ratio = float(np.linalg.norm(a) / norm) if norm else 1.0
        max_abs, scale = float(np.abs(a - b).max()), float(np.abs(b).max())
        if got.shape != want.shape or not np.isfinite(a).all():
            ok = False
        elif exact:
            ok = max_abs == 0.0
        else:
            relative = max_abs / scale if scale else 0.0 if max_abs == 0.0 else np.inf
            ok = gate_of(self.dtype, gate or engine).passes(cosine, ratio, relative)
        agreement = float((got.argmax(-1) == want.argmax(-1)).mean()) if argmax else None
        self.checks.append(Check(engine, case, cosine, ratio, max_abs, scale, ok, agreement))

    def case(self, name: str, tokens: list[list[int]]) -> None:
        """tokens[r]: sum(SPLITS[r]) + 1 ids; the last one is the anchor."""
        for runner in self.run.values():
            runner.reset()
        torch_caches = self.target.new_caches(len(tokens), self.C)
        features = [torch.zeros(0)] * len(tokens)
        done = [0] * len(tokens)
        for step in range(2):
            counts = [split[step] for split in SPLITS]
            part = [t[n : n + k] for t, n, k in zip(tokens, done, counts)]
            out = self.target_pass(f"{name}: prefill {step + 1}", part, done, torch_caches)
            rows = out.features.split(counts)
            anchors = [t[n + k] for t, n, k in zip(tokens, done, counts)]
            features = [torch.cat([f, new]) for f, new in zip(features, rows)]
            if self.by_steps:
                block = rows_pass(self, f"{name}: rows {step + 1}", features, tokens, done, counts)
            else:
                block = self.backbone_pass(f"{name}: block {step + 1}", features, anchors, done, counts)
            done = [n + k for n, k in zip(done, counts)]
        draws = Draws.random(self.rng, len(tokens), self.G, self.V)
        got = steps_pass(self, name, block, draws) if self.by_steps else self.heads(name, block, anchors, draws)
        feeds = {"hidden": block.hidden.numpy() if self.by_steps else block.numpy()}
        want = got.pop("want_confidence")
        if "markov_embeddings" in got:
            feeds["markov_embeddings"] = got["markov_embeddings"]
        confidence = self.run["confidence"](**feeds)["confidence_logits"]
        self.compare("confidence", f"{name}: confidence_logits", confidence, want)
        self.verify_pass(name, got, anchors, done, draws.temperature, torch_caches)

    def target_pass(self, case: str, tokens: list[list[int]], done: list[int], torch_caches):
        batch = PackedBatch.build(tokens, done, self.C)
        rows = torch.arange(batch.token_ids.numel())
        want = self.target(batch, rows, torch_caches)
        feeds = {k: getattr(batch, k).numpy() for k in ("token_ids", "pad_index", "pack_index", "position_ids", "write_index")}
        got = self.run["target"](**feeds, mask=np.where(batch.mask.numpy(), np.float32(0), MASKED), logit_rows=rows.numpy())
        self.compare("target", f"{case}, logits", got["logits"], want.logits, argmax=True)
        a, b = torch.from_numpy(got["features"]), want.features
        if self.normed:
            a, b = self.draft.hnorm(a), self.draft.hnorm(b)
        self.compare("target", f"{case}, features{', normed' * self.normed}", a.numpy(), b)
        self.logits = got["logits"]
        return want

    def backbone_pass(self, case: str, features: list, anchors: list[int], done: list[int], counts: list[int]) -> torch.Tensor:
        """The new context rows of each request, then its block, against DraftModel.backbone over the whole context."""
        R, B, F, Q = len(anchors), self.slots, sum(counts), max(counts) + self.slots
        pad, first = np.zeros((R, Q), np.int64), 0
        start = np.array(done)
        for r, k in enumerate(counts):
            pad[r, :k] = first + np.arange(k)
            pad[r, k : k + B] = F + r * B + np.arange(B)
            first += k
        ends = start + counts
        mask = np.arange(self.C)[None, :] < (ends + B)[:, None]
        got = self.run["backbone"](
            features=torch.cat([f[n:] for f, n in zip(features, done)]).numpy(), anchor_ids=np.array(anchors), pad_index=pad,
            position_ids=start[:, None] + np.arange(Q), block_position_ids=ends[:, None] + np.arange(B), write_index=start,
            mask=np.where(np.broadcast_to(mask[:, None, None], (R, 1, B, self.C)), np.float32(0), MASKED),
        )
        want = torch.cat([
            self.draft.backbone(f[None], torch.tensor([[a]]), torch.tensor([[len(f)]]))[:, 0] for f, a in zip(features, anchors)
        ])
        self.compare("backbone", f"{case}, hidden", got["hidden"], want)
        self.compare("backbone", f"{case}, base_logits", got["base_logits"], self.draft.base_logits(want), argmax=True)
        return want

    def heads(self, name: str, hidden: torch.Tensor, anchors: list[int], draws: Draws) -> dict:
        """The sequential head; what it gave, and the confidences that belong to it as `want_confidence`."""
        draft = self.draft
        base = draft.base_logits(hidden)
        feeds = dict(hidden=hidden.numpy(), base_logits=base.numpy(), anchor_ids=np.array(anchors))
        got = self.run["markov"](**feeds, **draws.feeds())
        previous = torch.tensor(np.column_stack([anchors, got["draft_tokens"][:, :-1]]))
        logits, confidence = draft.corrected_logits(hidden, previous)
        self.picks(name, got, logits.numpy(), draws, "markov")
        if "markov_embeddings" in got:
            exact = self.dtype not in HALF
            self.compare("markov", f"{name}: markov_embeddings", got["markov_embeddings"], draft.markov_head.embed(previous), exact=exact)
        none = np.full((len(anchors), self.G), ALWAYS_CONFIDENT, np.float32)
        return {**got, "want_confidence": none if confidence is None else confidence}

    def picks(self, name: str, got: dict, logits: np.ndarray, draws: Draws, gate: str) -> None:
        """What the markov engine gave against the logits [R, G, V_d] of its own tokens so far."""
        sampled, matched, temperature = draws.sampled, draws.matched, draws.temperature[:, None, None]
        indices, to_target = got["draft_indices"], self.draft.draft_to_target().numpy()
        probs = softmax(logits[sampled] / temperature[sampled])
        self.compare("markov", f"{name}: draft_probs", got["draft_probs"], probs, gate=gate)
        self.compare("markov", f"{name}: draft_tokens", got["draft_tokens"], to_target[indices], exact=True)
        perturbed = logits.copy()
        perturbed[matched] = logits[matched] / temperature[matched] + draws.noise[..., to_target]
        slack = gate_of(self.dtype, gate).draw
        wrong = pick_errors(perturbed, indices, slack)
        wrong[sampled] = draw_errors(probs, draws.uniforms[sampled], indices[sampled], slack)
        self.compare("markov", f"{name}: draws outside their interval", wrong, np.zeros_like(wrong), exact=True)

    def verify_pass(self, name: str, got: dict, anchors: list[int], done: list[int], temperature: np.ndarray, torch_caches) -> None:
        """The target over the blocks that were drafted (`got`), then the verdicts."""
        G, tokens, indices = self.G, got["draft_tokens"], got["draft_indices"]
        num_draft = np.array([G, max(G - 2, 0), G // 2])
        self.target_pass(f"{name}: verify", [[a, *row[:n]] for a, row, n in zip(anchors, tokens.tolist(), num_draft)], done, torch_caches)
        first = np.cumsum([0, *(num_draft[:-1] + 1)])
        row_index = first[:, None] + np.minimum(np.arange(G + 1), num_draft[:, None])
        rules = ["greedy", "rejection", "coupled"]
        self.verify(name, self.logits, row_index, tokens, indices, got["draft_probs"], num_draft, temperature, rules)

    def verify(self, name, logits, row_index, draft_tokens, draft_indices, draft_probs, num_draft, temperature, rules) -> None:
        """draft_probs: of the "rejection" requests, in their order. Two calls: without edits, filters and log-probs, and
        with them everywhere."""
        wide = WideRows(row_index, num_draft, temperature, rules)
        for what in ("plain", "edited"):
            feeds = wide.feeds(logits, draft_tokens, draft_indices, draft_probs, self.rng, what == "edited")
            got = self.run["verify"](**feeds)
            want = verify_reference(feeds, self.draft.draft_to_target().numpy())
            self.compare("verify", f"{name}, {what}: accepted", got["accepted"], want.accepted, exact=True)
            outside = ((got["next_tokens"] < want.low) | (got["next_tokens"] > want.high)).astype(np.int64)
            self.compare("verify", f"{name}, {what}: next_tokens outside their interval", outside, 0 * outside, exact=True)
            if what == "edited":
                firm = (want.low == want.high)[feeds["log_prob_at"][:, 0]]
                self.compare("verify", f"{name}, {what}: log_probs", got["log_probs"][firm], want.log_probs[firm])

    def random_verify(self, R: int = 48) -> None:
        """Verify on random logits near the draft's own, so that every outcome occurs; rules mixed, then greedy alone."""
        G, rng, to_target = self.G, self.rng, self.draft.draft_to_target().numpy()
        V, V_d = self.V, len(to_target)
        R = max(6, min(R, 4_000_000 // (V * (G + 1))))
        logits = rng.standard_normal((R, G + 1, V), dtype=np.float32) * 4
        draft_logits = logits[:, :G][..., to_target] + 0.5 * rng.standard_normal((R, G, V_d), dtype=np.float32)
        for case, rules in (("random", [RULES[r % 3] for r in range(R)]), ("random greedy", ["greedy"] * R)):
            temperature = np.array([0 if r == "greedy" else 0.5 + rng.random() for r in rules], np.float32)
            probs = softmax(draft_logits / np.where(temperature > 0, temperature, 1)[:, None, None]).astype(np.float32)
            drawn = (probs.cumsum(-1) < rng.random((R, G, 1))).sum(-1).clip(max=V_d - 1)
            indices = np.where(temperature[:, None] > 0, drawn, draft_logits.argmax(-1))
            row_index = np.arange(R * (G + 1)).reshape(R, G + 1)
            num_draft = rng.integers(0, G + 1, R)
            row_index = np.minimum(row_index, row_index[:, :1] + num_draft[:, None])
            own = probs[[rule == "rejection" for rule in rules]]
            self.verify(case, logits.reshape(-1, V), row_index, to_target[indices], indices, own, num_draft, temperature, rules)


def real_tokens(target: TargetModel, folder: Path) -> list[list[int]]:
    """For each request sum(split) + 1 tokens of text, or of the target's own greedy continuation."""
    lengths = [sum(s) + 1 for s in SPLITS]
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
        ids = ids * (1 + sum(lengths) // len(ids))
        ends = np.cumsum(lengths)
        return [ids[e - n : e] for e, n in zip(ends, lengths)]
    sequences = [[(7 * r + 3) % target.config.vocab_size] for r in range(len(lengths))]
    for _ in range(max(lengths) - 1):
        batch = PackedBatch.build(sequences, [0] * len(sequences), len(sequences[0]))
        last = torch.tensor([len(s) for s in sequences]).cumsum(0) - 1
        for s, token in zip(sequences, target(batch, last).logits.argmax(-1).tolist()):
            s.append(token)
    return [s[:n] for s, n in zip(sequences, lengths)]


@torch.no_grad()
def check_parity(
    bundle: Path, graphs: list[Graph], target: TargetModel, draft: DraftModel, target_folder: Path, *, dtype: str, console: Console
) -> list[dict]:
    """Prints the table and returns the manifest's `parity`. Raises ValueError, one sentence, when a gate fails."""
    parity = Parity(bundle, graphs, target, draft, dtype)
    lengths = [sum(s) + 1 for s in SPLITS]
    parity.case("random", [parity.rng.integers(0, target.config.vocab_size, n).tolist() for n in lengths])
    parity.case("real", real_tokens(target, target_folder))
    parity.random_verify()
    console = console if console.width >= TABLE_WIDTH else Console(file=console.file, width=TABLE_WIDTH)
    table = Table("engine", "case", "cosine", "norm ratio", "max abs", "of scale", "argmax", "")
    for c in parity.checks:
        agreement = "" if c.agreement is None else f"{c.agreement:.3f}"
        table.add_row(c.engine, c.case, f"{c.cosine:.7f}", f"{c.norm_ratio:.5f}", f"{c.max_abs:.2e}", f"{c.scale:.3g}",
                      agreement, "ok" if c.ok else "FAILED")
    console.print(table)
    if failed := [c for c in parity.checks if not c.ok]:
        c = failed[0]
        raise ValueError(
            f"parity: {c.engine}, {c.case}: cosine {c.cosine:.6f}, norm ratio {c.norm_ratio:.4f}, max abs {c.max_abs:.3g} of scale "
            f"{c.scale:.3g} is outside the {dtype} gate ({len(failed)} of {len(parity.checks)} checks failed)."
        )
    keys = ("engine", "case", "cosine", "norm_ratio", "max_abs")
    return [{k: getattr(c, k) for k in keys} for c in parity.checks]

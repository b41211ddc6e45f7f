"""Runs each exported graph in ONNX Runtime and compares it with PyTorch, on random and on real inputs.

Knows: docs/structures.md's tensors, TargetModel, DraftModel, the accept rule in float64 numpy. Refuses to know: how graphs
are made, and the serving engines (a graph must be right on its own).

A case is a ragged batch of three requests whose prompts arrive in two uneven steps, then one draft block each, the
sequential head, the confidence head, a verify pass of the target and the verify engine. "real" starts from tokenised text
(a target without a tokenizer: its own greedy continuation), "random" from random tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table

from training.draft import DraftModel
from training.target import PackedBatch, TargetModel

from .graph import Graph
from .reference import softmax, verify_reference

MASKED = np.float32(-1e30)
RULES = ("greedy", "rejection", "coupled")
FP32_COSINE, FP32_RELATIVE, INT8_COSINE, INT8_NORM = 0.99999, 1e-3, 0.99, 0.05
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


class Runner:
    """One graph's session on two threads, with caches (if it has any) bound in place."""

    def __init__(self, folder: Path, graph: Graph, rows: int = 0, length: int = 0):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leave the cores to who needs them
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        check_signature(self.session, graph)
        self.inputs = [s for s in graph.inputs if not s.name.startswith("past_key_values.")]
        self.outputs = [s.name for s in graph.outputs if not s.name.startswith("present.")]
        self.caches = {}
        for s in graph.inputs:
            if s.name.startswith("past_key_values."):
                shape = [{"R": rows, "C": length}.get(n, n) for n in s.shape]
                self.caches[s.name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))

    def __call__(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        binding = self.session.io_binding()
        for s in self.inputs:
            array = np.ascontiguousarray(feeds[s.name], dtype=s.dtype)
            binding.bind_ortvalue_input(s.name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, value in self.caches.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), value)
        for name in self.outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        arrays = dict(zip([*(c.replace("past_key_values.", "present.") for c in self.caches), *self.outputs], binding.get_outputs()))
        return {name: arrays[name].numpy() for name in self.outputs}


def check_signature(session: ort.InferenceSession, graph: Graph) -> None:
    """Raises ValueError when the written model's names or shapes are not those that the manifest will state."""
    for what, declared, found in (
        ("inputs", graph.inputs, session.get_inputs()), ("outputs", graph.outputs, session.get_outputs())
    ):
        have, want = [(f.name, list(f.shape)) for f in found], [(s.name, list(s.shape)) for s in declared]
        if have != want:
            odd = next((h, w) for h, w in zip([*have, None], [*want, None]) if h != w)
            raise ValueError(f"graph {graph.name}: its {what} are not as declared: {odd[0]} instead of {odd[1]}.")


class Parity:
    """The comparison of one bundle. `checks` fills as the cases run."""

    def __init__(self, folder: Path, graphs: list[Graph], target: TargetModel, draft: DraftModel, dtype: str, seed: int = 0):
        self.target, self.draft, self.dtype = target, draft, dtype
        self.rng = np.random.default_rng(seed)
        self.G, self.V = draft.config.block_size, target.config.vocab_size
        self.C = max(map(sum, SPLITS)) + 2 * self.G + max(max(s) for s in SPLITS)
        self.checks: list[Check] = []
        self.run = {}
        for graph in graphs:
            self.run[graph.name] = Runner(folder / "onnx" / graph.name, graph, len(SPLITS), self.C)

    def compare(self, engine: str, case: str, got: np.ndarray, want, *, exact: bool = False, argmax: bool = False) -> None:
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
        elif self.dtype == "int8" and engine in ("target", "backbone"):
            ok = cosine >= INT8_COSINE and abs(ratio - 1) <= INT8_NORM
        else:
            ok = cosine >= FP32_COSINE and max_abs <= FP32_RELATIVE * scale
        agreement = float((got.argmax(-1) == want.argmax(-1)).mean()) if argmax else None
        self.checks.append(Check(engine, case, cosine, ratio, max_abs, scale, ok, agreement))

    def case(self, name: str, tokens: list[list[int]]) -> None:
        """tokens[r]: sum(SPLITS[r]) + 1 ids; the last one is the anchor."""
        for runner in self.run.values():
            for cache in runner.caches.values():
                cache.update_inplace(np.zeros(cache.shape(), np.float32))
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
            hidden = self.backbone_pass(f"{name}: block {step + 1}", features, anchors, done, counts)
            done = [n + k for n, k in zip(done, counts)]
        self.heads(name, hidden, anchors, done, torch_caches)

    def target_pass(self, case: str, tokens: list[list[int]], done: list[int], torch_caches):
        batch = PackedBatch.build(tokens, done, self.C)
        rows = torch.arange(batch.token_ids.numel())
        want = self.target(batch, rows, torch_caches)
        feeds = {k: getattr(batch, k).numpy() for k in ("token_ids", "pad_index", "pack_index", "position_ids", "write_index")}
        got = self.run["target"](**feeds, mask=np.where(batch.mask.numpy(), np.float32(0), MASKED), logit_rows=rows.numpy())
        self.compare("target", f"{case}, logits", got["logits"], want.logits, argmax=True)
        self.compare("target", f"{case}, features", got["features"], want.features)
        self.logits = got["logits"]
        return want

    def backbone_pass(self, case: str, features: list, anchors: list[int], done: list[int], counts: list[int]) -> torch.Tensor:
        """The new context rows of each request, then its block, against DraftModel.backbone over the whole context."""
        R, G, F, Q = len(anchors), self.G, sum(counts), max(counts) + self.G
        pad, first = np.zeros((R, Q), np.int64), 0
        start = np.array(done)
        for r, k in enumerate(counts):
            pad[r, :k] = first + np.arange(k)
            pad[r, k : k + G] = F + r * G + np.arange(G)
            first += k
        ends = start + counts
        mask = np.arange(self.C)[None, :] < (ends + G)[:, None]
        got = self.run["backbone"](
            features=torch.cat([f[n:] for f, n in zip(features, done)]).numpy(), anchor_ids=np.array(anchors), pad_index=pad,
            position_ids=start[:, None] + np.arange(Q), block_position_ids=ends[:, None] + np.arange(G), write_index=start,
            mask=np.where(np.broadcast_to(mask[:, None, None], (R, 1, G, self.C)), np.float32(0), MASKED),
        )
        want = torch.cat([
            self.draft.backbone(f[None], torch.tensor([[a]]), torch.tensor([[len(f)]]))[:, 0] for f, a in zip(features, anchors)
        ])
        self.compare("backbone", f"{case}, hidden", got["hidden"], want)
        self.compare("backbone", f"{case}, base_logits", got["base_logits"], self.draft.lm_head(want), argmax=True)
        return want

    def heads(self, name: str, hidden: torch.Tensor, anchors: list[int], done: list[int], torch_caches) -> None:
        R, G, draft, rng = len(anchors), self.G, self.draft, self.rng
        to_target = draft.draft_to_target().numpy()
        temperature = np.array([0.0, 1.0, 0.7], np.float32)
        base = draft.lm_head(hidden)
        uniforms, sampled, matched = rng.random((R, G), dtype=np.float32), np.array([1]), np.array([2])
        noise = rng.gumbel(size=(1, G, self.V)).astype(np.float32)
        got = self.run["markov"](
            hidden=hidden.numpy(), base_logits=base.numpy(), anchor_ids=np.array(anchors), sample_index=sampled,
            temperature=temperature[sampled], uniforms=uniforms[sampled], match_index=matched,
            match_temperature=temperature[matched], noise=noise,
        )
        indices, tokens = got["draft_indices"], got["draft_tokens"]
        previous = torch.tensor(np.column_stack([anchors, tokens[:, :-1]]))
        logits, confidence = draft.corrected_logits(hidden, previous)
        logits = logits.numpy()
        probs = softmax(logits[sampled] / temperature[sampled, None, None])
        self.compare("markov", f"{name}: draft_probs", got["draft_probs"], probs)
        self.compare("markov", f"{name}: draft_tokens", tokens, to_target[indices], exact=True)
        perturbed = logits.copy()
        perturbed[matched] = logits[matched] / temperature[matched, None, None] + noise[..., to_target]
        wrong = pick_errors(perturbed, indices)
        wrong[sampled] = draw_errors(probs, uniforms[sampled], indices[sampled])
        self.compare("markov", f"{name}: draws outside their interval", wrong, np.zeros_like(wrong), exact=True)
        feeds = {"hidden": hidden.numpy()}
        if "markov_embeddings" in got:
            self.compare("markov", f"{name}: markov_embeddings", got["markov_embeddings"], draft.markov_head.embed(previous), exact=True)
            feeds["markov_embeddings"] = got["markov_embeddings"]
        got_confidence = self.run["confidence"](**feeds)["confidence_logits"]
        want_confidence = confidence if confidence is not None else np.full((R, G), 20.0, np.float32)
        self.compare("confidence", f"{name}: confidence_logits", got_confidence, want_confidence)

        num_draft = np.array([G, max(G - 2, 0), G // 2])
        self.target_pass(f"{name}: verify", [[a, *row[:n]] for a, row, n in zip(anchors, tokens.tolist(), num_draft)], done, torch_caches)
        first = np.cumsum([0, *(num_draft[:-1] + 1)])
        row_index = first[:, None] + np.minimum(np.arange(G + 1), num_draft[:, None])
        rules = ["greedy", "rejection", "coupled"]
        self.verify(name, self.logits, row_index, tokens, indices, got["draft_probs"], num_draft, temperature, rules)

    def verify(self, name, logits, row_index, draft_tokens, draft_indices, draft_probs, num_draft, temperature, rules) -> None:
        """draft_probs: of the "rejection" requests, in their order. Two calls: with edits, filters and log-probs everywhere,
        and without; and that the filters' result does not depend on top_count."""
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


class WideRows:
    """Inputs of the verify graph for requests under given rules, with or without edits, filters and log-probs."""

    def __init__(self, row_index: np.ndarray, num_draft: np.ndarray, temperature: np.ndarray, rules: list[str]):
        self.row_index, self.num_draft, self.temperature, self.rules = row_index, num_draft, temperature, rules

    def feeds(self, logits, draft_tokens, draft_indices, draft_probs, rng: np.random.Generator, edited: bool) -> dict:
        (R, G), V, f32 = draft_tokens.shape, logits.shape[1], np.float32
        counts, rules = self.num_draft + 1, np.array(self.rules)
        wide = np.flatnonzero((rules != "greedy") | edited)
        firsts = np.zeros(R, np.int64)
        firsts[wide] = np.cumsum(counts[wide]) - counts[wide]
        rows_of = lambda requests, first: np.concatenate([[], *(first[r] + np.arange(counts[r]) for r in requests)]).astype(np.int64)
        spread = lambda requests, values: np.repeat(np.asarray(values)[requests], counts[requests])
        wide_rows, drawn = rows_of(wide, self.row_index[:, 0]), np.flatnonzero(rules == "rejection")
        matched = [r for r in wide if rules[r] != "rejection"]
        match_rows = rows_of(matched, firsts)
        sampled = np.flatnonzero(rules != "greedy") if edited else np.zeros(0, np.int64)
        coupled = spread(matched, rules == "coupled") if len(matched) else np.zeros(0, bool)
        E = min(V, 40) if edited else 0
        M = len(wide_rows)
        edit_at = np.stack([np.repeat(np.arange(M), E), np.concatenate([rng.permutation(V)[:E] for _ in range(M)] or [[]])], 1)
        ban = rng.random(M * E) < 0.1
        every = np.arange(R) if edited else np.zeros(0, np.int64)
        slots = [np.arange(counts[r]) for r in every]
        return dict(
            logits=logits, row_index=self.row_index, draft_tokens=draft_tokens, num_draft=self.num_draft, wide_rows=wide_rows,
            temperature=spread(wide, np.where(self.temperature > 0, self.temperature, 1)).astype(f32),
            edit_at=edit_at.astype(np.int64), edit_scale=(0.7 + rng.random(M * E)).astype(f32),
            edit_add=np.where(ban, -np.inf, rng.standard_normal(M * E)).astype(f32),
            filter_rows=rows_of(sampled, firsts), top_k=spread(sampled, rng.choice([V, min(20, V)], R)),
            top_p=spread(sampled, rng.choice([1, 0.9], R)).astype(f32), min_p=spread(sampled, rng.choice([0, 0.01], R)).astype(f32),
            top_count=np.array([V]), match_rows=match_rows,
            noise=(rng.gumbel(size=(len(match_rows), V)) * coupled[:, None]).astype(f32),
            match_filtered=np.flatnonzero(coupled & edited), sample_index=drawn,
            sample_rows=self.row_index[drawn] - self.row_index[drawn, :1] + firsts[drawn, None], draft_rows=np.arange(len(drawn)),
            draft_indices=draft_indices[drawn], draft_probs=draft_probs,
            accept_uniforms=rng.random((len(drawn), G), dtype=f32), next_uniforms=rng.random((len(drawn), G + 1), dtype=f32),
            log_prob_rows=rows_of(every, self.row_index[:, 0]),
            log_prob_at=np.stack([np.repeat(every, counts[every]), np.concatenate([[], *slots])], 1).astype(np.int64),
        )


def draw_errors(probs: np.ndarray, uniforms: np.ndarray, indices: np.ndarray, tolerance: float = 1e-5) -> np.ndarray:
    """[Rs, G] int64, 1 where a uniform lies outside its index's cdf interval (widened by the tolerance, because float32 sums
    differ by their order)."""
    cdf = probs.astype(np.float64).cumsum(-1)
    take = lambda a: np.take_along_axis(a, indices[..., None], -1)[..., 0]
    high, mass = take(cdf), take(probs.astype(np.float64))
    u = uniforms * cdf[..., -1]
    return ((u < high - mass - tolerance) | (u > high + tolerance)).astype(np.int64)


def pick_errors(scores: np.ndarray, indices: np.ndarray, tolerance: float = 1e-5) -> np.ndarray:
    """[R, G] int64, 1 where the index's score is under the largest."""
    chosen = np.take_along_axis(scores, indices[..., None], -1)[..., 0]
    return (chosen < scores.max(-1) - tolerance * np.abs(scores).max()).astype(np.int64)


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

"""`make finetune PROMPTS=my.jsonl`: a shipped head trained further on one's own prompts, and what that changed.

Knows: the order of the steps, what they leave in the folder, the report. Refuses to know: how any step works (each is a
command of its own). Every step is kept: an interrupted run goes on where it was when the command is given again.

    OUT/prompts.jsonl, held-out.jsonl   the prompts, and those of them that are never trained on
    OUT/data, run, head, bundle         answers of the target, the run, the new head, its engines
    OUT/report.md, report.json          acceptance before and after on the held-out prompts
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from safetensors import safe_open

from training.sources import Chat, once, read, write_chats

from . import bundle as bundles
from .acceptance import measure
from .common import console_for_tables, encode, markdown_table, percent, read_items, rich_table, write_json, write_result

HELD_OUT = 10  # one prompt in so many is kept for the evaluation
LEAST = 40  # prompts
COLUMNS = (
    ("prompts", lambda r: r["name"]),
    ("temperature", lambda r: f"{r['temperature']:g}"),
    ("n", lambda r: str(r["prompts"])),
    ("rounds before", lambda r: str(r["before"]["rounds"])),
    ("before", lambda r: f"{r['before']['acceptance_length']:.2f}"),
    ("after", lambda r: f"{r['after']['acceptance_length']:.2f}"),
    ("change %", lambda r: f"{100 * (r['after']['acceptance_length'] / r['before']['acceptance_length'] - 1):+.1f}"),
    ("by position before %", lambda r: percent(r["before"]["per_position"])),
    ("after %", lambda r: percent(r["after"]["per_position"])),
)


def split(chats: list[Chat]) -> tuple[list[Chat], list[Chat]]:
    """(to train on, held out): by the hash of what is asked, so that a prompt stays on its side when others come."""
    held = [int(chat.key[:8], 16) % HELD_OUT == 0 for chat in chats]
    return [c for c, h in zip(chats, held) if not h], [c for c, h in zip(chats, held) if h]


def prepare(prompts: Path, out: Path) -> tuple[int, int]:
    """Writes prompts.jsonl and held-out.jsonl (once: a later run keeps them); gives how many each holds.

    Raises ValueError, one sentence: too few prompts, or `out` was begun with other ones."""
    chats = list(once(read(str(prompts))))
    chats = [Chat(chat.messages, chat.kind) for chat in chats]  # the answers must be the target's own
    train, held = split(chats)
    if len(chats) < LEAST or not held:
        raise ValueError(f"{prompts} holds {len(chats)} different prompts; fine-tuning needs {LEAST} or more.")
    digest = hashlib.sha256("\n".join(chat.key for chat in chats).encode()).hexdigest()
    mark = out / "prompts.sha256"
    if mark.exists() and mark.read_text() != digest:
        raise ValueError(f"{out} was begun with other prompts than {prompts}; name another --out or remove it.")
    if not mark.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_chats(out / "prompts.jsonl", train)
        write_chats(out / "held-out.jsonl", held)
        mark.write_text(digest)
    return len(train), len(held)


def covered(data: Path, head: Path) -> tuple[float, list[tuple[int, int]]]:
    """(share of the answers' tokens that the head's draft vocabulary holds, [(id, count)] of what it lacks most)."""
    ids = draft_ids(head)
    counts: dict[int, int] = {}
    for file in sorted(data.glob("shard-*.safetensors")):
        with safe_open(file, framework="numpy") as handle:
            tokens, offsets, lengths = (handle.get_tensor(n) for n in ("tokens", "offsets", "prompt_lengths"))
        for start, end, prompt in zip(offsets[:-1], offsets[1:], lengths):
            for token, n in zip(*np.unique(tokens[start + prompt : end], return_counts=True)):
                counts[int(token)] = counts.get(int(token), 0) + int(n)
    missing = [] if ids is None else sorted(((t, n) for t, n in counts.items() if t not in ids), key=lambda x: (-x[1], x[0]))
    total = sum(counts.values())
    return 1 - sum(n for _, n in missing) / max(total, 1), missing[:10]


def vocabulary(data: Path, head: Path, whole: int) -> dict:
    """Tokens of the head's draft vocabulary (`whole`: of the target's), and their share of the answers' tokens."""
    ids = draft_ids(head)
    return {"draft_vocab": whole if ids is None else len(ids), "coverage": covered(data, head)[0]}


def draft_ids(head: Path) -> set[int] | None:
    """Target ids of the draft vocabulary; None when it is the target's own."""
    for file in sorted(head.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as handle:
            if "d2t" in handle.keys():
                offsets = handle.get_tensor("d2t")
                return set((offsets + np.arange(len(offsets))).tolist())
    return None


def command(module: str, *arguments: object) -> None:
    """Runs `python -m module ...`. Raises typer.Exit when it fails: it has said why. At a Ctrl-C it may finish what it
    does then: the trainer saves its run (subprocess.run would kill it)."""
    child = subprocess.Popen([sys.executable, "-m", module, *map(str, arguments)])
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.wait()
        raise
    if code:
        bundles.fail(f"`python -m {module} {arguments[0]}` failed; its message is above.")


def evaluate(bundle: Path, files: dict[str, Path], *, limit: int, max_tokens: int, kept: Path) -> list[dict]:
    """Rows of acceptance, greedy and at temperature 1, of each file. kept: rows of an earlier run with this bundle."""
    opened = bundles.load(bundle)
    wanted = {"draft": opened.bundle.draft.hash, "limit": limit, "max_tokens": max_tokens}
    before = json.loads(kept.read_text()) if kept.is_file() else {}
    done = {(r["file"], r["temperature"]): r for r in before["rows"]} if before.get("of") == wanted else {}
    longest = opened.bundle.max_context - opened.bundle.draft.block_size - max_tokens
    for name, path in files.items():
        prompts = [ids for ids in encode(bundle, read_items(path, limit)) if len(ids) <= longest]
        for degree in (0.0, 1.0):
            if (str(path), degree) not in done:
                row = measure(opened, prompts, temperature=degree, max_tokens=max_tokens, concurrency=8, seed=0)
                done[str(path), degree] = {"name": name, "file": str(path), **row}
                print(f"{name} T={degree:g}: {row['acceptance_length']:.3f} tokens a round", flush=True)
                write_json(kept, {"of": wanted, "rows": list(done.values())})
    opened.close()
    return [done[str(path), degree] for path in files.values() for degree in (0.0, 1.0)]


def report(result: dict) -> str:
    """report.md."""
    old, new = result["before"], result["after"]
    lacking = ", ".join(f"`{text}` ({n})" for text, n in result["lacking"])
    return "\n".join([
        f"# {result['head']} fine-tuned on {result['prompts']}", "",
        f"{result['trained']} prompts trained on, {result['held_out']} held out. Tokens a round of the target, the bonus "
        "token included; whole blocks verified; compiled engines.", "",
        markdown_table(COLUMNS, result["rows"]), "",
        f"The old head's draft vocabulary of {old['draft_vocab']:,} tokens holds {old['coverage']:.2%} of the answers' "
        f"tokens, the new one's of {new['draft_vocab']:,} {new['coverage']:.2%} (those of the prompts trained on)."
        + (f" It lacks most: {lacking}." if lacking else ""), "",
        f"Training: {result['settings']}. A calibration of the old head does not hold for the new one: `make calibrate`.", "",
    ])  # fmt: skip


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL of your prompts: lines with prompt, messages or turns")],
    target: bundles.TargetOption = bundles.TARGET,
    draft: bundles.DraftOption = bundles.DRAFT,
    bundle: bundles.BundleOption = bundles.BUNDLE,
    dtype: bundles.DtypeOption = "int8",
    out: Annotated[Path, typer.Option(help="folder of everything that is made")] = Path("build/finetune"),
    answers: Annotated[int, typer.Option(help="prompts answered for training, at most; 0 is all")] = 400,
    max_new: Annotated[int, typer.Option(help="tokens of an answer, at most")] = 160,
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 100,
    lr: Annotated[float, typer.Option(help="the shipped head's own")] = 1e-3,
    draft_vocab_add: Annotated[int, typer.Option(min=0, help="answer tokens added to what the head can draft")] = 1024,
    limit: Annotated[int, typer.Option(help="held-out prompts evaluated")] = 40,
    other: Annotated[list[Path], typer.Option(help="prompts of other sorts: what does the head lose there?")] = [],
    seed: int = 1,
) -> None:
    """Trains a head further on your prompts; compares it with the old one on those it was not trained on."""
    try:
        trained, held = prepare(prompts, out)
    except (ValueError, OSError) as error:
        bundles.fail(str(error))
    print(f"finetune: {trained} prompts to train on, {held} held out", flush=True)
    manifest = bundles.ensure(target, draft, bundle, dtype)
    data, run, head, tuned = (out / name for name in ("data", "run", "head", "bundle"))
    command(
        "training", "data", "--target", target, "--out", data, "--source", out / "prompts.jsonl", "--answers", "engines",
        "--bundle", bundle, "--temperature", "mixed", "--top-p", 1, "--top-k", 0, "--count", answers, "--max-new", max_new,
        "--seed", seed,
    )  # fmt: skip
    files = {"held out": out / "held-out.jsonl", **{path.stem: path for path in other}}
    asked = dict(limit=limit, max_tokens=max_new)
    before = evaluate(bundle, files, kept=out / "before.json", **asked)
    begun = ["--resume"] if (run / "state.pt").is_file() else ["--init", draft]
    sizes = [manifest[model]["vocab_size"] for model in ("target", "draft")]
    adds = min(draft_vocab_add, sizes[0] - sizes[1])
    settings = ["--steps", steps, "--lr", lr, "--seed", seed, "--draft-vocab-add", adds]
    command("training", "train", "--target", target, "--data", data, "--out", run, *settings, *begun)
    shutil.copytree(run / "latest", head, dirs_exist_ok=True)
    if reason := bundles.stale(target, head, tuned, dtype):
        print(f"export: {reason}; compiling {tuned}", flush=True)
        command("export", "--target", target, "--draft", head, "--out", tuned, "--dtype", dtype, "--no-parity")
    after = evaluate(tuned, files, kept=out / "after.json", **asked)
    rows = [
        {"name": b["name"], "temperature": b["temperature"], "prompts": b["prompts"], "before": b, "after": a}
        for b, a in zip(before, after, strict=True)
    ]
    result = {
        "prompts": prompts.name, "head": draft.name, "target": manifest["target"]["name"], "dtype": dtype,
        "trained": min(trained, answers or trained), "held_out": held,
        "before": vocabulary(data, draft, sizes[0]), "after": vocabulary(data, head, sizes[0]),
        "lacking": [(text_of(bundle, token), n) for token, n in covered(data, head)[1]],
        "settings": " ".join(map(str, settings)), "rows": rows,
    }  # fmt: skip
    write_result(out / "report.json", result)
    (out / "report.md").write_text(report(result), encoding="utf-8")
    console_for_tables().print(rich_table("Tokens a round, before and after", COLUMNS[:7], rows))
    held = [result[when]["coverage"] for when in ("before", "after")]
    print(f"the draft vocabulary held {held[0]:.2%} of the answers' tokens, now {held[1]:.2%}")
    print(f"report: {out}/report.md, the head: {head}")


def text_of(bundle: Path, token: int) -> str:
    """A token as text; its number where the bundle has no tokenizer."""
    from tokenizers import Tokenizer

    file = bundle / "tokenizer.json"
    return Tokenizer.from_file(str(file)).decode([token]) if file.is_file() else str(token)


if __name__ == "__main__":
    typer.run(main)

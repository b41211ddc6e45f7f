"""`python -m decoding`: decode prompts from a file, and check that speculation changes nothing."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

import engines
from engines import BundleError

from . import audit as audits
from .checks import as_json, show, verdict
from .compare import compare as compare_runs
from .generate import load_tokenizer, read_answers, run
from .loop import Loop
from .request import SamplingParams
from .schedule import for_engines

app = typer.Typer(help="Decoding with a bundle.", no_args_is_help=True, add_completion=False)

BundleOption = Annotated[Path, typer.Option("--bundle", help="Folder that holds manifest.json.")]


def _fail(error: Exception | str) -> typer.Exit:
    print(error, file=sys.stderr)
    return typer.Exit(1)


@app.command()
def generate(
    bundle: BundleOption,
    input: Annotated[
        Path, typer.Option("--input", help="JSONL: {prompt | messages | input_ids, id?, max_tokens?, ...}.")
    ],
    output: Annotated[Path, typer.Option("--output", help="JSONL, one line for each input line, in its order.")],
    schedule: Annotated[str, typer.Option(help="none, fixed, threshold, causal or lagged.")] = "lagged",
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Line i (from 0) without a seed of its own uses seed + i.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="New tokens a line may get at most.")] = 128,
    threshold: Annotated[Optional[float], typer.Option(help="Least confidence for --schedule threshold (0.5).")] = None,
    max_requests: Annotated[int, typer.Option(help="Requests decoded at once.")] = 16,
    token_budget: Annotated[int, typer.Option(help="Tokens of one target pass.")] = 512,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to max_tokens.")] = False,
    accept: Annotated[str, typer.Option(help="rejection or coupled, for lines that name neither.")] = "rejection",
    threads: Annotated[Optional[int], typer.Option(help="Threads of an engine; default: physical cores.")] = None,
    report: Annotated[Optional[Path], typer.Option(help="Write the run's metrics to this JSON file.")] = None,
) -> None:
    """Decodes every line of INPUT into OUTPUT. A line that is refused gives {"error": ...} and the others go on.

    Exit code 0, or 1 when the bundle or a file cannot be read, an option is out of range, or every line failed.
    """
    try:
        loaded = engines.load(bundle, threads=threads)
        scheduler = for_engines(loaded, schedule, threshold)
        loop = Loop(loaded, scheduler, max_requests=max_requests, token_budget=token_budget, accept=accept)
        tokenizer = load_tokenizer(loaded)
        defaults = SamplingParams(max_tokens, temperature, seed, ignore_eos)
        answers = read_answers(input, tokenizer, defaults)
        summary = run(loop, answers, output, tokenizer)
    except (BundleError, OSError, ValueError) as error:
        raise _fail(error) from None
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(
            json.dumps({"bundle": str(bundle), "schedule": schedule, "accept": accept, **summary}, indent=1) + "\n"
        )
    print(
        f"{summary['requests']} requests ({summary['refused']} failed), {summary['output_tokens']} tokens in "
        f"{summary['seconds']:.1f} s, {summary['tokens_per_second']:.1f} tok/s, acceptance length "
        f"{summary['acceptance_length']:.2f}, {summary['share_outside_engines']:.0%} of the time outside engines",
        file=sys.stderr,
    )
    if answers and summary["refused"] == len(answers):
        raise _fail(f"every line failed; the first: {answers[0].error}")


@app.command()
def compare(
    bundle: BundleOption,
    prompts: Annotated[Path, typer.Option(help="JSONL as for generate.")],
    batch: Annotated[str, typer.Option(help="Requests at once, several runs: 1,3,8.")] = "1,3,8",
    schedule: Annotated[str, typer.Option(help="fixed, threshold, causal or lagged.")] = "fixed",
    threshold: Annotated[Optional[float], typer.Option(help="Least confidence for --schedule threshold (0.5).")] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens of a prompt at most.")] = 64,
    limit: Annotated[int, typer.Option(help="Prompts taken from the file; 0 = all.")] = 0,
    near_tie: Annotated[
        float, typer.Option(help="A difference under this gap of the top two logits is a near-tie.")
    ] = 1e-4,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to max_tokens.")] = False,
    threads: Annotated[Optional[int], typer.Option(help="Threads of an engine; default: physical cores.")] = None,
    report: Annotated[Optional[Path], typer.Option(help="Write the result to this JSON file.")] = None,
) -> None:
    """Greedy decoding with the draft against the target alone, token for token, in batches of several sizes.

    Exit code 0 when every difference is a near-tie, else 1.
    """
    try:
        sizes = [int(size) for size in batch.split(",")]
        loaded = engines.load(bundle, threads=threads)
        defaults = SamplingParams(max_tokens, ignore_eos=ignore_eos)
        answers = read_answers(prompts, load_tokenizer(loaded), defaults)
        result = compare_runs(
            loaded, answers[: limit or None], sizes, for_engines(loaded, schedule, threshold), near_tie
        )
    except (BundleError, OSError, ValueError) as error:
        raise _fail(error) from None
    print(json.dumps(result, indent=1))
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps({"bundle": str(bundle), **result}, indent=1) + "\n")
    if result["different"]:
        raise _fail(f"{result['different']} outputs differ by more than a near-tie of {near_tie:g}.")


@app.command()
def record(
    bundle: BundleOption,
    output: Annotated[Path, typer.Option("--output", help="npz to write.")],
    prompts: Annotated[
        list[Path], typer.Option(help="JSONL with prompt, turns, messages or input_ids, and kind; may be given again.")
    ],
    temperature: Annotated[str, typer.Option(help="Each prompt is answered at each of these.")] = "0,1",
    max_tokens: Annotated[int, typer.Option(help="New tokens of an answer at most.")] = 128,
    requests: Annotated[int, typer.Option(help="Prompts taken, from the first; 0 = all.")] = 0,
    max_requests: Annotated[int, typer.Option(help="Requests decoded at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Request i uses seed + i.")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop after this time and keep the rounds; 0 = to the end.")] = 0.0,
    least: Annotated[int, typer.Option(help="Rounds before --minutes may stop it.")] = 0,
    threads: Annotated[Optional[int], typer.Option(help="Threads of an engine; default: physical cores.")] = None,
) -> None:
    """Records verify rounds (confidence logits, what was accepted) of the bundle's own answers, for calibration.

    Exit code 0, or 1 when the bundle, a prompt or an option does not fit: nothing is decoded then.
    """
    from .record import read_prompts, record

    try:
        try:
            temperatures = [float(t) for t in temperature.split(",")]
        except ValueError:
            raise ValueError(f"temperature is {temperature!r}; it must be numbers with commas.") from None
        loaded = engines.load(bundle, threads=threads)
        read = read_prompts(prompts, load_tokenizer(loaded))
        meta = record(
            loaded, read, output, temperatures=temperatures, max_tokens=max_tokens, requests=requests,
            max_requests=max_requests, seed=seed, minutes=minutes, least=least,
            command=shlex.join(["python", "-m", "decoding", *sys.argv[1:]]),
        )  # fmt: skip
    except (BundleError, OSError, ValueError) as error:
        raise _fail(error) from None
    print(
        f"{meta['rounds']:,} rounds in {meta['seconds']:.0f} s, {meta['finished']} of {meta['requests']} requests ended, "
        f"acceptance length {meta['acceptance_length']:.2f}: {output}",
        file=sys.stderr,
    )


@app.command()
def audit(
    bundle: BundleOption,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts, batches and samples.")] = False,
    schedules: Annotated[Optional[str], typer.Option(help="fixed,lagged, ...; default: all the bundle allows.")] = None,
    requests: Annotated[Optional[str], typer.Option(help="Requests at once in the equality checks: 1,4,8.")] = None,
    prompts: Annotated[Optional[Path], typer.Option(help="JSONL as for generate; default: built in.")] = None,
    threads: Annotated[Optional[int], typer.Option(help="Threads of an engine; default: physical cores.")] = None,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", help="Write every check's figures to this file.")
    ] = None,
) -> None:
    """Does any schedule change what the target says? Greedy and seeded equality, sampled tokens against the target.

    Exit code 0 when no check failed, 1 when one did, 2 when the audit could not run.
    """
    try:
        loaded = engines.load(bundle, threads=threads)
        effort = audits.QUICK if quick else audits.Effort()
        if requests is not None:
            effort = replace(effort, batches=_numbers("--requests", requests))
        tokenizer = load_tokenizer(loaded)
        answers = (
            read_answers(prompts, tokenizer, SamplingParams(1))
            if prompts
            else audits.default_answers(loaded, tokenizer)
        )
        names = tuple(name.strip() for name in schedules.split(",")) if schedules is not None else None
        checks = []
        for check in audits.audit(loaded, answers, names, effort):
            checks.append(check)
            show(check)
    except (BundleError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    ok, sentence = verdict(checks)
    print(sentence)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"bundle": str(bundle), **as_json(checks)}, indent=1) + "\n")
    raise typer.Exit(0 if ok else 1)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """1,4,8 as numbers of 1 or more. Raises ValueError."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise ValueError(f"{option} is {text!r}; it must be numbers of 1 or more with commas between them.")
    return numbers


if __name__ == "__main__":
    app()

"""`python -m client "prompt" --stream`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import Chunk, Client, ClientError


def main(
    prompt: Annotated[str, typer.Argument(help="The user's message; leave it out with --messages.")] = "",
    url: Annotated[str, typer.Option(help="host:port of the server's gRPC endpoint.")] = "127.0.0.1:8001",
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    messages: Annotated[Path | None, typer.Option(help="JSON file: a list of {role, content}.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens at most (the server's default: 256).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (the server's default).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the tokens that hold this much probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least probability, as a share of the highest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: tokens of prompt and output less.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Above 0: output tokens again less.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, once for each time it came.")] = None,
    logit_bias: Annotated[str | None, typer.Option(help='JSON: {"token id": bias}.')] = None,
    bad: Annotated[list[str] | None, typer.Option(help="Never write this word; may be given more than once.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="No end of the answer before so many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the randomness; what it fixes depends on --accept.")] = None,
    accept: Annotated[str | None, typer.Option(help="rejection, or coupled: a seed fixes the text.")] = None,
    threshold: Annotated[float | None, typer.Option(help="For a server that schedules by threshold.")] = None,
    log_probs: Annotated[bool, typer.Option("--log-probs", help="The answer's log probability, on stderr.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given more than once.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Decode on to max_tokens.")] = False,
    speculative: Annotated[bool, typer.Option("--speculative/--no-speculative", help="Off: the target alone.")] = True,
    timeout: Annotated[float, typer.Option(help="Seconds the whole answer may take.")] = 600.0,
) -> None:
    """Ask a served model. The text goes to stdout, one line of statistics to stderr."""
    parameters = dict(max_tokens=max_tokens, temperature=temperature, seed=seed, stop_words=stop or None)
    parameters |= dict(top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    parameters |= dict(presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, logit_bias=logit_bias)
    parameters |= dict(bad_words=bad or None, min_tokens=min_tokens, accept=accept, threshold=threshold)
    parameters |= dict(return_log_probs=log_probs or None)
    parameters |= dict(raw=raw or None, ignore_eos=ignore_eos or None, speculative=None if speculative else False)
    client = Client(url, timeout=timeout)
    try:
        what = prompt if messages is None else _read(messages, prompt)
        if stream:
            last = None
            with client.stream(what, **parameters) as chunks:
                for last in chunks:
                    print(last.text, end="", flush=True)
        else:
            last = client.generate(what, **parameters)
            print(last.text, end="")
        print()
        print(statistics(last, log_probs), file=sys.stderr)
    except ClientError as error:
        print(f"client: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nclient: cancelled", file=sys.stderr)
        raise SystemExit(130) from None


def statistics(chunk: Chunk | None, log_probs: bool = False) -> str:
    """One line about a finished request."""
    if chunk is None:
        return "no answer"
    parts = [f"{chunk.finish_reason}", f"{chunk.num_input_tokens} tokens in", f"{chunk.num_output_tokens} out"]
    if chunk.total_draft_tokens:
        accepted = f"{chunk.total_accepted_draft_tokens} of {chunk.total_draft_tokens} draft tokens accepted"
        length = 1 + chunk.total_accepted_draft_tokens / chunk.num_rounds
        accepted += f" ({chunk.acceptance_rate:.0%})"
        parts += [f"{chunk.num_rounds} rounds", accepted, f"{length:.2f} tokens a round"]
    if log_probs:
        parts.append(f"log probability {chunk.cum_log_probs:.3f}")
    return " | ".join(parts)


def _read(file: Path, prompt: str) -> list[dict]:
    """Messages from a file. Raises ClientError."""
    if prompt:
        raise ClientError("Give a prompt or --messages, not both.")
    try:
        messages = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClientError(f"{file} cannot be read as JSON: {error}.") from None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ClientError(f"{file} must hold a JSON list of at least one {{role, content}} object.")
    return messages


if __name__ == "__main__":
    typer.run(main)

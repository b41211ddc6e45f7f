"""Who answers: an OpenAI-compatible server, the project's own compiled engines, or the logs themselves.

Knows: how each is asked, and how its answer becomes token ids. Refuses to know: where prompts come from, shards.

Every way is a generator of (job, answer tokens with the end token where the answer ended): training/sampling.py's own
sampler is the fourth of them. A job that got no answer is left out with a warning, and a later run asks it again.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from training.sampling import ChatTokens, Job
from training.sources import Chat

PATIENCE = (1.0, 4.0, 15.0, 60.0)  # seconds before the next try of a server that is busy or away
TIMEOUT = 900.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asking:
    """What a job does not say. seed: a job's own is seed + index; None sends none (servers that cannot take one)."""

    seed: int | None = 0
    top_p: float = 1.0
    top_k: int = 0
    thinking: bool | None = None


@dataclass(frozen=True)
class Server:
    """url: up to /v1. api: "chat" (messages, the server's own template) or "completions" (token ids, our template)."""

    url: str
    model: str
    api: str = "chat"
    key: str | None = None
    concurrency: int = 8

    def __post_init__(self) -> None:
        if self.api not in ("chat", "completions"):
            raise ValueError(f"api is {self.api!r}; it must be chat or completions.")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; it must begin with http:// or https://.")
        if self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}; it must be 1 or more.")

    def post(self, body: dict) -> dict:
        """One request, tried again while the server is busy (429, 5xx) or away. Raises ValueError in one sentence."""
        path = "/chat/completions" if self.api == "chat" else "/completions"
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(self.url.rstrip("/") + path, json.dumps(body).encode(), headers)
        for delay in (*PATIENCE, None):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {error.read(300).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    raise ValueError(f"{self.url} refused a request ({reason}).") from None
            except (OSError, ValueError) as error:  # away, cut off, or not JSON
                reason = str(error)
            if delay is not None:
                time.sleep(delay)
        raise ValueError(f"{self.url} gave no answer in {len(PATIENCE) + 1} tries ({reason}).")


def from_server(
    server: Server, jobs: Iterable[Job], chats: dict[int, Chat], tokens: ChatTokens, asking: Asking
) -> Iterator[tuple[Job, np.ndarray]]:
    """Answers in the order in which they come, `concurrency` at a time. chats: by a job's index.

    An answer's ids are the server's where it sends `token_ids`, else its text through the target's tokenizer. Raises
        ValueError when the first `concurrency` jobs all fail: then it is the server, not a prompt."""

    def ask(job: Job) -> tuple[Job, np.ndarray | ValueError]:
        try:
            return job, _tokens(server.post(_body(server, job, chats[job.index], asking)), tokens)
        except ValueError as error:
            return job, error

    jobs, answered, failed = iter(jobs), 0, 0
    with ThreadPoolExecutor(server.concurrency) as pool:
        running = {pool.submit(ask, job) for job in islice(jobs, server.concurrency)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job, answer = future.result()
                if isinstance(answer, ValueError):
                    failed += 1
                    if not answered and failed >= server.concurrency:
                        raise answer
                    log.warning("prompt %d left out: %s", job.index, answer)
                else:
                    answered += 1
                    yield job, answer
                running |= {pool.submit(ask, job) for job in islice(jobs, 1)}


def _body(server: Server, job: Job, chat: Chat, asking: Asking) -> dict:
    body = {
        "model": server.model, "max_tokens": job.max_new, "temperature": job.temperature, "top_p": asking.top_p,
    }  # fmt: skip
    if asking.seed is not None:
        body["seed"] = asking.seed + job.index
    if asking.top_k:
        body["top_k"] = asking.top_k
    if server.api == "completions":
        return body | {"prompt": job.tokens, "return_token_ids": True}  # vLLM's word for it
    if asking.thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": asking.thinking}
    return body | {"messages": [{"role": role, "content": text} for role, text in chat.messages]}


def _tokens(reply: object, tokens: ChatTokens) -> np.ndarray:
    """Answer ids of an OpenAI reply. Raises ValueError in one sentence for one without an answer."""
    try:
        choice = reply["choices"][0]
        ids, ended = choice.get("token_ids"), choice.get("finish_reason") == "stop"
        if ids is None:
            message = choice.get("message") or {"content": choice.get("text")}
            thought = message.get("reasoning_content")
            text = (f"<think>\n{thought}\n</think>\n\n" if thought else "") + (message.get("content") or "")
            ids = tokens.encode(text) if text else []
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"the server's reply has no choices[0] ({str(reply)[:120]}).") from None
    if not ids:
        raise ValueError("the server's answer is empty.")
    if ended and ids[-1] != tokens.eos:
        ids = [*ids, tokens.eos]
    return np.asarray(ids, np.int32)


def from_engines(
    bundle: Path, target_hash: str, jobs: Iterable[Job], asking: Asking, *, at_once: int = 128, requests: int = 16
) -> Iterator[tuple[Job, np.ndarray]]:
    """Answers by the compiled engines of a bundle: `python -m decoding generate` on at_once prompts at a time, as token
    ids both ways, by the default schedule where the bundle was profiled, else with whole blocks (exact both).

    Raises ValueError for a bundle of another target, and with the command's own words when it fails."""
    manifest = bundle / "manifest.json"
    if not manifest.is_file():
        raise ValueError(f"{bundle} is no bundle: it holds no manifest.json.")
    raw = json.loads(manifest.read_text(encoding="utf-8"))
    if raw["target"]["hash"] != target_hash:
        raise ValueError(f"{bundle} was exported from another target ({raw['target']['name']}), which may not answer here.")
    schedule = "lagged" if raw.get("sps") else "fixed"
    jobs = iter(jobs)
    while group := list(islice(jobs, at_once)):
        with TemporaryDirectory() as folder:
            asked, answered = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
            asked.write_text("".join(json.dumps(_line(job, asking)) + "\n" for job in group))
            command = [sys.executable, "-m", "decoding", "generate", "--bundle", str(bundle), "--input", str(asked)]
            command += ["--output", str(answered), "--max-requests", str(requests), "--schedule", schedule]
            done = subprocess.run(command, capture_output=True, text=True)
            if not answered.is_file():
                said = done.stderr.strip().splitlines() or ["nothing"]
                raise ValueError(f"`python -m decoding generate` failed: {said[-1]}")
            lines = {line["id"]: line for line in map(json.loads, answered.read_text().splitlines())}
        for job in group:
            line = lines[job.index]
            if "error" in line:
                log.warning("prompt %d left out: %s", job.index, line["error"])
            else:
                yield job, np.asarray(line["output_ids"], np.int32)


def _line(job: Job, asking: Asking) -> dict:
    return {
        "id": job.index, "input_ids": job.tokens, "max_tokens": job.max_new, "temperature": job.temperature,
        "seed": (asking.seed or 0) + job.index, "top_p": asking.top_p, "top_k": asking.top_k,
    }  # fmt: skip


def from_logs(jobs: Iterable[Job], chats: dict[int, Chat], tokens: ChatTokens) -> Iterator[tuple[Job, np.ndarray]]:
    """The answers that the logs hold: only right where the target wrote them."""
    for job in jobs:
        answer = chats[job.index].answer
        if answer is None:
            log.warning("prompt %d left out: a chat with no assistant turn.", job.index)
            continue
        yield job, np.asarray([*tokens.encode(answer)[: job.max_new - 1], tokens.eos], np.int32)

"""A tiny bundle with a byte-level tokenizer, a real server that serves it, and the same bundle decoded in process."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import engines
from decoding.chat import ChatTokenizer
from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from decoding.schedule import make
from export.__main__ import export
from tests.tiny import make_draft, make_target
from triton_repo import control
from triton_repo.families import REASONS
from triton_repo.metrics import PERIOD_SECONDS
from triton_repo.placement import Placement
from triton_repo.repository import Settings
from triton_repo.runtime import Ports
from triton_repo.server import TritonServer

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2
CONTEXT = 4096
SLOTS = 4
LINES = (
    "你好，世界。",
    "日本語のテキスト",
    "🙂🚀👩‍👩‍👧 emoji",
    "Привет, мир",
    "naïve café",
    "the quick brown fox jumps over the lazy dog",
)
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the role ' + m['role'] + ' is not known') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(folder: Path, size: int) -> int:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja; returns the vocabulary's size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(s, special=True) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[END]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return tokenizer.get_vocab_size()


def make_bundle(folder: Path) -> Path:
    """folder/tiny: a random Llama whose tokens are pieces of UTF-8, so that its text splits characters all the time."""
    torch.set_num_threads(1)
    made = folder / "tokenizer"
    made.mkdir(parents=True)
    vocab = make_tokenizer(made, 352)
    target = make_target(folder / "target", vocab=vocab, eos=END)
    for file in made.iterdir():
        shutil.copy(file, target)
    raw = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": CONTEXT}))
    draft = make_draft(folder / "draft", target, draft_vocab=300, rank=32)
    export(target, draft, folder / "tiny", max_context=CONTEXT, console=Console(file=io.StringIO()))
    return folder / "tiny"


class Alone:
    """The bundle in process: one request at a time, so nothing else can touch its tokens."""

    def __init__(self, bundle: Path):
        self.engines = engines.load(bundle, threads=1)
        self.chat = ChatTokenizer(bundle)

    def decode(self, prompt: str, *, schedule: str = "fixed", **params) -> list[int]:
        """Token ids after the user's message `prompt`."""
        return self.answer(prompt, schedule=schedule, **params)[0]

    def answer(self, prompt: str, *, schedule: str = "fixed", **params) -> tuple[list[int], list[float]]:
        """(token ids, their log-probs) after the user's message `prompt`."""
        loop = Loop(self.engines, make(schedule), max_requests=1)
        ids = tuple(self.chat.encode_messages([{"role": "user", "content": prompt}]))
        loop.add(Request(0, ids, SamplingParams(**{"max_tokens": 32, **params})))
        ids, log_probs = [], []
        while loop.has_work:
            for output in loop.step():
                assert output.finish_reason != "error", output.error
                ids += output.token_ids
                log_probs += output.log_probs or ()
        return ids, log_probs

    def text(self, ids: list[int]) -> str:
        return self.chat.tokenizer.decode(ids)


class Shared:
    """One bundle and one server for all test folders that ask; gone when the last has given them back."""

    def __init__(self) -> None:
        self.users, self.folder, self.server = 0, None, None

    def acquire(self) -> "Shared":
        if not self.users:
            self.folder = Path(tempfile.mkdtemp(prefix="triton-tests-"))
            self.bundle = make_bundle(self.folder)
        self.users += 1
        return self

    def serve(self) -> TritonServer:
        if self.server is None:
            self.server = tiny_server(self.bundle, self.folder / "build").start()
        return self.server

    def release(self) -> None:
        self.users -= 1
        if not self.users:
            died = "" if self.server is None or self.server.alive else last_words(self.server)
            if self.server is not None:
                self.server.stop()
            shutil.rmtree(self.folder, ignore_errors=True)
            assert not died, died


SHARED = Shared()


def last_words(server: TritonServer, lines: int = 60) -> str:
    """Of a server that has died: how, and the end of its log."""
    said = server.log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"tritonserver ended with code {server.process.returncode}; the end of its log:", *said])


def tiny_server(bundle: Path, build_dir: Path, placement: Placement = Placement(), **settings) -> TritonServer:
    """Free ports, one thread, four slots, blocks of fixed length (a seed then fixes a rejection request's text)."""
    said: list[str] = []
    settings = Settings(**{"threads": 1, "max_requests": SLOTS, "schedule": "fixed", "response_ms": 0, **settings})
    where = dict(placement=placement, ports=Ports(0, 0, 0), build_dir=build_dir)
    server = TritonServer(bundle, settings=settings, **where, say=said.append)
    server.said = said
    return server


def wait_until(condition, what: str, seconds: float = 60.0):
    """Polls; the bound is only there so that a broken server fails a test and does not hang it."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.02)
    return value


def in_flight(server: TritonServer) -> int:
    return control.counts(server.grpc_url, timeout=60)[0]


def settled_metrics(server: TritonServer) -> dict[str, float]:
    """The metrics of an idle server: what happened before is handed on within PERIOD_SECONDS."""
    wait_until(lambda: in_flight(server) == 0, "an idle server")
    time.sleep(PERIOD_SECONDS + 0.15)
    return control.metrics(server.metrics_url)


def emitted(server: TritonServer) -> int:
    """Tokens decoded since the server's start."""
    return int(settled_metrics(server)["dspark_emitted_tokens_total"])


def ended(server: TritonServer) -> dict[str, float]:
    """Requests that have ended since the server's start, by finish reason."""
    metrics = settled_metrics(server)
    return {reason: metrics[f'dspark_requests_total{{finish_reason="{reason}"}}'] for reason in REASONS}


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)

"""Two processes (gloo) train what one does; what ranks share and put together again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_target
from tests.training.answered import SETTINGS, SHAPE
from training.checkpoint import load_draft
from training.initialisation import new_draft
from training.ranks import Ranks
from training.target import TargetModel
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(sequences, tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "sequences.pt"
    torch.save(sequences, file)
    return file


def torchrun(
    processes: int, *arguments: object, again: bool = False, **settings: object
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SETTINGS": json.dumps(settings)}
    environment |= {"AGAIN": "1"} if again else {}
    return subprocess.run(
        [*command, "-m", "tests.training.one_rank", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def ranks_of(said: str) -> list[str]:
    return sorted(line for line in said.splitlines() if line.startswith("rank"))


@pytest.fixture(scope="module")
def alone(target, sequences, tmp_path_factory):
    """A run of one process."""
    settings = replace(SETTINGS, batches_per_step=3, ema=0.7)
    out = tmp_path_factory.mktemp("one")
    one = Trainer(target, new_draft(target, sequences, SHAPE, 1), lambda: sequences, out, settings)
    one.run()
    return one


def same_run(alone: Trainer, out: Path) -> None:
    """The loss curve within 1e-5, and what the folder holds, is that of one process."""
    ours, theirs = lines(alone.out), lines(out)
    assert len(ours) == len(theirs) == 12 and ours[-1]["total"] < ours[0]["total"]
    for a, b in zip(ours, theirs):
        assert (a["step"], a["blocks"], a["tokens"]) == (b["step"], b["blocks"], b["tokens"])
        for name in ("total", "ce", "l1", "confidence", "tau"):
            assert abs(a[name] - b[name]) <= 1.01e-5, (a["step"], name)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=2e-4)
    for name in ("held_out", "held_out_ema"):
        assert theirs[-1][name]["total"] == pytest.approx(ours[-1][name]["total"], abs=2e-5)
    one, two = (torch.load(folder / "state.pt", weights_only=True) for folder in (alone.out, out))
    for part in ("draft", "ema"):
        assert one[part].keys() == two[part].keys()
        for name, value in two[part].items():
            torch.testing.assert_close(value, one[part][name], atol=2e-5, rtol=1e-4)
    for name in ("latest", "latest-ema"):
        one, two = (load_file(folder / name / "model.safetensors") for folder in (alone.out, out))
        assert one.keys() == two.keys() and all(one[k].shape == two[k].shape for k in one)


def kept(said: str) -> list[tuple[int, int]]:
    return [tuple(map(int, found)) for found in re.findall(r"kept: (\d+) of (\d+)", said)]


def test_two_processes_have_the_loss_curve_of_one(alone, data, tmp_path):
    """Three batches a step: the last of them finds one process without a share in some steps."""
    folder = make_target(tmp_path / "target", vocab=64, layers=3)
    done = torchrun(2, folder, data, tmp_path / "two", ema=0.7)
    assert done.returncode == 0, done.stderr[:6000]
    assert ranks_of(done.stdout) == ["rank 0: 12 steps", "rank 1: 12 steps"]
    assert all(mine == every for mine, every in kept(done.stdout))
    assert done.stdout.count("left behind: []") == 2, "a thread of gloo that gives back a tensor while Python ends aborts it"
    same_run(alone, tmp_path / "two")


def test_sharded_weights_give_the_same_run_across_a_stop(alone, data, tmp_path):
    """FSDP2: stopped after step 5 and resumed; each process keeps half of the optimiser's state."""
    folder = make_target(tmp_path / "target", vocab=64, layers=3)
    done = torchrun(2, folder, data, tmp_path / "two", 5, again=True, sharding="fsdp2", ema=0.7)
    assert done.returncode == 0, done.stderr[:6000]
    assert ranks_of(done.stdout) == [f"rank {r}: {steps} steps" for r in (0, 1) for steps in (12, 5)]
    assert len(kept(done.stdout)) == 2 and all(0.4 < mine / every < 0.6 for mine, every in kept(done.stdout))
    same_run(alone, tmp_path / "two")


def test_one_process_that_is_told_to_stop_stops_all_and_the_run_is_saved(sequences, data, tmp_path):
    folder = make_target(tmp_path / "target", vocab=64, layers=3)
    done = torchrun(2, folder, data, tmp_path / "run", 5)
    assert done.returncode == 0, done.stderr[:6000]
    assert ranks_of(done.stdout) == ["rank 0: 5 steps", "rank 1: 5 steps"]
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["progress"]["step"] == 5


def test_a_run_that_is_killed_goes_on_to_the_same_bits(data, tmp_path):
    """kill -9 in the middle of step 5 or of the save before it; what was saved last is whole, and enough."""
    folder = make_target(tmp_path / "target", vocab=64, layers=3)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = lambda out: [sys.executable, "-m", "tests.training.one_rank", str(folder), str(data), str(tmp_path / out)]
    whole = subprocess.run(command("whole"), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert whole.returncode == 0, whole.stderr[-2000:]
    with subprocess.Popen(command("cut"), cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line == "step 4\n":
                run.kill()
    assert run.returncode == -9
    at = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["progress"]["step"]
    assert 3 <= at < 12
    rest = subprocess.run(command("cut"), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert f"step {at + 1}\n" in rest.stdout and f"step {at}\n" not in rest.stdout and ranks_of(rest.stdout)
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True)["draft"] for name in ("whole", "cut")]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert not list((tmp_path / "cut").glob("*.part"))


def test_a_full_disk_costs_checkpoints_not_the_run_and_sigterm_saves(data, tmp_path):
    """Files cannot grow from step 4 to step 7: nothing is saved in between, all is made up for, then SIGTERM ends it."""
    folder, out = make_target(tmp_path / "target", vocab=64, layers=3), tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FULL": "4-7"}
    environment["SETTINGS"] = '{"steps": 4000}'
    command = [sys.executable, "-m", "tests.training.one_rank", str(folder), str(data), str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as run:
        for line in run.stdout:
            if line == "step 7\n":  # what was saved after step 3 is still there: nothing else could be written
                run.send_signal(signal.SIGSTOP)
                during = torch.load(out / "state.pt", weights_only=True)["progress"]["step"]
                latest = load_draft(out / "latest", folder)
                run.send_signal(signal.SIGCONT)
            if line == "step 9\n":
                run.send_signal(signal.SIGTERM)
        said = run.stderr.read()
    assert run.returncode == 0, said
    sentence = r"step (\d+): .*run could not be saved \(File too large\); what was saved before is whole\."
    sentence += r" The run goes on and tries again\."
    assert [int(re.fullmatch(sentence, line)[1]) for line in said.splitlines() if "could not" in line] == [4, 5, 6]
    assert latest.config.block_size == SHAPE.block_size and during in (3, 7)
    at = torch.load(out / "state.pt", weights_only=True)["progress"]["step"]
    assert 9 <= at < 4000 and [line["step"] for line in lines(out)] == list(range(1, at + 1))
    assert not list(out.rglob("*.part"))


def test_more_processes_than_batches_a_step_is_an_error(target, sequences, tmp_path):
    with pytest.raises(ValueError, match="batches_per_step is 2; it must be at least the 3 processes of the run"):
        draft = new_draft(target, sequences, SHAPE, 1)
        Trainer(target, draft, lambda: sequences, tmp_path, SETTINGS, Ranks(0, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence():
    with pytest.raises(ValueError, match="^device is 'cuda'; process 0 of this machine finds 0 GPUs.$"):
        Ranks.join("cuda")


class Together(Ranks):
    """Ranks whose gather is played: what every rank holds is given."""

    def gather(self, mine):
        return self.parts


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_shares_are_joined_in_the_order_of_the_whole(count):
    items, size = list(range(count)), 3
    ranks = [Together(r, size) for r in range(size)]
    parts = [r.share(items) for r in ranks]
    assert sorted(sum(parts, [])) == items
    for r in ranks:
        r.parts = parts
        assert r.joined(r.share(items)) == items


def test_alone_everything_is_what_it_was():
    alone, x = Ranks(), torch.ones(2)
    assert alone.first and alone.share([1, 2]) == [1, 2] and alone.joined([3]) == [3] and alone.gather(4) == [4]
    assert alone.from_first(lambda: 5) == 5 and alone.total([x, None], [x, x]) == [x, None]

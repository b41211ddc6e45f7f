"""Two processes (gloo) train what one does; what ranks share and put together again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import make_target
from tests.training.answered import SETTINGS, SHAPE
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


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "tests.training.one_rank", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def ranks_of(said: str) -> list[str]:
    return sorted(line for line in said.splitlines() if line.startswith("rank"))


def test_two_processes_have_the_loss_curve_of_one(target, sequences, data, tmp_path):
    """Three batches a step: the last of them finds one process without a share in some steps."""
    folder = make_target(tmp_path / "target", vocab=64, layers=3)
    done = torchrun(2, folder, data, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert ranks_of(done.stdout) == ["rank 0: 12 steps", "rank 1: 12 steps"]
    alone = TargetModel.from_pretrained(folder, (0, 1))
    settings = replace(SETTINGS, batches_per_step=3)
    one = Trainer(alone, new_draft(alone, sequences, SHAPE, 1), lambda: sequences, tmp_path / "one", settings)
    one.run()
    ours, theirs = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(ours) == len(theirs) == 12 and ours[-1]["total"] < ours[0]["total"]
    for a, b in zip(ours, theirs):
        assert (a["step"], a["blocks"], a["tokens"]) == (b["step"], b["blocks"], b["tokens"])
        for name in ("total", "ce", "l1", "confidence", "tau"):
            assert abs(a[name] - b[name]) <= 1.01e-5, (a["step"], name)
    assert theirs[-1]["held_out"]["total"] == pytest.approx(ours[-1]["held_out"]["total"], abs=2e-5)
    state = torch.load(tmp_path / "two" / "state.pt", weights_only=True)["draft"]
    for name, value in state.items():
        torch.testing.assert_close(value, one.draft.state_dict()[name], atol=2e-5, rtol=1e-4)


def test_one_process_that_is_told_to_stop_stops_all_and_the_run_is_saved(sequences, data, tmp_path):
    folder = make_target(tmp_path / "target", vocab=64, layers=3)
    done = torchrun(2, folder, data, tmp_path / "run", 5)
    assert done.returncode == 0, done.stderr[-2000:]
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


def test_more_processes_than_batches_a_step_is_an_error(target, sequences, tmp_path):
    with pytest.raises(ValueError, match="batches_per_step is 2; it must be at least the 3 processes of the run"):
        draft = new_draft(target, sequences, SHAPE, 1)
        Trainer(target, draft, lambda: sequences, tmp_path, SETTINGS, Ranks(0, 3))


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

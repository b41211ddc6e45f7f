"""log.jsonl, and TensorBoard's events beside it."""

import builtins
import json

import pytest

from training.run_log import RunLog, scalars

HELD_OUT = {"tau": 1.5, "greedy_tau": None}
LINE = {"step": 3, "total": 0.5, "acceptance": [0.5, 0.25], "held_out": HELD_OUT, "disk": {"tokens": 8}}


def test_a_line_becomes_curves():
    assert scalars(LINE) == [
        ("total", 0.5), ("acceptance/0", 0.5), ("acceptance/1", 0.25), ("held_out/tau", 1.5), ("disk/tokens", 8.0),
    ]  # fmt: skip
    assert scalars({"step": 1, "held_out": {}}) == []


def test_lines_are_appended(tmp_path):
    for step in (1, 2):
        log = RunLog(tmp_path, step=step - 1)
        log.write({"step": step})
        log.close()
    assert [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()] == [{"step": 1}, {"step": 2}]
    assert [f.name for f in tmp_path.iterdir()] == ["log.jsonl"]


def test_another_rank_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, tensorboard=True)
    log.write(LINE)
    log.close()
    assert not list(tmp_path.iterdir())


class Narrow:
    """A file on a disk with `room` bytes left."""

    def __init__(self, room):
        self.room, self.held = room, b""

    def write(self, data):
        taken = data[: self.room]
        if not taken:
            raise OSError(28, "No space left on device")
        self.held, self.room = self.held + taken, self.room - len(taken)
        return len(taken)


def test_lines_that_find_no_room_wait_and_none_is_lost_or_doubled(tmp_path):
    log = RunLog(tmp_path)
    log.file.close()
    log.file = Narrow(15)
    for step in (1, 2, 3):
        log.write({"step": step})
    assert log.file.held == b'{"step": 1}\n{"s'
    log.file.room = 1000
    log.write({"step": 4})
    assert [json.loads(x)["step"] for x in log.file.held.splitlines()] == [1, 2, 3, 4]


def test_tensorboard_reads_the_numbers_and_a_resumed_run_replaces_what_came_after_its_step(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, steps in (0, (1, 2, 3)), (2, (3, 4)):
        log = RunLog(tmp_path, True, first)
        for step in steps:
            log.write({"step": step, "total": step + 10.0 * first, "held_out": {"tau": 1.5}})
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("total")] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]
    assert {e.value for e in events.Scalars("held_out/tau")} == {1.5}


def test_without_the_package_it_is_one_sentence(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_board(name, *rest):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_board)
    with pytest.raises(ValueError, match=r"pip install 'dspark-triton\[tensorboard\]'\.$"):
        RunLog(tmp_path, tensorboard=True)

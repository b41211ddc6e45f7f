"""state.pt: what was there survives a write that fails; what is damaged is named in one sentence."""

import pytest
import torch

from training.run_state import NotSaved, read_run, write_run

STATE = {"draft": {"w": torch.arange(4.0)}, "optimizer": {}, "progress": {"step": 3}, "settings": {"seed": 1}}


def test_a_state_comes_back(tmp_path):
    write_run(tmp_path, STATE, lambda: None)
    read = read_run(tmp_path)
    assert read["progress"] == {"step": 3} and torch.equal(read["draft"]["w"], STATE["draft"]["w"])
    assert [f.name for f in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed\nat ...")])
def test_a_write_that_fails_leaves_what_was_there(error, tmp_path):
    write_run(tmp_path, STATE, lambda: None)

    def fail():
        (tmp_path / "latest").mkdir()
        (tmp_path / "latest" / "model.safetensors.part").write_bytes(b"half")
        raise error

    with pytest.raises(NotSaved, match=r"(No space left on device|write failed)\); what was saved before is whole\.$"):
        write_run(tmp_path, {**STATE, "progress": {"step": 4}}, fail)
    assert read_run(tmp_path)["progress"] == {"step": 3} and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "harm",
    [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"hello" * 9, lambda d: d[:200] + b"\0" * 300 + d[500:]],
)
def test_a_damaged_state_is_one_sentence(harm, tmp_path):
    write_run(tmp_path, STATE, lambda: None)
    file = tmp_path / "state.pt"
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(ValueError, match=r"state\.pt is corrupt .*--init\.$") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_something_else_is_refused(tmp_path):
    torch.save({"draft": {}}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="holds something else"):
        read_run(tmp_path)

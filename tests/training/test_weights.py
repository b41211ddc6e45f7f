"""Reading and loading of tensors: several files, and every way in which a file does not fit."""

import pytest
import torch
from safetensors.torch import save_file

from training.weights import load_exactly, read_safetensors


def test_tensors_of_all_files_are_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    assert {name: t.tolist() for name, t in read_safetensors(tmp_path).items()} == {"a": [1, 1], "b": [0, 0, 0]}


def test_a_folder_without_any_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no"):
        read_safetensors(tmp_path)


def test_an_exact_fit_is_loaded():
    layer = torch.nn.Linear(3, 2)
    load_exactly(layer, {"weight": torch.full((2, 3), 5.0), "bias": torch.ones(2)}, "here")
    assert layer.weight.tolist() == [[5.0] * 3] * 2 and layer.bias.tolist() == [1, 1]


@pytest.mark.parametrize(
    "state, words",
    [
        ({"weight": torch.ones(2, 3)}, "here does not fit: missing bias."),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "odd": torch.ones(1)}, "unused odd"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, r"weight is \[3, 2\], expected \[2, 3\]"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(state, words):
    layer = torch.nn.Linear(3, 2)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=words):
        load_exactly(layer, state, "here")
    assert torch.equal(layer.weight, before)

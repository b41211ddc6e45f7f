"""On the fly against the cached recipe: the arithmetic of the table, and that the cache holds what the target said."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from benchmarks.cached_recipe import CachedPass
from benchmarks.training import COLUMNS, said, summary
from tests.tiny import make_target
from tests.training.answered import Answered
from training.data import TargetPass, make_batches
from training.feature_files import cached_recipe_bytes
from training.target import TargetModel


def test_the_cache_gives_back_what_the_target_said_and_takes_the_references_bytes(tmp_path):
    target = TargetModel.from_pretrained(make_target(tmp_path / "t"), (0, 1), torch.bfloat16)
    g = np.random.default_rng(0)
    sequences = [Answered(g.integers(4, 64, n), 3) for n in (9, 14, 20, 21)]
    batches = make_batches(sequences, 40, 64)
    assert len(batches) > 1
    own = TargetPass(target, torch.arange(0, 64, 2), 0)
    cache = CachedPass(tmp_path / "cache")
    with ThreadPoolExecutor(2) as workers:
        written = cache.write(own, batches, workers)
    for batch in batches:
        a, b = own(batch), cache(batch)
        inside = torch.arange(batch.tokens.shape[1]) < torch.tensor(batch.lengths)[:, None]
        for name, tensor in a.tensors().items():
            kept = b.tensors()[name]
            assert torch.equal(tensor[inside], kept[inside]) and tensor.dtype == kept.dtype, name
    lengths = [n for batch in batches for n in batch.lengths]
    formula = cached_recipe_bytes(lengths, 32, 2) - 56 * len(lengths) + 4 * sum(lengths)  # no index; `outside`
    assert 0 <= written - formula < 700 * len(lengths)  # each file's header


def measured(cache: float, epoch: float, peak: float, disk: int) -> dict:
    seconds = {"cache_seconds": cache, "epoch_seconds": epoch}
    return {"tokens": 100, **seconds, "peak_mb": peak, "disk_bytes": disk, "loss": 1.5}


def test_ratios_are_to_the_cached_recipe():
    fly = "on the fly, nothing kept"
    rows = summary({"cached recipe": [measured(4, 2, 100, 1000)], fly: [measured(0, 5, 150, 5)]}, epochs=2)
    base, ours = rows
    assert base["tokens_per_second"] == 25 and ours["tokens_per_second"] == 20
    assert base["ratio"] == base["peak_ratio"] == 1
    assert ours["ratio"] == pytest.approx(0.8)
    assert ours["peak_ratio"] == 1.5 and ours["disk_ratio"] == 0.005
    text, table = said(
        {"target": "t", "sequences": 3, "tokens": 100, "epochs": 2, "repeats": 1, "rows": rows}
    )
    assert "the same last loss" in text and "0.50%" in table and len(table.splitlines()) == 4
    rows[1]["loss"] = 1.6
    assert "losses that differ" in said(
        {"target": "t", "sequences": 3, "tokens": 100, "epochs": 2, "repeats": 1, "rows": rows}
    )[0]
    assert all(cell(ours) for _, cell in COLUMNS)

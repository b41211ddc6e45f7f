"""One process of a run: TARGET SEQUENCES OUT [STEP at which the last rank is told to stop]. It saves after every step, and
goes on with what OUT holds."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.training.answered import SETTINGS, SHAPE
from training.initialisation import new_draft
from training.ranks import Ranks
from training.target import TargetModel
from training.trainer import Trainer

torch.set_num_threads(1)
target_folder, data, out, *stop = sys.argv[1:]
ranks = Ranks.join()
target = TargetModel.from_pretrained(Path(target_folder), (0, 1))


def load():
    assert ranks.first, "only rank 0 reads the data"
    return torch.load(data, weights_only=False)


sequences = torch.load(data, weights_only=False)
settings = replace(SETTINGS, batches_per_step=3, save_minutes=0.0)
seed = SETTINGS.seed + ranks.rank  # other ranks begin elsewhere, and must be set to what rank 0 has
trainer = Trainer(target, new_draft(target, sequences, SHAPE, seed), load, Path(out), settings, ranks)
if (Path(out) / "state.pt").exists():
    trainer.resume()
last = ranks.rank == ranks.size - 1


def report(line):
    print(f"step {line['step']}", flush=True)
    if stop and last and line["step"] == int(stop[0]):
        trainer.stop_requested = True


trainer.run(report)
print(f"rank {ranks.rank}: {trainer.progress.step} steps", flush=True)
ranks.leave()

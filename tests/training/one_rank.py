"""One process of a run: TARGET SEQUENCES OUT [STEP at which the last rank is told to stop]. It saves after every step,
and goes on with what OUT holds. In the environment: SETTINGS (JSON) change the run's; AGAIN=1 resumes after the stop, in
the same process; KIND the kind of the head, trained with its own losses; FULL="a-b" forbids files to grow from step a on,
until step b (a full disk)."""

import json
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.training.answered import SETTINGS, SHAPE
from training.initialisation import new_draft
from training.loss import named_losses
from training.ranks import Ranks
from training.target import TargetModel
from training.trainer import Trainer

torch.set_num_threads(1)
target_folder, data, out, *stop = sys.argv[1:]
out = Path(out)
ranks = Ranks.join()
target = TargetModel.from_pretrained(Path(target_folder), (0, 1))
full = [int(step) for step in os.environ.get("FULL", "0-0").split("-")]


def load():
    assert ranks.first, "only rank 0 reads the data"
    return torch.load(data, weights_only=False)


def run(*stop):
    sequences = torch.load(data, weights_only=False)
    changes = json.loads(os.environ.get("SETTINGS", "{}"))
    settings = replace(SETTINGS, **{"batches_per_step": 3, "save_minutes": 0.0, **changes})
    seed = SETTINGS.seed + ranks.rank  # other ranks begin elsewhere, and must be set to what rank 0 has
    if kind := os.environ.get("KIND"):
        settings = replace(settings, loss=named_losses("", kind))
    shape = replace(SHAPE, kind=kind or SHAPE.kind)
    trainer = Trainer(target, new_draft(target, sequences, shape, seed), load, out, settings, ranks)
    if (out / "state.pt").exists():
        trainer.resume()

    def report(line):
        print(f"step {line['step']}", flush=True)
        if line["step"] in full:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            limit = (out / "log.jsonl").stat().st_size + 10 if line["step"] == full[0] else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        if stop and ranks.rank == ranks.size - 1 and line["step"] == int(stop[0]):
            trainer.stop_requested = True

    trainer.run(report)
    print(f"rank {ranks.rank}: {trainer.progress.step} steps", flush=True)
    return trainer


trainer = run(*stop)
if os.environ.get("AGAIN"):
    trainer = run()
moments = [kept["exp_avg"] for kept in trainer.optimizer.state_dict()["state"].values()]
kept = sum((m.to_local() if hasattr(m, "to_local") else m).numel() for m in moments)
print(f"kept: {kept} of {sum(p.numel() for p in trainer.parameters)} numbers of the optimiser's state", flush=True)
ranks.leave()
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
print(f"left behind: {sorted(name for name in names if 'gloo' in name)}", flush=True)

"""Our engines under our loop, in one process: `serve BUNDLE SCHEDULE THREADS`."""

from __future__ import annotations

import sys
from importlib.metadata import version

from protocol import serve

import engines
from decoding.loop import Loop
from decoding.request import Request, SamplingParams
from decoding.schedule import make


def open_engine(bundle: str, schedule: str, threads: int):
    opened = engines.load(bundle, threads=threads)
    loop = Loop(opened, scheduler_of(schedule, opened), max_requests=32)  # one for all turns, as a server has
    made = 0

    def generate(prompts, count):
        nonlocal made
        base, made = made, made + len(prompts)
        for i, ids in enumerate(prompts):
            loop.add(Request(base + i, tuple(ids), SamplingParams(max_tokens=count, ignore_eos=True)))
        while loop.has_work:
            step = []
            for output in loop.step():
                if output.finish_reason == "error":
                    raise RuntimeError(output.error)
                step += [(output.request_id - base, token) for token in output.token_ids]
            yield step

    return version("dspark-triton"), generate


def scheduler_of(name: str, opened):
    if name in ("causal", "lagged"):
        from engines.sps import Sps

        return make(name, sps=Sps.of(opened))
    return make(name)


if __name__ == "__main__":
    _, _, folder, chosen, threads = sys.argv
    serve(lambda: open_engine(folder, chosen, int(threads)))

"""The CPU operators of engines/kernels, compiled once a test process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from export.graph import DSPARK, Graph
from export.kernels import LIBRARY, library
from export.runner import Runner


@cache
def kernels() -> Path:
    """The library's file."""
    folder = Path(tempfile.mkdtemp(prefix="dspark-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / LIBRARY).write_bytes(library())
    return folder / LIBRARY


def runner_of(folder: Path, graph: Graph, *sizes) -> Runner:
    """Runner(folder, graph, *sizes), with the operators where the graph calls them."""
    return Runner(folder, graph, *sizes, library=kernels() if graph.calls(DSPARK) else None)

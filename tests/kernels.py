"""The CPU operators of engines/kernels, compiled once a test process; a test that needs them is skipped where they do not compile."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest

from export.graph import DSPARK, Graph
from export.kernels import LIBRARY, KernelsError, library
from export.runner import Runner


@cache
def kernels() -> Path:
    """The library's file."""
    try:
        content = library()
    except KernelsError as error:
        pytest.skip(str(error))
    folder = Path(tempfile.mkdtemp(prefix="dspark-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / LIBRARY).write_bytes(content)
    return folder / LIBRARY


def runner_of(folder: Path, graph: Graph, *sizes) -> Runner:
    """Runner(folder, graph, *sizes), with the operators where the graph calls them."""
    return Runner(folder, graph, *sizes, library=kernels() if graph.calls(DSPARK) else None)

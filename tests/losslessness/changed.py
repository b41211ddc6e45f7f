"""Engines with one fault: a call that is changed on its way in or out, or a verify graph built by patched code."""

from __future__ import annotations

from engines.base import VerifyResult
from engines.onnxruntime import session_options
from engines.session import Graph
from export import verify as export_verify
from tests.losslessness import table


class Changed:
    """Table engines of which one engine is changed."""

    def __init__(self, engines, **changes):
        self._engines = engines
        for name, change in changes.items():
            setattr(self, name, lambda batch, call=getattr(engines, name), change=change: change(call, batch))

    def __getattr__(self, name):
        return getattr(self._engines, name)


def with_verify_graph(engines, folder, draft_to_target=table.DRAFT_TO_TARGET):
    """The engines with a verify graph that is built now, by whatever export.verify has been patched to."""
    bundle = engines.bundle
    graph = export_verify.build_verify(table.G, table.V, draft_to_target)
    graph.save(folder)
    session = Graph(folder / "model.onnx", bundle.engines["verify"], session_options(1), None)
    return Changed(engines, verify=lambda call, batch: VerifyResult(**session.run(batch.__dict__)))

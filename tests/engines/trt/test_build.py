"""One graph to one plan: what a builder refuses, drops or cannot fuse becomes one sentence or a finding."""

from __future__ import annotations

import gc
import signal

import numpy as np
import pytest

from engines.specs import TensorSpec
from engines.trt.api import BuildError, load_api
from engines.trt.build import compile_graph
from engines.trt.planfile import PlanFile
from engines.trt.profiles import Profile
from export.graph import Graph
from tests.engines.trt.graphs import job, tiny_graphs


@pytest.fixture(scope="module")
def api():
    return load_api("tensorrt-rtx")


def saved(folder, graph: Graph) -> Graph:
    graph.save(folder / graph.name)
    return graph


def sum_graph(folder) -> Graph:
    g = Graph("sum")
    g.op("Add", g.input("a", "float32", ("A",)), g.input("b", "float32", ("B",)), out="c")
    g.output("c", "float32", ("A",))
    return saved(folder, g)


def one(**sizes: int) -> tuple[Profile, ...]:
    return (Profile("only", {name: (n, n, n) for name, n in sizes.items()}, {}),)


def fails(api, task) -> str:
    with pytest.raises(BuildError) as error:
        compile_graph(api, task)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


def test_progress_runs_to_its_end(tmp_path, api):
    shares: list[float] = []
    plan = compile_graph(api, job(tmp_path, sum_graph(tmp_path), profiles=one(A=4, B=4)), shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0 and plan.attentions == () and plan.peak >= 0


def test_a_failed_build_keeps_no_builder_and_nothing_is_collected_meanwhile(tmp_path, api):
    """A builder that another thread's garbage collection frees while this one is in a builder is a deadlock."""
    collecting: list[bool] = []
    with pytest.raises(BuildError) as error:
        compile_graph(api, job(tmp_path, sum_graph(tmp_path), profiles=one(A=3, B=5)))
    frames = [entry.frame for entry in error.traceback if entry.path.name == "build.py"]
    assert any(frame.code.name == "_attempt" for frame in frames)
    assert not any({"builder", "network", "parser", "logger"} & frame.f_locals.keys() for frame in frames)
    compile_graph(
        api, job(tmp_path, sum_graph(tmp_path), profiles=one(A=4, B=4)), lambda share: collecting.append(gc.isenabled())
    )
    assert collecting and not any(collecting) and gc.isenabled()


def test_shapes_that_do_not_fit_give_the_builders_words(tmp_path, api):
    text = fails(api, job(tmp_path, sum_graph(tmp_path), profiles=one(A=3, B=5)))
    assert text.startswith("tensorrt-rtx 1.7.1.116 did not compile sum for 8.9: ") and len(text) > 80


def test_an_unknown_op_names_its_node(tmp_path, api):
    g = Graph("draw")
    g.op("Multinomial", g.input("x", "float32", ("R", 8)), out="y", dtype=7)
    g.output("y", "int64", ("R", 1))
    text = fails(api, job(tmp_path, saved(tmp_path, g), profiles=one(R=2)))
    assert text.startswith("draw: the ONNX parser refused node 'y/Multinomial' (Multinomial): ")


def test_an_input_that_the_parser_drops_is_an_error(tmp_path, api):
    """Attention's nonpad_kv_seqlen is accepted and ignored by TensorRT: silently wrong numbers otherwise."""
    g, shape = Graph("dropped"), ("R", 2, "Q", 16)
    q, k, v = (g.input(name, "float16", shape) for name in "qkv")
    g.op("Attention", q, k, v, "", "", "", g.input("lengths", "int64", ("R",)), out="y")
    g.output("y", "float16", shape)
    assert "dropped the input 'lengths'" in fails(api, job(tmp_path, saved(tmp_path, g), profiles=one(R=2, Q=4)))


def test_the_network_has_the_declared_inputs(tmp_path, api):
    g = sum_graph(tmp_path)
    a, b = (TensorSpec(name, "float32", ("A",)) for name in "ab")
    profiles = one(A=4, B=4)
    run = lambda *inputs: fails(api, job(tmp_path, g, profiles=profiles, inputs=inputs))
    assert "dropped the input 'c'" in run(a, b, TensorSpec("c", "float32", ("A",)))
    assert "made the input 'b' FLOAT, the graph declares float16" in run(a, TensorSpec("b", "float16", ("A",)))
    assert "the network has the input 'b'" in run(a)


def test_a_cache_that_is_not_updated_in_place_is_an_error(tmp_path, api):
    g, shape = Graph("copied"), ("R", 2, 16, 16)
    g.op("Add", g.input("past_key_values.0.key", "float16", shape), g.input("x", "float16", shape), out="present.0.key")
    g.output("present.0.key", "float16", shape)
    text = fails(api, job(tmp_path, saved(tmp_path, g), profiles=one(R=2)))
    assert text == "copied: it has 1 caches, but 0 layers that update one in place."


def test_a_gpu_it_does_not_know(tmp_path, api):
    """set_compute_capability answers False and does not raise."""
    text = fails(api, job(tmp_path, sum_graph(tmp_path), profiles=one(A=4, B=4), capability="9.0"))
    assert text.startswith("tensorrt-rtx 1.7.1.116 refused compute capability 9.0; it knows 7.5, ")


def test_attention_without_a_kernel_is_decomposed_and_named(tmp_path, api):
    """head_dim 8 has no fused kernel."""
    graph = tiny_graphs(tmp_path, "fp16", head_dim=8, depth=1, layer_ids=(-1,))["backbone"]
    plan = compile_graph(api, job(tmp_path, graph))
    assert len(plan.attentions) == 1 and plan.unfused == plan.attentions and plan.size


def test_an_input_that_sizes_others_must_be_in_the_profile(tmp_path, api):
    g = Graph("top")
    x, k = g.input("x", "float32", ("R", 8)), g.input("k", "int64", (1,))
    values, _ = g.op("TopK", x, k, out=("values", "indices"))
    g.output(values, "float32", ("R", "K"))
    saved(tmp_path, g)
    sizes = {"R": (2, 2, 2)}
    assert "input 'k' sizes others, or does not" in fails(api, job(tmp_path, g, profiles=(Profile("only", sizes, {}),)))
    assert compile_graph(api, job(tmp_path, g, profiles=(Profile("only", sizes, {"k": (1, 2, 8)}),))).size


def test_ctrl_c_ends_the_build(tmp_path, api):
    before = signal.getsignal(signal.SIGINT)
    calls: list[float] = []

    def interrupt(share: float) -> None:
        calls.append(share)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        compile_graph(api, job(tmp_path, sum_graph(tmp_path), profiles=one(A=4, B=4)), interrupt)
    assert calls and signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in (tmp_path / "sum").iterdir()] == ["model.onnx"]


def test_a_full_disk_is_one_sentence(tmp_path, api):
    task = job(tmp_path, sum_graph(tmp_path), profiles=one(A=4, B=4))
    PlanFile(task.plan)._beside.symlink_to("/dev/full")
    text = fails(api, task)
    assert text == f"sum: its plan cannot be written to {tmp_path / 'sum'}: No space left on device."
    assert [p.name for p in (tmp_path / "sum").iterdir()] == ["model.onnx"]


def test_weights_beside_the_model_are_read(tmp_path, api):
    g = Graph("linear")
    weight = g.weight("w", np.ones((256, 256), np.float16))
    g.op("MatMul", g.input("x", "float16", ("R", 256)), weight, out="y")
    g.output("y", "float16", ("R", 256))
    plan = compile_graph(api, job(tmp_path, saved(tmp_path, g), profiles=one(R=4)))
    assert plan.size > 256 * 256 * 2
    (tmp_path / "linear" / "model.onnx.data").unlink()
    assert "the ONNX parser refused" in fails(api, job(tmp_path, g, profiles=one(R=4)))

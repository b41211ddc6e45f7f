from types import SimpleNamespace as Record

import onnxruntime as ort
import pytest

from engines.assignment import RECORD, Node, elsewhere, nodes_of, refused, sentence

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def subgraph(provider: str, *nodes: tuple[str, str]) -> Record:
    made = [Record(name=name, op_type=op, domain="") for name, op in nodes]
    return Record(ep_name=provider, get_nodes=lambda: made)


GPU_PART = subgraph(CUDA, ("a", "MatMul"), ("b", "Attention"))
INDICES = subgraph(CPU, ("c", "Div"), ("d", "Concat"), ("e", "Shape"))


def test_a_graph_on_the_gpu_with_its_indices_on_the_host():
    nodes = nodes_of([GPU_PART, INDICES])
    assert len(nodes) == 5 and nodes[0] == Node("a", "MatMul", CUDA)
    assert [n.name for n in elsewhere(nodes, CUDA)] == ["c", "d", "e"]
    assert refused(nodes, CUDA) == () and sentence("target", nodes, CUDA) is None


@pytest.mark.parametrize(
    "fallen, words",
    [
        ([("f", "MatMulIntegerToFloat")], ["node f (MatMulIntegerToFloat) runs on", "export with --dtype fp32"]),
        ([("f", "TensorScatter"), ("g", "Attention")], ["node f (TensorScatter) (and 1 more nodes)", "--device cpu"]),
    ],
)
def test_a_fallen_node_is_named_with_what_to_do(fallen, words):
    text = sentence("target", nodes_of([GPU_PART, INDICES, subgraph(CPU, *fallen)]), CUDA)
    assert text.startswith("target: ") and "\n" not in text and text.endswith(".")
    assert all(word in text for word in words)


def test_what_onnx_runtime_records_is_read(bundle):
    options = ort.SessionOptions()
    options.add_session_config_entry(*RECORD)
    path = str(bundle / "onnx" / "markov" / "model.onnx")
    session = ort.InferenceSession(path, options, providers=[CPU])
    nodes = nodes_of(session.get_provider_graph_assignment_info())
    assert nodes and {n.provider for n in nodes} == {CPU} and "Gather" in {n.op for n in nodes}
    assert refused(nodes, CPU) == () and refused(nodes, CUDA)  # a whole graph that fell to the CPU

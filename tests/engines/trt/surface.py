"""The Python surface of a TensorRT package, and what of it a source file uses.

tensorrt_bindings (TensorRT 11.4) imports against stub libraries: enough to see every class, member and signature,
nothing runs.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

STUB = """
#define F(n) void* n(void){return 0;}
F(createInferBuilder_INTERNAL)F(createInferRefitter_INTERNAL)F(createInferRuntime_INTERNAL)
F(createNvOnnxParserRefitter_INTERNAL)F(createNvOnnxParser_INTERNAL)
F(getBuilderPluginRegistry)F(getPluginRegistry)F(initLibNvInferPlugins)
int getNvOnnxParserVersion(void){return 0;}
"""
DUMP = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
doc = lambda o: o.__doc__ if callable(o) and isinstance(o.__doc__, str) else None
members = lambda c: {n: doc(getattr(c, n, None)) for n in dir(c)}
print(json.dumps({"version": trt.__version__, "names": {n: members(getattr(trt, n)) for n in dir(trt)}}))
"""
OBJECTS = {  # what a variable of this name holds, in the files of engines/trt that call TensorRT
    "builder": ("Builder",),
    "config": ("IBuilderConfig",),
    "network": ("INetworkDefinition",),
    "parser": ("OnnxParser",),
    "profile": ("IOptimizationProfile",),
    "layer": ("ILayer", "IAttentionInputLayer"),
    "attention": ("IAttention",),
    "tensor": ("ITensor",),
    "cache": ("ITimingCache",),
    "error": ("ParserError",),
    "severity": ("ILogger_Severity",),
    "runtime": ("Runtime",),
    "engine": ("ICudaEngine",),
    "context": ("IExecutionContext",),
    "settings": ("IRuntimeConfig",),
}
PYTHON = {"__init__", "__class__", "__members__", "__version__", "name", "value"}  # what every class or enum has


@dataclass(frozen=True)
class Use:
    """owner: a class ("" = the module); keywords and positional of the call, None where it is not called."""

    owner: tuple[str, ...]
    member: str
    line: int
    keywords: tuple[str, ...] | None = None
    positional: int = 0


def stub_libraries(folder: Path) -> Path:
    """Compiles the three libraries that tensorrt_bindings links against."""
    (folder / "stub.c").write_text(STUB)
    for name in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
        library = f"{name}.so.11"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, folder / "stub.c"], check=True
        )
    return folder


def surface(module: str, libraries: Path | None = None) -> dict:
    """{"version", "names": {name: {member: docstring of a callable | None}}}; ILogger.Severity is ILogger_Severity."""
    env = dict(os.environ) | ({"LD_LIBRARY_PATH": str(libraries)} if libraries else {})
    done = subprocess.run([sys.executable, "-c", DUMP, module], env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    found["names"].setdefault("ILogger_Severity", {"name": None})
    return found


def parameters(doc: str | None) -> list[list[str]] | None:
    """The parameter names (without self) of each overload in a pybind11 docstring; None = unknown, anything goes."""
    found, doc = [], doc or ""
    doc = doc.partition("Overloaded function.")[2] or doc  # what stands before it is f(*args, **kwargs)
    for match in re.finditer(r"^(?:\d+\. )?\w+\(", doc, re.M):
        depth, start, parts, i = 1, match.end(), [], match.end()
        while depth and i < len(doc):
            char = doc[i]
            depth += (char in "([{") - (char in ")]}")
            if (char == "," and depth == 1) or depth == 0:
                parts.append(doc[start:i])
                start = i + 1
            i += 1
        names = [part.split(":")[0].split("=")[0].strip() for part in parts]
        if any(name.startswith("*") for name in names):
            return None
        found.append([name for name in names if name and name != "self"])
    return found or None


def uses(source: str) -> list[Use]:
    """Every `trt.NAME[.MEMBER]`, every member of a variable of OBJECTS, and every method that overrides a trt
    class's."""
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = []

    def add(owner: tuple[str, ...], node: ast.Attribute) -> None:
        call = calls.get(id(node))
        keywords = None if call is None else tuple(k.arg for k in call.keywords if k.arg)
        positional = 0 if call is None else sum(not isinstance(a, ast.Starred) for a in call.args)
        found.append(Use(owner, node.attr, node.lineno, keywords, positional))

    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name) and base.value.id == "trt":
                    for method in (m for m in node.body if isinstance(m, ast.FunctionDef) and m.name not in PYTHON):
                        names = tuple(a.arg for a in method.args.args[1:])
                        found.append(Use((base.attr,), method.name, method.lineno, names))
        if not isinstance(node, ast.Attribute):
            continue
        value = node.value
        if is_module(value, "trt"):
            add(("",), node)
        elif isinstance(value, ast.Attribute) and is_module(value.value, "trt"):
            add((value.attr,), node)
        elif isinstance(value, ast.Name) and value.id in OBJECTS:
            add(OBJECTS[value.id], node)
    return found


def is_module(node: ast.expr, name: str) -> bool:
    """`trt`, or `something.trt`."""
    return (node.id if isinstance(node, ast.Name) else getattr(node, "attr", None)) == name


def cudart_uses(source: str) -> list[tuple[str, str, int | None]]:
    """(name, its member or "", arguments of the call, None where it is not called) of every `cudart.NAME[.MEMBER]`."""
    tree = ast.parse(source)
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = {id(node.func): len(node.args) + len(node.keywords) for node in called}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if is_module(node.value, "cudart"):
            found.append((node.attr, "", calls.get(id(node))))
        elif isinstance(node.value, ast.Attribute) and is_module(node.value.value, "cudart"):
            found.append((node.value.attr, node.attr, None))
    return found


def wrong(use: Use, known: dict) -> str | None:
    """Why a use does not fit the surface; None where it does."""
    names = known["names"]
    if use.owner == ("",):
        docs = [names[use.member].get("__init__")] if use.member in names else []
        there = use.member in names or use.member in PYTHON
    else:
        classes = [names[owner] for owner in use.owner if owner in names]
        docs = [members[use.member] for members in classes if use.member in members]
        there = bool(docs) or use.member in PYTHON
    what = ".".join(part for part in (use.owner[-1], use.member) if part)
    if not there:
        return f"line {use.line}: {what} does not exist in {known['version']}"
    if use.keywords is None or not docs:
        return None
    overloads = parameters(docs[0])
    fits = lambda names: set(use.keywords) <= set(names) and use.positional + len(use.keywords) <= len(names)
    if overloads is None or any(fits(names) for names in overloads):
        return None
    given = f"it is given {use.positional} and {list(use.keywords)}"
    return f"line {use.line}: {what} takes {overloads}, {given} in {known['version']}"

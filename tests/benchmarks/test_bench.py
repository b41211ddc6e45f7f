"""Which cells are measured, in which order; the whole command on a tiny bundle."""

import json
import sys

import pytest
import typer

from benchmarks import bench
from benchmarks.bench import chosen_kinds, chosen_levels, chosen_modes, measure
from benchmarks.cells import PATHS, REQUIRED, read
from benchmarks.common import KINDS
from benchmarks.steady import Plan


def test_measure_rotates_the_modes_and_alternates_the_paths():
    order = {path: [] for path in PATHS}
    paths: list = []

    def runner(path):
        def window(mode, plan):
            order[path].append((mode, plan.tokens, plan.first))
            return dict.fromkeys(REQUIRED, 1.0) | {"total_tok_s": 100.0 + len(order[path])}

        return lambda modes, kind, plan: (paths.append(path), [window(mode, plan) for mode in modes])[1]

    rows = measure(
        {p: runner(p) for p in PATHS}, ["none", "fixed"], "maths", Plan(4, 0), prompts=30, repeats=3, seconds=2.0
    )
    modes = [mode for mode, _, _ in order["in_process"]]
    assert modes == ["none", "fixed"] + ["none", "fixed"] + ["fixed", "none"] + ["none", "fixed"]
    assert paths[2:] == [*PATHS, *PATHS[::-1], *PATHS], "the two windows of a repeat next to each other"
    measured = order["in_process"][2:]
    assert len({tokens for _, tokens, _ in measured}) == 1, "the same number of tokens for everybody"
    assert measured[0][1] == round(2.0 * 101.5), "as many as make two seconds at the median rate of the warm-up"
    assert [first for _, _, first in measured[::2]] == [0, 10, 20]
    of = {(r["mode"], r["path"]): r["repeats"] for r in rows}
    assert of["none", "grpc"] == [103.0, 106.0, 107.0] and of["fixed", "grpc"] == [104.0, 105.0, 108.0], "each window its mode"


def test_kinds_are_the_repositorys_or_the_users(tmp_path):
    own = tmp_path / "law.jsonl"
    own.write_text('{"prompt": "x"}\n')
    assert chosen_kinds(None, []) == KINDS and list(chosen_kinds("chat,maths", [])) == ["chat", "maths"]
    assert chosen_kinds(None, [str(own)]) == {"law": own}
    assert chosen_kinds(None, [f"mine={own}"]) == {"mine": own}
    assert chosen_kinds("maths,mine", [f"mine={own}"]) == {"maths": KINDS["maths"], "mine": own}
    with pytest.raises(ValueError, match="kinds names 'poetry'"):
        chosen_kinds("poetry", [])
    with pytest.raises(ValueError, match="is no file"):
        chosen_kinds(None, ["mine=missing.jsonl"])


def test_modes_and_levels_are_checked():
    assert chosen_modes("none,lagged", None) == ["none", "lagged"]
    with pytest.raises(ValueError, match="'best'.*none, fixed, threshold, causal, lagged"):
        chosen_modes("none,best", None)
    with pytest.raises(ValueError, match="--url"):
        chosen_modes("fixed,lagged", "host:1")
    assert chosen_levels("1,8", "concurrency") == [1, 8]
    for text in ("0", "x", "1,,2", "4096"):
        with pytest.raises(ValueError, match="concurrency is"):
            chosen_levels(text, "concurrency")


def options(tmp_path, **changed) -> dict:
    own = tmp_path / "p.jsonl"
    own.write_text("".join(json.dumps({"prompt": "fox " * (i + 1)}) + "\n" for i in range(5)))
    return {
        "modes": "none,fixed",
        "kinds": None,
        "concurrency": "2",
        "paths": "in_process,grpc",
        "grpc_concurrency": "2",
        "repeats": 2,
        "seconds": 0.05,
        "max_tokens": 8,
        "temperature": 0.0,
        "seed": 0,
        "threshold": 0.5,
        "prompts": [f"mine={own}"],
        "url": None,
        "quick": False,
        "out": tmp_path / "bench.json",
    } | changed


@pytest.fixture
def arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/bench.py"])


def test_the_command_on_both_paths(bundle_of_tiny, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)  # its servers keep out of the project's build/
    bench.main(bundle=bundle_of_tiny, **options(tmp_path))
    rows, meta = read(tmp_path / "bench.json")
    assert {(r["mode"], r["path"]) for r in rows} == {(m, p) for m in ("none", "fixed") for p in PATHS}
    assert all(set(REQUIRED) | {"mode", "kind", "concurrency", "path"} <= set(r) for r in rows)
    of = {(r["mode"], r["path"]): r for r in rows}
    block = meta["bundle"]["block_size"]
    for path in PATHS:
        assert of["none", path]["verified_per_round"] == 0 and of["none", path]["acceptance_length"] == 1
        assert of["fixed", path]["verified_per_round"] == block, "the server is asked for its schedule too"
    assert all(0 < r["host_share"] < 1 for r in rows), "on the server from its metrics"
    assert of["fixed", "grpc"]["grpc_ratio"] > 0
    assert of["fixed", "in_process"]["tokens"] == pytest.approx(of["none", "in_process"]["tokens"], abs=2 * (block + 1))
    bench.main(bundle=bundle_of_tiny, **options(tmp_path, modes="threshold", paths="in_process", temperature=1.0))
    later = read(tmp_path / "bench.json")[0]
    assert len(later) == 5 and later[:4] == rows, "another mode and temperature: cells of their own"


def test_both_paths_in_turns(bundle_of_tiny, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    bench.main(bundle=bundle_of_tiny, **options(tmp_path, modes="none", turns=True))
    rows, _ = read(tmp_path / "bench.json")
    assert [r["path"] for r in rows] == list(PATHS) and all(len(r["repeats"]) == 2 for r in rows)
    direct, served = rows
    each = [a / b for a, b in zip(served["repeats"], direct["repeats"])]
    assert served["grpc_ratio"] == pytest.approx(sum(each) / 2, rel=1e-3), "of the windows that were taken side by side"
    assert served["host_share"] is None and direct["host_share"] > 0


@pytest.fixture
def bundle_of_tiny(bundle, monkeypatch):
    """The tiny bundle, whose checkpoints are not beside it: it counts as fitting."""
    monkeypatch.setattr(
        "benchmarks.bundle.ensure", lambda *_: json.loads((bundle / "manifest.json").read_text())
    )
    return bundle


def test_any_running_server(server, tmp_path, arguments):
    bench.main(bundle=tmp_path / "none", **options(tmp_path, url=server.grpc_url))
    rows, meta = read(tmp_path / "bench.json")
    assert [(r["mode"], r["path"]) for r in rows] == [("none", "grpc"), ("fixed", "grpc")]
    assert "bundle" not in meta and rows[0]["verified_per_round"] == 0 and rows[0]["ratio_to_best"] is not None


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"modes": "all"}, "modes names 'all'"),
        ({"concurrency": "0"}, "concurrency is 0"),
        ({"paths": "http"}, "paths is http"),
        ({"repeats": 0}, "repeats is 0"),
        ({"kinds": "art"}, "kinds names 'art'"),
        ({"turns": True, "paths": "grpc"}, "turns is for both paths"),
        ({"url": "127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_bad_choices_are_one_sentence(tmp_path, capsys, arguments, changed, sentence):
    with pytest.raises(typer.Exit):
        bench.main(bundle=tmp_path, **options(tmp_path, **changed))
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1

import json

import pytest

import engines
from engines.manifest import FORMAT_VERSION, BundleError, get, read, update_manifest


@pytest.mark.parametrize(
    "kind, value", [(int, 3), (str, "x"), (bool, True), (tuple, [1, "R"]), (tuple, []), (dict, {"a": 1})]
)
def test_a_key_of_the_right_type_is_taken(kind, value):
    assert get({"k": value}, "k", kind, "here") == (tuple(value) if kind is tuple else value)


@pytest.mark.parametrize(
    "kind, value, words",
    [(int, True, "an integer"), (int, "3", "an integer"), (str, 3, "a string"), (bool, 1, "true or false"), (tuple, "ab", "a list"), (dict, [], "an object")],
)  # fmt: skip
def test_a_key_of_another_type_is_named(kind, value, words):
    with pytest.raises(BundleError) as error:
        get({"k": value}, "k", kind, "here")
    assert str(error.value).startswith(f"here: k is {value!r}, it must be {words};")


def test_a_missing_key_is_named():
    with pytest.raises(BundleError, match="here lacks the key 'k'"):
        get({}, "k", int, "here")


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, str(FORMAT_VERSION), None])
def test_another_version_is_refused(tmp_path, version):
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({"format_version": version}))
    with pytest.raises(BundleError, match="format_version is .*this version reads"):
        read(file)


def test_refuses_a_folder_that_is_none(tmp_path):
    with pytest.raises(BundleError, match="holds no manifest.json"):
        engines.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="not readable JSON"):
        engines.load(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(BundleError, match="not a JSON object"):
        engines.load(tmp_path)


def test_an_update_replaces_only_its_keys(tmp_path):
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({"format_version": FORMAT_VERSION, "sps": 1, "dtype": "int8"}))
    update_manifest(tmp_path, sps={"date": "today"}, calibration=None)
    assert read(file) == {
        "format_version": FORMAT_VERSION,
        "sps": {"date": "today"},
        "dtype": "int8",
        "calibration": None,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_an_update_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({"format_version": FORMAT_VERSION}))
    with pytest.raises(TypeError):
        update_manifest(tmp_path, sps=object())
    assert read(file) == {"format_version": FORMAT_VERSION}
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]

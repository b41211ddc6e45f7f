"""Prompts from files, folders and data sets; once each; none that a benchmark asks."""

import json
import logging
import sys
import types

import pytest

from training.sources import TOO_ALIKE, Benchmarks, Chat, ngrams, once, parse, read, write_chats

ASKED = (("user", "How many hens?"),)
USER, HUMAN = {"role": "user", "content": "How many hens?"}, {"from": "human", "value": "How many hens?"}


@pytest.mark.parametrize(
    "record, chat",
    [
        ({"prompt": "How many hens?"}, Chat(ASKED)),
        ({"question": "How many hens?", "kind": "maths"}, Chat(ASKED, "maths")),
        ({"turns": ["How many hens?", "And cows?"]}, Chat(ASKED)),
        ({"instruction": "Sort.", "input": "b a"}, Chat((("user", "Sort.\n\nb a"),))),
        ({"messages": [USER, {"role": "assistant", "content": "9"}]}, Chat(ASKED, answer="9")),
        ([USER], Chat(ASKED)),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "9"}]}, Chat(ASKED, answer="9")),
    ],
)
def test_the_forms_that_chats_have(record, chat):
    assert parse(record) == chat


def test_a_long_chat_is_asked_its_last_question():
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chat = parse({"messages": [{"role": r, "content": t} for r, t in turns]})
    assert chat.messages == tuple(turns[:4]) and chat.answer == "d" and chat.text == "a\nc"


@pytest.mark.parametrize(
    "record, words",
    [
        ("text", "not a JSON object"),
        ({}, "it has none of"),
        ({"prompt": " "}, "missing or empty"),
        ({"turns": []}, "missing or empty"),
        ({"prompt": "x", "kind": "poetry"}, "kind is 'poetry'"),
        ({"messages": [{"role": "assistant", "content": "hello"}]}, "a chat with no user turn"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "role is 'judge'"),
        ({"messages": [{"role": "user", "content": None}]}, "the user's text is missing or empty"),
        ({"messages": ["hello"]}, "a message is 'hello'"),
    ],
)
def test_a_record_that_asks_nothing(record, words):
    with pytest.raises(ValueError, match=words):
        parse(record)


def test_a_folder_of_logs_is_read_through(tmp_path, caplog):
    (tmp_path / "deep").mkdir()
    one = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}]
    (tmp_path / "a.json").write_text(json.dumps(one))
    (tmp_path / "b.json").write_text(json.dumps([{"messages": one[:1]}, {"prompt": "two"}, {"messages": []}]))
    (tmp_path / "deep" / "c.jsonl").write_bytes(b'{"prompt": "three"}\n\xff\n')
    (tmp_path / "d.json").write_text("{")
    (tmp_path / "notes.txt").write_text("not a log")
    with caplog.at_level(logging.WARNING):
        texts = [chat.text for chat in read(str(tmp_path))]
    assert texts == ["one", "one", "two", "three"]
    assert "b.json, chat 3 left out: a chat with no user turn." in caplog.text
    assert "c.jsonl:2 left out: it is not UTF-8" in caplog.text and "d.json left out: it is not JSON" in caplog.text
    assert [chat.text for chat in once(read(str(tmp_path)))] == ["one", "two", "three"]
    assert next(iter(read(str(tmp_path / "a.json")))).answer == "1"


def test_sources_that_are_none(tmp_path):
    for source, error, words in (
        (str(tmp_path / "x"), FileNotFoundError, "neither a file nor a folder"),
        (str(tmp_path), ValueError, "holds no"),
    ):
        with pytest.raises(error, match=words):
            list(read(source))


def test_a_data_set_by_name(monkeypatch, caplog):
    rows = [{"question": "q"}, {"other": 1}, {"question": "r"}]
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with caplog.at_level(logging.WARNING):
        assert [c.text for c in read("hf:a/b:test")] == ["q", "r"]
    assert asked == [("a/b", "test", True)] and "hf:a/b:test, row 2 left out" in caplog.text
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package `datasets`"):
        list(read("hf:a/b"))


def test_case_and_white_space_make_no_other_chat():
    a, b = Chat((("user", "How many\n hens?"),)), Chat((("user", " how many hens? "),))
    assert a.key == b.key and list(once([a, b])) == [a]


SUFFIX = " Please reason step by step and put the final answer within a box at the end."


def bench(*texts):
    return Benchmarks(Chat((("user", text + SUFFIX),)) for text in texts)


def test_what_a_benchmark_asks_is_left_out():
    story = "A farmer has nine hens and every hen lays four eggs a week except in winter when none does."
    others = "Count the odd numbers below one hundred and add them up twice.", "Name a prime between ten and twenty."
    benchmarks = bench(story, *others)
    near = "In a village " + story.replace("nine hens", "eleven hens")
    kept, out, overlap = benchmarks.split(
        Chat((("user", text),)) for text in (story + SUFFIX, story, near, "What is the capital of Peru?" + SUFFIX)
    )
    assert [c.text for c in out] == [story + SUFFIX, story, near]
    assert [c.text for c in kept] == ["What is the capital of Peru?" + SUFFIX] and overlap < TOO_ALIKE
    assert benchmarks.overlap(Chat((("user", SUFFIX.strip()),))) == 0.0  # what every benchmark prompt says is nobody's


def test_ngrams_of_short_texts():
    assert ngrams("") == set() and ngrams("One, two") == {("one", "two")}
    assert len(ngrams("a b c d e f g h i j")) == 3


def test_chats_survive_a_round_trip(tmp_path):
    chats = [Chat(ASKED, "maths", "9"), Chat((("system", "s"), ("user", "ü\n")), "code")]
    write_chats(tmp_path / "c.jsonl", chats)
    assert list(read(str(tmp_path / "c.jsonl"))) == chats

import pytest

from training.prompts import MATHS_SUFFIX, Prompt
from training.self_asked import WORDS, beginnings, jobs, questions

LONG = " that takes a list and gives its largest number"


def test_beginnings_are_of_the_seed():
    one, two = list(beginnings(300, 21)), list(beginnings(300, 22))
    assert one == list(beginnings(300, 21)) != two
    assert {p.kind for p in one} == set(WORDS) and all(p.text in WORDS[p.kind] for p in one)
    assert any(not p.text for p in one), "from no word at all, too"


def test_no_beginnings_are_refused():
    with pytest.raises(ValueError, match=r"^count is 0; it must be 1 or more\.$"):
        list(beginnings(0, 1))


def test_a_job_ends_inside_the_users_turn():
    class Tokens:
        def unfinished(self, text):
            return [*b"<user>", *text.encode()]

    made = jobs([Prompt("", "chat"), Prompt("Why", "chat")], Tokens(), temperature=0.9, max_new=7)
    assert [(j.index, bytes(j.tokens), j.temperature, j.max_new) for j in made] == [
        (0, b"<user>", 0.9, 7), (1, b"<user>Why", 0.9, 7)
    ]  # fmt: skip


def test_what_is_worth_an_answer():
    code = Prompt("Write a function", "code")
    written = [
        (code, LONG, True),
        (code, LONG.upper().replace("WRITE", "Write"), True),  # the same question but for its case
        (code, LONG + " cut off", False),
        (Prompt("Why", "chat"), " is it?", True),  # short
        (Prompt("", "chat"), "  What makes the sea look blue from above? ", True),
        (Prompt("If", "maths"), " nobody counts them, who knows?", True),
    ]
    assert list(questions(written, 1)) == [
        Prompt("Write a function" + LONG, "code"),
        Prompt("What makes the sea look blue from above?", "chat"),
        Prompt("If nobody counts them, who knows?", "chat"),
    ]


def test_half_of_maths_is_asked_for_a_boxed_answer():
    written = [(Prompt("Find", "maths"), f" the sum of {i} and {i + 1} and 17", True) for i in range(200)]
    made = list(questions(written, 3))
    boxed = [p for p in made if p.text.endswith(MATHS_SUFFIX)]
    assert len(made) == 200 and 70 <= len(boxed) <= 130
    assert made == list(questions(written, 3))

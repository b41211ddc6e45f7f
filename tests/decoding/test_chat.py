import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from decoding.chat import ChatTokenizer
from decoding.request import RequestError

TEMPLATE = """{% for m in messages %}
{% if m.role not in ['system', 'user', 'assistant'] %}
{{ raise_exception('role ' + m.role + ' is unknown') }}
{% endif %}
{{ bos_token }}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def folder(tmp_path, template=TEMPLATE):
    vocabulary = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz<>/ .")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary | {"[U]": 99}, unk_token="[U]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


def test_renders_as_hugging_face_does(tmp_path):
    chat = ChatTokenizer(folder(tmp_path))
    messages = [{"role": "system", "content": " be kind "}, {"role": "user", "content": "hi"}]
    assert chat.render(messages) == "<s><system>be kind</s>\n<s><user>hi</s>\n<assistant>"
    assert chat.tokenizer.decode(chat.encode_messages(messages)).replace(" ", "").endswith("<assistant>")


BAD = [
    ([], "messages is empty or not a list"),
    ("hi", "messages is empty or not a list"),
    (["hi"], "messages[0] must be an object"),
    ([{"role": "user"}], "messages[0].content must be a string."),
    ([{"role": 1, "content": "x"}], "messages[0] must be an object"),
    ([{"role": "user", "content": "x"}, {"role": "user", "content": None}], "messages[1].content must be a string."),
    ([{"role": "robot", "content": "x"}], "messages were refused by the chat template: role robot is unknown."),
    ([{"role": "user", "content": "\ud800"}], "messages[0].content holds a lone surrogate; it must be valid Unicode."),
]


@pytest.mark.parametrize("messages, message", BAD)
def test_bad_messages_are_refused_in_one_sentence(tmp_path, messages, message):
    with pytest.raises(RequestError) as error:
        ChatTokenizer(folder(tmp_path)).render(messages)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


ESCAPES = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ messages.append({}) }}",
    "{% for i in range(10000000000) %}{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_reaches_nothing_but_its_messages(tmp_path, template):
    chat = ChatTokenizer(folder(tmp_path, template))
    with pytest.raises(RequestError):
        chat.render([{"role": "user", "content": "x"}])


def test_content_is_data_not_a_template(tmp_path):
    text = ChatTokenizer(folder(tmp_path)).render([{"role": "user", "content": "{{ 7 * 7 }}"}])
    assert "{{ 7 * 7 }}" in text


def test_without_a_template_or_a_tokenizer(tmp_path):
    chat = ChatTokenizer(folder(tmp_path, template=None))
    with pytest.raises(RequestError, match="needs? a chat template and this bundle has none"):
        chat.render([{"role": "user", "content": "x"}])
    assert len(chat.encode("abc")) == 3
    with pytest.raises(RequestError, match="prompt holds a lone surrogate"):
        chat.encode("\udfff")
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        ChatTokenizer(tmp_path / "none")

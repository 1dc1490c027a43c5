"""Chat templates: what they render, and that a hostile one can neither break out nor use up the machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from frontends.chat_template import ChatTemplate, RenderLimits, load_chat_template
from frontends.tokenizer import load_tokenizer
from ir.diagnostics import DiagnosticError
from tests.frontends.tokenizer_files import byte_level, with_bos, write_tokenizer

DIALOGUE = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "?"},
]
CHATML = """{{ bos_token }}{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}"""


def _template(text: str, **limits: Any) -> ChatTemplate:
    return ChatTemplate({"default": text}, {"bos_token": "<s>"}, "model", RenderLimits(**limits))


def _render(text: str, messages: Any = None, **options: Any) -> str:
    return _template(text).render(messages or DIALOGUE, **options)


def _refused(text: str, messages: Any = None, limits: dict[str, Any] | None = None) -> str:
    with pytest.raises(DiagnosticError) as caught:
        _template(text, **(limits or {})).render(messages or DIALOGUE)
    return str(caught.value)


def test_a_usual_template() -> None:
    """Blocks take the line break after them along, and the blanks before: trim_blocks and lstrip_blocks."""
    wanted = "<s>" + "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n\n" for m in DIALOGUE)
    assert _render(CHATML, add_generation_prompt=False) == wanted
    assert _render(CHATML) == wanted + "<|im_start|>assistant\n\n"
    assert _render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_helpers() -> None:
    assert _render("{{ {'b': '<é>', 'a': [1, none]} | tojson }}") == '{"b": "<é>", "a": [1, null]}'
    assert _render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'
    assert re.fullmatch(r"\d{4}", _render("{{ strftime_now('%Y') }}"))
    assert _render("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endfor %}") == "x"
    counting = "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    assert _render("{% set ns = namespace(n=0) %}" + counting + "{{ ns.n }}") == "3"
    assert _render("{% generation %}a{{ 1 }}{% endgeneration %}b") == "a1b"
    assert _render("{{ tools is none }}{{ documents is none }}") == "TrueTrue"
    assert _render("{{ thinking }}", variables={"thinking": "on"}) == "on"
    assert _render("{{ messages[0].content | trim | upper }}") == "HI"


def test_unicode_passes_unchanged() -> None:
    text = "日本\u2028🙂\x00\x7f\ud800"
    assert _render("{{ messages[0]['content'] }}", [{"role": "user", "content": text}]) == text


def test_raise_exception_and_faults_name_the_template() -> None:
    text = _refused("{{ raise_exception('roles must alternate') }}")
    assert text == "model: error: the chat template fails: roles must alternate"
    assert "the chat template fails: unexpected '}' (line 2)" in _refused("a\n{{ } }}")
    assert "'dict object' has no attribute 'x'" in _refused("{{ messages[0].x.y }}")
    assert "ZeroDivisionError: " in _refused("{{ 1 / 0 }}")
    assert "TypeError" in _refused("{{ 1 + 'a' }}")


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ self.__init__.__globals__.__builtins__.__import__('os').system('true') }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
        "{% set ns = namespace(__class__=1) %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.x.y }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_ways_out_of_the_sandbox_are_closed(text: str) -> None:
    assert "the chat template fails: " in _refused(text)


def test_format_shows_no_attributes() -> None:
    assert _render("{{ '{0.__class__}'.format(1) }}") == ""
    assert _render("{{ '{a.__class__}'.format_map({'a': 1}) }}") == ""


def test_a_template_that_does_not_end_is_stopped() -> None:
    # It would run for days; that it comes back at all is the test.
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}" * 1
    text = _refused(loops + "{% endfor %}{% endfor %}", limits={"seconds": 1.0})
    assert "model: error: the chat template ran for more than 1 s and was stopped" in text


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 2000000000 }}",
        "{{ ['a'] * 2000000000 }}",
        "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    ],
)
def test_memory_is_limited(text: str) -> None:
    assert "the chat template needs more than 512 MiB of memory" in _refused(text, limits={"seconds": 60.0})


def test_length_is_limited() -> None:
    text = _refused("{% for i in range(99999) %}{{ 'abc' * 100 }}{% endfor %}", limits={"max_chars": 1000})
    assert text == "model: error: the chat template makes more than 1000 characters"
    assert len(_template("{{ 'a' * 1000 }}", max_chars=1000).render(DIALOGUE)) == 1000


def test_a_huge_power_is_stopped() -> None:
    text = _refused("{{ 9 ** (9 ** 9) }}", limits={"seconds": 1.0})  # it would run for years
    assert "was stopped" in text or "memory" in text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the dialogue is no list of messages"),
        ([{"content": "x"}], "the dialogue is no list of messages"),
        (["x"], "the dialogue is no list of messages"),
        ([{"role": "user", "content": object()}], "the dialogue is not plain data"),
    ],
)
def test_bad_dialogues_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(DiagnosticError, match=message):
        _template("x").render(messages)


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    assert load_chat_template(tmp_path) is None
    config.write_text(json.dumps({"bos_token": "<s>", "chat_template": "{{ bos_token }}one"}))
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render(DIALOGUE) == "<s>one"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t{{ tools | length }}"}]
    config.write_text(json.dumps({"chat_template": named}))
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render(DIALOGUE) == "d"
    assert found.render(DIALOGUE, tools=[{"name": "f"}]) == "t1"
    assert found.render(DIALOGUE, tools=[{"name": "f"}], name="default") == "d"
    with pytest.raises(DiagnosticError, match="has no chat template 'tools'; did you mean 'tool_use'"):
        found.render(DIALOGUE, name="tools")
    (tmp_path / "chat_template.jinja").write_text("file")
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render(DIALOGUE) == "file"


@pytest.mark.parametrize("value", [5, [], {}, [{"name": "a"}], ["x"], [{"name": "a", "template": "x"}] * 2])
def test_bad_template_fields_are_refused(value: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(DiagnosticError, match="field 'chat_template' is "):
        load_chat_template(tmp_path)


def test_template_size_is_limited(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("x" * (1 << 21))
    with pytest.raises(DiagnosticError, match=r"chat_template\.jinja: error: is 2097152 bytes long"):
        load_chat_template(tmp_path)


def test_no_second_bos_when_encoded_as_documented(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, with_bos(byte_level(), "<|bos|>"), {"bos_token": "<|bos|>", "chat_template": CHATML})
    template, tokenizer = load_chat_template(tmp_path), load_tokenizer(tmp_path)
    assert template is not None
    ids = tokenizer.encode(template.render(DIALOGUE), add_special_tokens=False)
    assert ids.count(tokenizer.id_of("<|bos|>")) == 1

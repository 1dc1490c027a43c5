"""Chat templates: messages to the text that a model was trained on.

`load_chat_template(directory)` finds the template: `chat_template.jinja`, or `chat_template` in tokenizer_config.json,
a string or a list of named ones. `render` runs it with jinja2's sandbox in a process of its own, with limits on time,
memory and length: a sandbox keeps a template from calling what it should not, but not from computing for ever. The
rendered text holds its special tokens already; encode it with `add_special_tokens=False`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frontends.checkpoint_files import check_directory, companion
from frontends.json_file import MEBIBYTE, read_json_object, read_text
from frontends.tokenizer import MAX_CONFIG_BYTES, special_token_texts
from ir.diagnostics import DiagnosticError
from ir.spelling import did_you_mean

_WORKER = Path(__file__).with_name("chat_template_worker.py")


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may use. A dialogue of a hundred thousand words takes well under a second and 64 MiB."""

    seconds: float = 5.0
    memory_bytes: int = 512 * MEBIBYTE  # address space of the whole worker, Python included
    max_chars: int = 8 * MEBIBYTE


@dataclass(frozen=True)
class ChatTemplate:
    """Templates by name ("default" is the usual one), and the special tokens they may mention."""

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]
    where: str
    limits: RenderLimits = field(default_factory=RenderLimits)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        name: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a dialogue. Raises DiagnosticError for what the template refuses and for limits exceeded.

        `messages` have "role" and "content"; `add_generation_prompt` ends the text where the assistant's answer
        begins; `variables` are extra names for the template, as `enable_thinking`.
        """
        if not messages or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
            raise DiagnosticError(
                "the dialogue is no list of messages", expected='[{"role": ..., "content": ...}, ...]'
            )
        values: dict[str, Any] = {
            **self.special_tokens,
            "messages": [dict(m) for m in messages],
            "tools": [dict(t) for t in tools] if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **(variables or {}),
        }
        return _run(self._choose(name, bool(tools)), values, self.limits, self.where)

    def _choose(self, name: str | None, has_tools: bool) -> str:
        """The template asked for; "tool_use" for a dialogue with tools where there is one; else "default"."""
        if name is None:
            name = "tool_use" if has_tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise DiagnosticError(
                f"has no chat template {name!r}{did_you_mean(name, self.templates)}",
                where=self.where,
                expected=f"one of {', '.join(self.templates)}",
            )
        return self.templates[name]


def load_chat_template(directory: Path) -> ChatTemplate | None:
    """The chat template of a model directory, None when the model has none (a base model)."""
    check_directory(directory)
    config_path = companion(directory, "tokenizer_config.json")
    config = read_json_object(config_path, limit=MAX_CONFIG_BYTES) if config_path is not None else {}
    file = companion(directory, "chat_template.jinja")
    if file is not None:
        return ChatTemplate({"default": read_text(file)}, special_token_texts(config), str(file))
    found = config.get("chat_template")
    if found is None:
        return None
    return ChatTemplate(_named(found, str(config_path)), special_token_texts(config), str(config_path))


def _named(found: Any, where: str) -> dict[str, str]:
    """The field `chat_template`: a string, or a list of objects with `name` and `template`."""
    entries = found if isinstance(found, list) else [{"name": "default", "template": found}]
    templates: dict[str, str] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        text = entry.get("template") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not isinstance(text, str) or name in templates:
            raise DiagnosticError(
                "field 'chat_template' is no template",
                where=where,
                expected='a string, or a list of {"name": ..., "template": ...} with different names',
            )
        templates[name] = text
    if not templates:
        raise DiagnosticError("field 'chat_template' is an empty list", where=where, expected="at least one template")
    return templates


def _run(template: str, values: Mapping[str, Any], limits: RenderLimits, where: str) -> str:
    try:
        request = json.dumps(
            {
                "template": template,
                "variables": values,
                "seconds": limits.seconds,
                "memory_bytes": limits.memory_bytes,
                "max_chars": limits.max_chars,
            }
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise DiagnosticError(f"the dialogue is not plain data: {error}", expected="what JSON can hold") from None
    command = [sys.executable, "-P", str(_WORKER)]
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=limits.seconds)
    except subprocess.TimeoutExpired:
        raise DiagnosticError(
            f"the chat template ran for more than {limits.seconds:g} s and was stopped",
            where=where,
            expected="a template that ends",
        ) from None
    except OSError as error:
        message = f"the chat template cannot be run: {error.strerror or error}"
        raise DiagnosticError(message, where=where) from None
    return _text_of(done, limits, where)


def _text_of(done: subprocess.CompletedProcess[str], limits: RenderLimits, where: str) -> str:
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {"error": "memory" if "MemoryError" in done.stderr else "ended", "message": ""}
    if "text" in answer:
        return answer["text"]
    messages = {
        "memory": f"the chat template needs more than {limits.memory_bytes // MEBIBYTE} MiB of memory",
        "length": f"the chat template makes more than {limits.max_chars} characters",
        "template": f"the chat template fails: {answer['message']}",
        "ended": f"the chat template ended its process with status {done.returncode}",
    }
    raise DiagnosticError(messages[answer["error"]], where=where)

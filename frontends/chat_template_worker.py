"""Renders one chat template. Run as a program of its own by `frontends.chat_template`; never imported.

Reads one JSON object from standard input (template, variables, limits), writes one to standard output: {"text": ...}
or {"error": kind, "message": ...}. The template is hostile: it runs in jinja2's immutable sandbox, in this process
alone, whose memory and processor time are limited before anything of the template is looked at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any


def limit_process(memory_bytes: int, seconds: float) -> None:
    """Limits of the operating system; where it has none of a kind, the caller's own time limit remains."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    wanted = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # the system has a lower limit already, or does not support this one
            continue


def make_environment() -> Any:
    """The environment that templates of Hugging Face checkpoints are written for."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationBlock(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is only text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class SafeNamespace(Namespace):
        """A namespace that keeps no underscored names, the usual first step out of a sandbox."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            for name in dict(*args[1:], **kwargs):
                SafeNamespace.check(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            SafeNamespace.check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"namespace attributes that begin with '_' are refused: {name!r}")

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # jinja2's own filter escapes characters of HTML, which changes the prompt
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = SafeNamespace
    return environment


def joined(pieces: Iterable[str], max_chars: int) -> str | None:
    """The pieces as one text; None as soon as it is too long."""
    kept = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > max_chars:
            return None
        kept.append(piece)
    return "".join(kept)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """What the worker writes for a request."""
    from jinja2 import TemplateError

    try:
        template = make_environment().from_string(request["template"])
        text = joined(template.generate(**request["variables"]), request["max_chars"])
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        return {"error": "template", "message": f"{error.message}" + (f" (line {line})" if line else "")}
    except MemoryError:
        return {"error": "memory", "message": ""}
    except RecursionError:
        return {"error": "template", "message": "the recursion is too deep"}
    except Exception as error:  # noqa: BLE001  whatever Python raises for what the template computes
        return {"error": "template", "message": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"error": "length", "message": ""} if text is None else {"text": text}


def main() -> None:
    request = json.load(sys.stdin)
    limit_process(request["memory_bytes"], request["seconds"])
    json.dump(answer(request), sys.stdout)


if __name__ == "__main__":
    main()

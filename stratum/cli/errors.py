"""Faults become one message on stderr and an exit code.

Diagnostics of the compiler and of the runtime, mistakes on the command line and what the operating system refuses
(disk full, no permission, out of memory) are the user's to mend: exit code 2, no traceback; 3 where a model does not
fit the memory it was given. Anything else is a bug of ours: one line that says how to see the traceback, exit code 70.
Ctrl-C is 130, a reader that closed our pipe is 141. With `--json` the message is also the last object on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable

import click

from ir.diagnostics import DiagnosticError
from runtime.errors import RuntimeDiagnostic

EXIT_FAULT = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
TRACEBACK_VARIABLE = "STRATUM_TRACEBACK"


def guarded(work: Callable[[], object], *, as_json: bool = False) -> int:
    """Calls `work` and returns the exit code. An int that `work` returns is its exit code; anything else means 0.

    With `as_json` a fault is told on stdout too: `{"event": "error", "message": ..., "exit_code": ...}`.
    """
    told: list[str] = []
    code = _code_of(work, told)
    if as_json and told:
        with contextlib.suppress(OSError, ValueError):
            print(json.dumps({"event": "error", "message": told[0], "exit_code": code}, ensure_ascii=False), flush=True)
    return code


def _code_of(work: Callable[[], object], told: list[str]) -> int:
    """The exit code of `work`; what is said of a fault is said on stderr and put into `told`."""

    def say(text: str) -> None:
        told.append(text)
        _to_stderr(text)

    try:
        result = work()
        sys.stdout.flush()
    except (DiagnosticError, RuntimeDiagnostic) as error:
        return _fault(say, str(error), getattr(error, "exit_code", EXIT_FAULT))
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        return EXIT_FAULT
    except click.ClickException as error:
        say(_usage_text(error))
        return EXIT_FAULT
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        return _fault(say, _os_error_text(error))
    except MemoryError:
        return _fault(
            say, "error: not enough memory\nhint: a smaller --context needs less; 'inspect' shows what a model needs"
        )
    except Exception as error:  # noqa: BLE001 - the last line of defence; the traceback is one variable away
        return _bug(say, error)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _fault(say: Callable[[str], None], text: str, code: int = EXIT_FAULT) -> int:
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exc()
    say(text)
    return code


def _bug(say: Callable[[str], None], error: Exception) -> int:
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exc()
    first_line = (str(error).splitlines() or [""])[0]
    say(
        f"internal error: {type(error).__name__}: {first_line}\n"
        f"hint: this is a bug in stratum; run again with {TRACEBACK_VARIABLE}=1 and report the traceback"
    )
    return EXIT_BUG


def _usage_text(error: click.ClickException) -> str:
    text = error.format_message()
    lines = [f"error: {text[:1].lower()}{text[1:].rstrip('.')}"]
    context = getattr(error, "ctx", None)
    if isinstance(error, click.UsageError) and context is not None:
        lines.append(f"hint: try '{context.command_path} --help'")
    return "\n".join(lines)


def _os_error_text(error: OSError) -> str:
    where = f"{os.fspath(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    return f"{where}error: {error.strerror or error}"


def _to_stderr(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody is listening any more
        print(text, file=sys.stderr, flush=True)


def _discard_stdout() -> None:
    """The reader is gone: what is still buffered must not raise again when the interpreter flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

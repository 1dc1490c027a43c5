"""One measured engine in a process of its own: the parent asks by a JSON line, the child answers by one.

    engine = Engine("llama.cpp q4_0", [python, "-m", "bench.peers.llama_cpp_child", "model.gguf"])   # parent
    engine.ask({"do": "decode", "tokens": 64, "depth": 0})["seconds"]
    serve(handler)                                                                                  # child

Children stay alive and idle between requests, so that rows of several engines can be taken in turns: only the one that
was asked works. What a child writes to stdout besides answers (native libraries print) goes to its log.
Standard library only: this file also runs in the peers' environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Answer = dict[str, Any]
TOPIC_TOKENS = 16


class EngineError(Exception):
    """A child that ended or answered with an error; the message is for the table's notes."""


class Engine:
    """A child process; `about` is what it said of itself after loading the model."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (lives as long as the child)
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
        )
        try:
            self.about = self.ask({"do": "about"})
        except EngineError:
            self.close()
            raise

    @property
    def process(self) -> int:
        """Its id."""
        return self._child.pid

    def ask(self, request: dict[str, Any]) -> Answer:
        """Sends a request and waits for the answer. Raises EngineError when there is none, or it names an error."""
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except OSError:
            line = ""
        if not line:
            self._child.wait()
            raise EngineError(f"{self.name} ended with {self._child.returncode}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the child; its memory is free when this returns."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # the child is gone already
        try:
            self._child.wait(20)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else "no message"

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def serve(handlers: dict[str, Callable[[dict[str, Any]], Answer]]) -> None:
    """Answers requests until stdin ends; `handlers` by the request's `do`. Errors are answered, not raised."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout; answers must stay alone there
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request["do"]](request)
        except Exception as fault:  # noqa: BLE001 (the parent decides what an error means)
            answer = {"error": f"{type(fault).__name__}: {fault}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # native libraries may hang in their clean-up


def token_ids(count: int, vocab_size: int, topics: int = 1) -> list[int]:
    """The same arbitrary tokens for every engine, spread over the vocabulary so that experts are used evenly.

    Where ids of a model belong to one of so many topics, id % topics (`examples.session_router`), `TOPIC_TOKENS` tokens
    are of the first one, as many then of the next, and so on: a conversation that drifts."""
    state, ids = 0x9E3779B97F4A7C15, []
    for number in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        topic = number // TOPIC_TOKENS % topics
        ids.append((state >> 33) % (vocab_size // topics) * topics + topic)
    return ids

"""Many prompts on one model: as many at once as are asked for, each with its own result or fault.

    for result in run_batch(model, read_lines(data), together=8): ...       # plain dicts, as each prompt ends

Lines are taken in their order; a line that ends makes room for the next (continuous batching). The lines of a
`session` are turns of one conversation: one at a time, each behind all that was said before, of which only what is new
is computed; between its turns a conversation keeps its slot, and its keys and values may lie on disk (`kv_spill` of the
session). Sequences of a step that do not fit into the memory of the cache together wait for each other. Tokens do not
depend on what else is in a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ir.diagnostics import DiagnosticError
from runtime.batching import Batch
from runtime.errors import RuntimeDiagnostic
from runtime.generation import GenerationParams, GenerationRequest, TokenEvent
from runtime.session import Session
from stratum.batch_lines import SAMPLING, BadLine, Line
from stratum.model import Model

MOST_BACK = 256  # positions that a conversation goes back at most where a ring holds the newest


@dataclass
class _Conversation:
    """What a session said so far, as ids and, of a dialogue, as messages. `ids` are those of the positions in its slot
    (-1: none yet), `turns` those that are left."""

    turns: int
    slot: int = -1
    ids: list[int] = field(default_factory=list)
    history: list[int] = field(default_factory=list)
    said: list[dict[str, Any]] = field(default_factory=list)
    busy: bool = False


@dataclass
class _Running:
    line: Line
    slot: int
    prompt: list[int]
    reused: int
    nbytes: int
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)


def slots_needed(lines: Iterable[Line | BadLine], together: int) -> int:
    """Slots of a session that runs them: one for each prompt at once, and for each conversation of several turns."""
    turns = _turns(lines)
    return together + sum(count > 1 for count in turns.values())


def run_batch(
    model: Model, lines: Sequence[Line | BadLine], *, together: int, chat: bool = False, **defaults: Any
) -> Iterator[dict[str, Any]]:
    """Results as prompts end: `id`, `text`, `token_ids`, `finish_reason`, `prompt_tokens`, `reused_tokens`, `ttft_s`,
    `total_s`, `seed`; or `id` and `error` (message, expected, hint). `defaults`: what lines do not say themselves.

    `model.session` has the `slots_needed`.
    """
    yield from _Scheduler(model, lines, together, chat, defaults).results()


class _Scheduler:
    def __init__(
        self, model: Model, lines: Sequence[Line | BadLine], together: int, chat: bool, defaults: dict[str, Any]
    ) -> None:
        assert isinstance(model.session, Session)  # slots are for the cpu
        self.model, self.session = model, model.session
        self.together, self.chat, self.defaults = together, chat, defaults
        self.waiting = deque(lines)
        self.conversations = {name: _Conversation(count) for name, count in _turns(lines).items()}
        self.free = deque(range(self.session.num_slots))
        self.batch = Batch(self.session, model.tokenizer.decode)
        self.running: dict[str, _Running] = {}
        spill = self.session.kv_spill
        self.room = spill.options.limit_bytes if spill is not None else None

    def results(self) -> Iterator[dict[str, Any]]:
        while self.waiting or self.running:
            yield from self._admit()
            if not self.running:
                continue
            for name, event in self.batch.step():
                running = self.running[name]
                if isinstance(event, RuntimeDiagnostic):
                    self._end(running, None)
                    yield _failed(name, event)
                    continue
                running.tokens.append(event.token)
                running.pieces.append(event.text)
                if event.finish_reason is not None:
                    yield self._end(running, event)

    def _admit(self) -> Iterator[dict[str, Any]]:
        """Lines in their order, but for turns that wait for the one before, until nothing more fits."""
        later: deque[Line | BadLine] = deque()
        while self.waiting and len(self.running) < self.together:
            line = self.waiting.popleft()
            if isinstance(line, BadLine):
                yield _failed(line.name, line.fault)
                continue
            conversation = self.conversations.get(line.session) if line.session is not None else None
            if conversation is not None and (conversation.busy or any(_same(line, other) for other in later)):
                later.append(line)
                continue
            try:
                fits = self._start(line, conversation)
            except (DiagnosticError, RuntimeDiagnostic) as fault:
                if conversation is not None:
                    conversation.turns -= 1
                    self._leave(conversation)
                yield _failed(line.name, fault)
                continue
            if not fits:
                later.append(line)
                break
        self.waiting.extendleft(reversed(later))

    def _start(self, line: Line, conversation: _Conversation | None) -> bool:
        """False where it has to wait for others to end. Raises where it can never run."""
        options = {**self.defaults, **line.options}
        sampling = self.model.sampling(**{name: options.get(name) for name in SAMPLING})
        params = GenerationParams(options.get("max_tokens", 128), sampling, tuple(options.get("stop", ())))
        prompt, said = self._prompt(line, conversation)
        nbytes = self._most_bytes(len(prompt) + params.max_tokens)
        if self.room is not None:
            if nbytes > self.room:
                raise RuntimeDiagnostic(
                    f"the sequence may take {nbytes} bytes of KV cache", expected=f"at most {self.room}, the limit",
                    hint="fewer tokens, or more memory for the cache (--kv-memory)",
                )  # fmt: skip
            if nbytes + sum(other.nbytes for other in self.running.values()) > self.room:
                return False
        there = conversation.ids if conversation is not None else []
        reuse = self._common(there, prompt)
        slot = conversation.slot if conversation is not None and conversation.slot >= 0 else self.free[0]
        request = GenerationRequest(prompt, params, self.model.defaults.eos_ids, reuse)
        self.batch.admit(line.name, request, slot)
        if self.free and slot == self.free[0]:
            self.free.popleft()
        if conversation is not None:
            conversation.slot, conversation.busy, conversation.said = slot, True, said
        self.running[line.name] = _Running(line, slot, prompt, reuse, nbytes)
        return True

    def _prompt(self, line: Line, conversation: _Conversation | None) -> tuple[list[int], list[dict[str, Any]]]:
        """Ids of all that was said and of this line, and the messages so far, where it is a dialogue."""
        given = line.prompt
        if isinstance(given, str) and self.chat:
            given = [{"role": "user", "content": given}]
        before = conversation if conversation is not None else _Conversation(1)
        messages = [message for message in given if isinstance(message, dict)]
        if messages:
            said = [*before.said, *messages]
            return self.model.encode(said), said
        if before.history and isinstance(given, str):  # goes on: no second beginning of a text
            return [*before.history, *self.model.tokenizer.encode(given, add_special_tokens=False)], before.said
        return [*before.history, *self.model.encode(given)], before.said

    def _most_bytes(self, positions: int) -> int:
        positions = min(positions, self.session.max_context)
        return self.session.kv.used_bytes(positions, positions - 1)

    def _common(self, there: list[int], prompt: list[int]) -> int:
        """Positions of the slot that the prompt begins with."""
        both = min(len(there), len(prompt) - 1)
        reuse = next((at for at in range(both) if there[at] != prompt[at]), max(0, both))
        return 0 if self.session.kv.ring_positions and len(there) - reuse > MOST_BACK else reuse

    def _end(self, running: _Running, event: TokenEvent | None) -> dict[str, Any]:
        """The result, with the last event; the slot is free, or the conversation's until its last turn."""
        line = running.line
        del self.running[line.name]
        text = "".join(running.pieces)
        conversation = self.conversations.get(line.session) if line.session is not None else None
        if conversation is None:
            self.session.release(running.slot)
            self.free.append(running.slot)
        else:
            conversation.busy = False
            conversation.turns -= 1
            conversation.ids = []
            if event is not None:
                conversation.ids = [*running.prompt, *running.tokens[:-1]]  # the last one was never computed
                ends = self.model.defaults.eos_ids
                conversation.history = [*running.prompt, *(token for token in running.tokens if token not in ends)]
                if conversation.said:
                    conversation.said = [*conversation.said, {"role": "assistant", "content": text}]
            self._leave(conversation)
        if event is None:
            return {}
        assert event.statistics is not None  # the runtime sets it on the last event
        seen = event.statistics
        return {
            "id": line.name, "text": text, "token_ids": running.tokens, "finish_reason": event.finish_reason,
            "prompt_tokens": seen.prompt_tokens, "reused_tokens": running.reused, "ttft_s": seen.ttft_s,
            "total_s": seen.total_s, "seed": seen.seed,
        }  # fmt: skip

    def _leave(self, conversation: _Conversation) -> None:
        """Behind its last turn."""
        if conversation.turns <= 0 and conversation.slot >= 0:
            self.session.release(conversation.slot)
            self.free.append(conversation.slot)
            conversation.slot = -1


def _same(line: Line, other: Line | BadLine) -> bool:
    return isinstance(other, Line) and other.session == line.session


def _turns(lines: Iterable[Line | BadLine]) -> dict[str, int]:
    """How many turns each conversation has."""
    found: dict[str, int] = {}
    for line in lines:
        if isinstance(line, Line) and line.session is not None:
            found[line.session] = found.get(line.session, 0) + 1
    return found


def _failed(name: str, fault: DiagnosticError | RuntimeDiagnostic) -> dict[str, Any]:
    if isinstance(fault, RuntimeDiagnostic):
        error = {"message": fault.message, "expected": fault.expected, "hint": fault.hint}
    else:
        first = fault.diagnostics[0]
        error = {"message": first.message, **{note.severity: note.message for note in first.notes}}
    return {"id": name, "error": {key: text for key, text in error.items() if text}}

"""Generation: prompts in, token events out, for one sequence or a continuous batch.

`generate` serves one prompt. `generate_batch` serves several on a session with several slots: every step carries one
token of each sequence that is generating and a piece of the prompt of those that are not yet, as many tokens as the
program takes; a sequence that ends makes room for the next waiting one. Both yield a `TokenEvent` a token, as it comes.

Refuses an empty prompt, a prompt longer than the context (with both numbers) and token ids outside the vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.sampling import Sampler, SamplingParams
from runtime.stepping import Stepper
from runtime.stop_strings import StopStrings
from runtime.stream_decoder import StreamDecoder

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class GenerationParams:
    """How long to go on and how to choose. `stop_strings` need a `decode` callable; they are not part of the text."""

    max_tokens: int = 128
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise RuntimeDiagnostic(f"max_tokens is {self.max_tokens}", expected="1 or more tokens to generate")
        if any(not stop for stop in self.stop_strings):
            raise RuntimeDiagnostic("a stop string is empty", expected="at least one character")


@dataclass(frozen=True)
class Statistics:
    """Times of one sequence, from its admission to its last token. Rates are 0 where there is nothing to divide."""

    prompt_tokens: int
    generated_tokens: int
    ttft_s: float  # time to first token: the prompt's steps and the first choice
    total_s: float
    seed: int

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.total_s - self.ttft_s) / (self.generated_tokens - 1) if self.generated_tokens > 1 else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.ttft_s if self.ttft_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return 1 / self.tpot_s if self.tpot_s > 0 else 0.0


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. `text` is what can be shown now (empty without a `decode`).

    On the last event of a sequence `finish_reason` is "stop" (a stop id or stop string), "length" (max_tokens) or
    "context" (no position left), and `statistics` is set; otherwise both are None.
    """

    sequence: int
    token: int
    text: str
    finish_reason: str | None = None
    statistics: Statistics | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence of a batch."""

    prompt_ids: Sequence[int]
    params: GenerationParams = field(default_factory=GenerationParams)
    stop_ids: Collection[int] = ()
    reuse: int = 0


def generate(
    session: Stepper,
    prompt_ids: Sequence[int],
    params: GenerationParams | None = None,
    *,
    stop_ids: Collection[int] = (),
    decode: Decode | None = None,
    on_token: Callable[[TokenEvent], None] | None = None,
    slot: int = 0,
    reuse: int = 0,
) -> Iterator[TokenEvent]:
    """Generates after `prompt_ids` in `slot`, whose earlier content is overwritten. The prompt is checked at once.

    `reuse` positions of the slot hold the first tokens of the prompt already, fewer than the prompt has.
    """
    if not 0 <= reuse <= max(0, len(prompt_ids) - 1):
        raise RuntimeDiagnostic(f"{reuse} positions of a prompt of {len(prompt_ids)} cannot be there already")
    request = GenerationRequest(prompt_ids, params or GenerationParams(), stop_ids, reuse)
    return _run([request], session, decode, on_token, [slot])


def generate_batch(
    session: Stepper,
    requests: Sequence[GenerationRequest],
    *,
    decode: Decode | None = None,
    on_token: Callable[[TokenEvent], None] | None = None,
) -> Iterator[TokenEvent]:
    """Generates for all requests, as many at a time as the session has slots; `TokenEvent.sequence` is the index.

    All prompts are checked before the first step.
    """
    return _run(requests, session, decode, on_token, list(range(session.num_slots)))


def _run(
    requests: Sequence[GenerationRequest],
    session: Stepper,
    decode: Decode | None,
    on_token: Callable[[TokenEvent], None] | None,
    slots: list[int],
) -> Iterator[TokenEvent]:
    """Checks now, generates as the caller iterates."""
    sequences = [RunningSequence(index, request, session, decode) for index, request in enumerate(requests)]
    return _events(sequences, session, on_token, slots)


def _events(
    waiting_sequences: list[RunningSequence],
    session: Stepper,
    on_token: Callable[[TokenEvent], None] | None,
    slots: list[int],
) -> Iterator[TokenEvent]:
    waiting = deque(waiting_sequences)
    free = deque(slots)
    active: list[RunningSequence] = []
    most_tokens = session.manifest.programs[-1].max_tokens
    while waiting or active:
        while waiting and free:
            waiting[0].admit(free.popleft())
            active.append(waiting.popleft())
        for sequence, logits in step_together(session, active, most_tokens):
            event = sequence.accept(logits)
            if event.finish_reason is not None:
                active.remove(sequence)
                free.append(sequence.slot)
            if on_token is not None:
                on_token(event)
            yield event


def step_together(
    session: Stepper, active: list[RunningSequence], most_tokens: int
) -> list[tuple[RunningSequence, np.ndarray]]:
    """One step for the active sequences; (sequence, its logits) of those that get a token from it.

    Generating sequences go first, so that a long prompt never delays them by more than one step; prompts share the
    room that is left in the order of admission.
    """
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    served: list[RunningSequence] = []
    pieces: list[tuple[RunningSequence, int]] = []
    for sequence in active:
        sequence.check_slot()
    for sequence in sorted(active, key=lambda s: len(s.unwritten) > 1):
        piece = sequence.unwritten[: max(0, most_tokens - len(ids))]
        if not piece:
            continue
        ids += piece
        positions += range(sequence.written, sequence.written + len(piece))
        slots += [sequence.slot] * len(piece)
        pieces.append((sequence, len(piece)))
        if len(piece) == len(sequence.unwritten):
            rows.append(len(ids) - 1)
            served.append(sequence)
    logits = session.step(ids, positions, slots, rows)
    for sequence, tokens in pieces:  # only now: a step that failed can be tried again
        sequence.advance(tokens)
    return list(zip(served, logits, strict=True))


class RunningSequence:
    """The state of one sequence: what is in the cache, what is to be written next, and what has been shown."""

    def __init__(self, index: int, request: GenerationRequest, session: Stepper, decode: Decode | None) -> None:
        self.index = index
        self.slot = -1
        self.unwritten = [int(token) for token in request.prompt_ids]  # next into the cache
        self.written = request.reuse  # positions in the cache
        self._prompt_tokens = len(self.unwritten)
        self._params = request.params
        self._stop_ids = frozenset(request.stop_ids)
        self._max_context = session.max_context
        self._sequence_in = session.sequence_in
        self._generated = 0
        self._started_s = self._first_s = 0.0
        _check_prompt(self.unwritten, session)
        if request.params.stop_strings and decode is None:
            raise RuntimeDiagnostic("stop strings were given without a decoder", expected="decode=, ids to text")
        self._sampler = Sampler(request.params.sampling, self.unwritten)
        self._characters = StreamDecoder(decode, self.unwritten) if decode is not None else None
        self.unwritten = self.unwritten[request.reuse :]
        self._stops = StopStrings(request.params.stop_strings)

    def admit(self, slot: int) -> None:
        """Starts the clock, in this slot."""
        self.slot = slot
        self._sequence_in[slot] = self
        self._started_s = time.perf_counter()

    def check_slot(self) -> None:
        """Raises RuntimeDiagnostic where another generation was given this one's slot since."""
        if self._sequence_in.get(self.slot) is not self:
            raise RuntimeDiagnostic(
                "another generation began in the same slot, so that this one cannot go on",
                expected="one generation of a session at a time, up to its end",
                hint="finish (or drop) one before the next, give several prompts together, or load the model twice",
            )

    def advance(self, tokens: int) -> None:
        """The next `tokens` unwritten tokens are in the cache."""
        self.written += tokens
        self.unwritten = self.unwritten[tokens:]

    def accept(self, logits: np.ndarray) -> TokenEvent:
        """Chooses the next token and says what came of it."""
        token = self._sampler.sample(logits)
        self._generated += 1
        now_s = time.perf_counter()
        if self._generated == 1:
            self._first_s = now_s
        reason = self._finish_reason(token)
        # A stop id is a mark, not text: what it would decode to is never shown.
        text = self._text(token, last=reason is not None, shown=token not in self._stop_ids)
        if self._stops.stopped:
            reason = "stop"
        if reason is None:
            self.unwritten = [token]
            return TokenEvent(self.index, token, text)
        statistics = Statistics(
            self._prompt_tokens,
            self._generated,
            self._first_s - self._started_s,
            now_s - self._started_s,
            self._sampler.seed,
        )
        return TokenEvent(self.index, token, text, reason, statistics)

    def _finish_reason(self, token: int) -> str | None:
        if token in self._stop_ids:
            return "stop"
        if self._generated >= self._params.max_tokens:
            return "length"
        return "context" if self.written >= self._max_context else None

    def _text(self, token: int, *, last: bool, shown: bool) -> str:
        if self._characters is None:
            return ""
        text = self._stops.push(self._characters.push(token)) if shown else ""
        if last:
            text += self._stops.push(self._characters.flush()) + self._stops.finish()
        return text


def _check_prompt(prompt: list[int], session: Stepper) -> None:
    if not prompt:
        raise RuntimeDiagnostic("the prompt is empty", expected="at least one token")
    if len(prompt) > session.max_context:
        raise RuntimeDiagnostic(
            f"the prompt has {len(prompt)} tokens, the context only {session.max_context}",
            expected=f"at most {session.max_context} tokens",
            hint="shorten the prompt"
            + (
                f" or ask for more context (the model was made for {session.manifest.max_context})"
                if session.max_context < session.manifest.max_context
                else ""
            ),
        )
    outside = next((token for token in prompt if not 0 <= token < session.vocab_size), None)
    if outside is not None:
        raise RuntimeDiagnostic(
            f"the prompt has token id {outside}",
            expected=f"ids of the model's vocabulary, 0..{session.vocab_size - 1}",
            hint="the tokenizer belongs to another model",
        )

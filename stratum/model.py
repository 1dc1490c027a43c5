"""A model ready to generate: an opened artifact with its tokenizer, chat template and sampling defaults.

model = stratum.load("model.stratum")
generation = model.generate("Once upon a time", max_tokens=64)
for piece in generation:
    print(piece, end="", flush=True)
generation.statistics.decode_tokens_per_s
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.diagnostics import DiagnosticError
from runtime.generation import GenerationParams, Statistics, TokenEvent
from runtime.generation import generate as generate_tokens
from runtime.kv_spill import SpillOptions
from runtime.kv_stream import KVStreamOptions
from runtime.sampling import SamplingParams
from runtime.session import Session
from stratum.device_choice import DeviceChoice, refuse_cpu_options, refused_on_gpus
from stratum.gpu_session import open_on_gpu
from stratum.stand_in_share import check_threshold

if TYPE_CHECKING:
    from frontends.chat_template import ChatTemplate
    from frontends.tokenizer import Tokenizer
    from passes.place.placement import Placement
    from runtime.cuda.session import CudaSession
    from runtime.prompt_cache import CachedGeneration
    from runtime.step_reader import RoutingListener
    from runtime.trace import Profile
    from stratum.progress import Progress
    from stratum.stream_placement import MemoryPlan

Message = Mapping[str, Any]


@dataclass(frozen=True)
class _TokenFacts:
    """What `load_generation_defaults` wants to know of a model; reading the whole config would import the families."""

    vocab_size: int
    bos_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    pad_ids: tuple[int, ...]


class Generation:
    """One text in the making: iterating gives its pieces as they come.

    `text`, `token_ids`, `finish_reason` and `statistics` are those of the whole text: asking for one generates what is
    missing. `cached` says what came from a prompt cache.
    """

    def __init__(
        self, prompt_ids: Sequence[int], events: Iterator[TokenEvent], cached: CachedGeneration | None = None
    ) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.cached = cached
        self._token_ids: list[int] = []
        self._pieces: list[str] = []
        self._last: TokenEvent | None = None
        self._events = events

    def events(self) -> Iterator[TokenEvent]:
        """The tokens as they come, with what the runtime says of each."""
        for event in self._events:
            self._token_ids.append(event.token)
            self._pieces.append(event.text)
            self._last = event
            yield event

    def __iter__(self) -> Iterator[str]:
        for event in self.events():
            if event.text:
                yield event.text

    def _finish(self) -> TokenEvent:
        """The last event."""
        for _ in self.events():
            pass
        if self._last is None or self._last.finish_reason is None:
            raise RuntimeError("the generation was interrupted before its end")
        return self._last

    @property
    def text(self) -> str:
        """The whole text."""
        self._finish()
        return "".join(self._pieces)

    @property
    def token_ids(self) -> list[int]:
        """The generated tokens, the end token included."""
        self._finish()
        return list(self._token_ids)

    @property
    def finish_reason(self) -> str:
        """`stop` (an end token or stop string), `length` (max_tokens) or `context` (no position left)."""
        return self._finish().finish_reason or ""

    @property
    def statistics(self) -> Statistics:
        """Times and rates."""
        statistics = self._finish().statistics
        assert statistics is not None  # the runtime sets it on the last event
        return statistics


@dataclass(frozen=True)
class Slots:
    """Room for several sequences (`stratum.batch_run`): `count` may be begun, `together` of them are in one step. A
    budget has room for the KV cache of `count`, or of `together` with `kv_spill`: then the others go to disk."""

    count: int = 1
    together: int = 1
    kv_spill: SpillOptions | None = None


class Model:
    """An artifact opened for generation. Close it, or use it in a `with` block; one text at a time.

    `memory`: bytes that the process may use; weights that do not fit are read as they are needed. `plan`: a file of
    `compile-model plan` that says what stays and what is read, by default as much as fits its own budget. `kv_dir`: a
    folder for what a budget has no room for of the KV cache of `max_context` positions. `stand_ins`: with `memory` or
    `plan`, experts of less than this share of a token's weight are computed from their copies in fewer bits when they
    are missing; the output is then not that of the full model. The last three are not for GPUs. `model.placement` is
    the plan that is executed: that of `compile-model plan` for the same budget and context.

    `device`: cpu, or cuda for an artifact that was built for a GPU; `device_memory` bounds what is used of that, in
    bytes, and `memory` what the process takes beside it; `missed_experts` (auto, fetch, cpu) says what is done about
    experts that it has no room for, `threads` how many threads of the CPU compute them. `progress` is told of weights
    on their way there. `slots` and `mmap` are for the cpu: without `mmap` the weights are copied into huge pages
    (`runtime.loaded_weights`).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        max_context: int | None = None,
        verify: bool = False,
        memory: int | None = None,
        expert_policy: str | None = None,
        plan: str | os.PathLike[str] | None = None,
        routing: RoutingListener | None = None,
        kv_dir: str | os.PathLike[str] | None = None,
        device: str | DeviceChoice = "cpu",
        device_memory: int | None = None,
        missed_experts: str | None = None,
        progress: Progress | None = None,
        stand_ins: float | None = None,
        slots: Slots | None = None,
        mmap: bool = True,
    ) -> None:
        self.path = Path(path)
        room = slots or Slots()
        self.stand_ins = check_threshold(stand_ins, streams=memory is not None or plan is not None)
        self.placement: Placement | None = None
        self.device_choice = device if isinstance(device, DeviceChoice) else DeviceChoice(device)
        if self.device_choice.device == "cuda":
            refuse_cpu_options(plan=plan, kv_dir=kv_dir, record_routing=routing, stand_ins=stand_ins,
                               expert_policy=expert_policy, no_mmap=None if mmap else True)  # fmt: skip
            given = {} if missed_experts is None else {"missed_experts": missed_experts}
            self.session: Session | CudaSession = open_on_gpu(
                path, memory=memory, device_memory=device_memory, max_context=max_context, verify=verify,
                progress=progress, threads=threads, **given,
            )  # fmt: skip
            self.manifest = self.session.manifest
            return
        stream = kv_stream = None
        if memory is not None or plan is not None:
            planned = self._plan(memory, max_context, expert_policy, plan, room)
            self.placement = planned.placement
            stream, max_context = replace(planned.stream, stand_ins=self.stand_ins), planned.context
            if planned.kv_bytes is not None:
                kv_stream = KVStreamOptions(planned.kv_bytes, str(kv_dir) if kv_dir is not None else None)
            if room.kv_spill is not None and room.kv_spill.limit_bytes is None:
                room = replace(room, kv_spill=replace(room.kv_spill, limit_bytes=self._kv_bytes(planned, room)))
        self.session = Session(
            path, threads=threads, max_context=max_context, verify=verify, stream=stream, routing=routing,
            kv_stream=kv_stream, num_slots=room.count, kv_spill=room.kv_spill, mmap=mmap,
        )  # fmt: skip
        self.manifest = self.session.manifest

    def _plan(
        self,
        memory: int | None,
        max_context: int | None,
        policy: str | None,
        plan: str | os.PathLike[str] | None,
        room: Slots,
    ) -> MemoryPlan:
        """What fits into `memory` bytes beside this process with all that it loads; or what `plan` says."""
        from runtime.artifact import open_artifact
        from stratum.memory_plan import plan_for
        from stratum.stream_placement import stream_for

        self.manifest = open_artifact(self.path).manifest
        with contextlib.suppress(DiagnosticError):
            _ = self.tokenizer  # without one, whoever asks for it is told
        spills = room.kv_spill is not None
        held = room.together if spills else room.count
        if plan is None:
            assert memory is not None
            return plan_for(self.path, memory, max_context, policy, held, kv_on_disk=not spills)
        made = stream_for(self.path, Path(plan), memory, max_context, policy, held)
        if spills and made.kv_bytes is not None:
            raise DiagnosticError(
                "the plan keeps layers of keys and values on a drive, and whole sequences may go to one as well",
                where=str(plan), expected="one of the two: a plan with kv in memory, or no --kv-spill",
            )  # fmt: skip
        return made

    def _kv_bytes(self, planned: MemoryPlan, room: Slots) -> int:
        """What the caches of the sequences of one step take."""
        from stratum.process_account import ProcessAccount

        return ProcessAccount(self.manifest, planned.stream.budget_bytes, 0, room.together).kv_bytes(planned.context)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back. Raises DiagnosticError when the model came without tokenizer.json."""
        from frontends.tokenizer import load_tokenizer

        return load_tokenizer(self.path, self.manifest.vocab_size)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """How dialogues are written; None for a base model."""
        from frontends.chat_template import load_chat_template

        return load_chat_template(self.path)

    @cached_property
    def defaults(self) -> Any:
        """`frontends.generation_config.GenerationDefaults`: sampling as the model's authors want it, and its end."""
        from frontends.config import open_config, token_ids
        from frontends.generation_config import load_generation_defaults

        config = open_config(self.path)
        ids = (token_ids(config, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        return load_generation_defaults(self.path, _TokenFacts(self.manifest.vocab_size, *ids))

    def default_sampling(self) -> SamplingParams:
        """What the model's generation_config.json asks for; greedy when it asks for nothing."""
        wish = self.defaults
        if not wish.do_sample:
            return SamplingParams(repetition_penalty=wish.repetition_penalty)
        return SamplingParams(wish.temperature, wish.top_k, wish.top_p, wish.min_p, wish.repetition_penalty)

    def sampling(self, **overrides: Any) -> SamplingParams:
        """The default sampling with the fields of `overrides` that are not None.

        Asking for any filter or seed of a greedy model without a temperature means temperature 1.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        base = self.default_sampling()
        if base.greedy and "temperature" not in given and set(given) & {"top_k", "top_p", "min_p"}:
            given["temperature"] = 1.0
        return replace(base, **given)

    def encode(self, prompt: str | Sequence[int] | Sequence[Message], *, chat: bool = False) -> list[int]:
        """Token ids of a prompt: a text, ids as they are, or the messages of a dialogue.

        `chat` makes a text the user's message of a dialogue. Raises DiagnosticError for an empty prompt and for
        dialogues with a model that has no chat template.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise DiagnosticError("the prompt is empty", expected="some text")
            if not chat:
                return self.tokenizer.encode(prompt)
            return self._encode_messages([{"role": "user", "content": prompt}])
        if len(prompt) and isinstance(prompt[0], Mapping):
            return self._encode_messages([message for message in prompt if isinstance(message, Mapping)])
        return [int(token) for token in prompt if not isinstance(token, Mapping)]

    def _encode_messages(self, messages: Sequence[Message]) -> list[int]:
        template = self.chat_template
        if template is None:
            raise DiagnosticError(
                "the model has no chat template",
                where=str(self.path),
                hint="it is a base model: give it a text to go on with, without --chat",
            )
        # The template writes the special tokens itself; a second one would shift every position.
        return self.tokenizer.encode(template.render(messages), add_special_tokens=False)

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        *,
        max_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        chat: bool = False,
        prompt_cache: str | os.PathLike[str] | None = None,
    ) -> Generation:
        """Starts a text after `prompt`; see `encode` for what that can be and `sampling` for the defaults.

        `prompt_cache` is a file that keeps the keys and values of a prompt: what this prompt has in common with it is
        taken from there, and the file then holds this one.

        Ends at one of the model's end tokens, at a stop string (not shown), after `max_tokens`, or when the context
        is full. Raises DiagnosticError or RuntimeDiagnostic for prompts that cannot be used.
        """
        if prompt_cache is not None and self.stand_ins:
            raise DiagnosticError(
                "a prompt cache keeps what the full model computes, and stand-ins may be used instead of it",
                expected="a prompt cache or stand-ins, not both",
            )
        ids = self.encode(prompt, chat=chat)
        sampling = self.sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        params = GenerationParams(max_tokens, sampling, (stop,) if isinstance(stop, str) else tuple(stop))
        ends: dict[str, Any] = {"stop_ids": self.defaults.eos_ids, "decode": self.tokenizer.decode}
        if prompt_cache is None:
            return Generation(ids, generate_tokens(self.session, ids, params, **ends))
        from runtime.prompt_cache import CachedGeneration, PromptCache

        if not isinstance(self.session, Session):
            raise refused_on_gpus(["--prompt-cache"])
        cached = CachedGeneration(PromptCache(prompt_cache, self.session), ids, params, **ends)
        return Generation(ids, cached.events(), cached)

    def profile(self) -> AbstractContextManager[Profile]:
        """Records every step inside a `with` block; see `runtime.trace.Profile`."""
        return self.session.profile()

    def close(self) -> None:
        """Ends the threads and unmaps everything."""
        self.session.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

"""What native code calls where a program waits for weights or for its KV cache: one C function, and its errors.

Thread 0 of the team calls it in the middle of a step; the others wait. An exception cannot pass through native code,
so it is kept and raised when the step has ended: native code ends the step when the answer is not 1, and the answer is
set last, so that an interrupt at any moment ends the step and never lets it go on without its weights.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from runtime.await_info import AwaitInfo
from runtime.kv_stream import KVStreamer
from runtime.kv_use import KVUse
from runtime.manifest import Manifest, ProgramInfo
from runtime.memory import Reservation
from runtime.stand_ins import choice_weights
from runtime.weight_streamer import WeightStreamer

READER_WORD, ANSWER_WORD, WANTED_WORD = 15, 16, 17
_THERE = 1
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)


class RoutingListener(Protocol):
    """Is told of every native call and the experts of its layers: `choices` i32 [tokens, top_k], and the router's
    `weights` f32 where the artifact says where they lie; `layer` counts those with experts."""

    def begins(self, positions: np.ndarray, slots: np.ndarray) -> None: ...
    def chosen(self, layer: int, choices: np.ndarray, weights: np.ndarray | None = None) -> None: ...


class StepReader:
    """Serves the waits of a session's programs, by streamers, a listener or both. `arguments`: the step's words,
    `arena` its activations, `kv_use` counts what the KV cache takes."""

    def __init__(
        self,
        manifest: Manifest,
        arguments: np.ndarray,
        streamer: WeightStreamer | None,
        listener: RoutingListener | None,
        kv: KVStreamer | None = None,
        arena: Reservation | None = None,
        kv_use: KVUse | None = None,
    ) -> None:
        self._arguments, self._arena, self._kv_use = arguments, arena, kv_use
        self._streamer, self._listener, self._kv = streamer, listener, kv
        pieces = manifest.weights.pieces
        experts = [n for n, piece in enumerate(pieces) if piece.kind == "experts"]
        self._layer_of = {piece: layer for layer, piece in enumerate(experts)}
        self._top_k = max(1, manifest.experts_per_token)
        self._wanted = {program.name: self._flags(program) for program in manifest.programs}
        self._program: ProgramInfo | None = None
        self._fault: BaseException | None = None
        self._function = _FUNCTION(self._called)
        self._address = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def _flags(self, program: ProgramInfo) -> np.ndarray:
        """1 where native code must call: waits for weights, then those for the KV cache."""
        flags = np.zeros(max(1, len(program.awaits) + len(program.kv_awaits)), np.uint8)
        if self._streamer is not None:
            flags[: len(program.awaits)] = np.frombuffer(self._streamer.wanted(program), np.uint8)
        if self._listener is not None:
            for number, wait in enumerate(program.awaits):
                flags[number] |= wait.piece in self._layer_of
        return flags

    @contextmanager
    def serving(
        self, program: ProgramInfo, ids: np.ndarray, positions: np.ndarray, slots: np.ndarray
    ) -> Iterator[None]:
        """Round one native call. Raises, at its end, what went wrong while it waited."""
        self._program, self._fault = program, None
        if self._listener is not None:
            self._listener.begins(positions, slots)
        if self._kv is not None:
            self._kv.begin(positions, slots)
            self._wanted[program.name][len(program.awaits) :] = self._kv.wanted(program)
        if self._streamer is not None:
            used = self._kv_use.after(positions, slots) if self._kv_use is not None else None
            self._streamer.begin(ids.tolist(), program, used)
        arguments = self._arguments
        arguments[READER_WORD] = self._address
        arguments[ANSWER_WORD] = 0
        arguments[WANTED_WORD] = self._wanted[program.name].ctypes.data
        hook = sys.unraisablehook
        sys.unraisablehook = self._keep
        try:
            yield
        finally:
            sys.unraisablehook = hook
            arguments[READER_WORD] = 0
            if self._streamer is not None:
                self._streamer.end()
            if self._kv is not None:
                self._kv.end()

    def fault(self) -> BaseException:
        """Why the call ended early."""
        return self._fault or KeyboardInterrupt()

    def _called(self, number: int, ids_address: int | None, count: int) -> None:
        try:
            program = self._program
            assert program is not None
            if number >= len(program.awaits):
                if self._kv is not None:
                    self._kv.wait_for(program.kv_awaits[number - len(program.awaits)])
                self._arguments[ANSWER_WORD] = _THERE
                return
            ids = np.empty(0, np.int32)
            if ids_address:
                ids = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(ids_address))
                if self._listener is not None:
                    self._tell(self._listener, program.awaits[number], ids)
            if self._streamer is not None:
                chosen = ids.tolist()
                used = self._streamer.wait_for(program, number, chosen)
                if used != chosen:
                    ids[:] = used
            self._arguments[ANSWER_WORD] = _THERE
        except BaseException as fault:  # noqa: BLE001 - raised again when native code has returned
            self._fault = fault

    def _tell(self, listener: RoutingListener, wait: AwaitInfo, ids: np.ndarray) -> None:
        weights = None
        if self._arena is not None:
            weights = choice_weights(wait, len(ids) // self._top_k, self._top_k, self._arena.view())
        listener.chosen(self._layer_of[wait.piece], ids.reshape(-1, self._top_k).copy(), weights)

    def _keep(self, unraisable: Any) -> None:
        """An interrupt before the first line of `_called` has nowhere else to go."""
        self._fault = self._fault or unraisable.exc_value or KeyboardInterrupt()

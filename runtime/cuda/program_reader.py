"""The manifest's `gpu` object -> what a GPU runs, as data (`runtime.cuda.program`).

The JSON is hostile until proven otherwise: every field is typed and bounded, every place lies inside of its memory,
every launch names a kernel that is there. Refuses with one RuntimeDiagnostic that names the field.
"""

from __future__ import annotations

import re
from typing import Any

from runtime.cuda.program import (
    INPUTS,
    ArenaArgument,
    Argument,
    CodeFiles,
    GpuLaunch,
    GpuProgram,
    GpuStep,
    InputArgument,
    KernelInfo,
    KVArgument,
    KVPlan,
    KVPlane,
    SizeArgument,
    Wait,
    WeightArgument,
)
from runtime.cuda.sizes import SizeExpr
from runtime.errors import RuntimeDiagnostic
from runtime.manifest_fields import Fields

MAX_THREADS = 1024
MAX_SHARED_BYTES = 227 << 10
MAX_LAUNCHES = 1 << 20
MAX_ARGUMENTS = 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_ARCHITECTURE = re.compile(r"sm_[0-9]{2,3}a?")


def read_step(values: dict[str, Any], where: str, weights_bytes: int, pieces: int) -> GpuStep:
    """The step that the manifest's `gpu` describes; the file of weights has that many bytes and pieces."""
    return _Reader(Fields(values, where, "gpu"), weights_bytes, pieces).step()


class _Reader:
    """Reads one `gpu` object."""

    def __init__(self, top: Fields, weights_bytes: int, pieces: int) -> None:
        self.top, self.weights_bytes, self.pieces = top, weights_bytes, pieces

    def step(self) -> GpuStep:
        code = self._code()
        self.kernels = {k.name: k for k in self._kernels()}
        self.kv = self._kv(self.top.child("kv"))
        programs = [self._program(fields) for fields in self.top.children("programs", 64)]
        if not programs:
            self.top.fail("programs", "at least one", [])
        programs.sort(key=lambda p: (p.max_tokens, p.name))
        return GpuStep(code, tuple(self.kernels.values()), tuple(programs), self.kv)

    def _code(self) -> tuple[CodeFiles, ...]:
        found = []
        for fields in self.top.children("code", 64):
            name = fields.text("architecture")
            if not _ARCHITECTURE.fullmatch(name):
                fields.fail("architecture", "a name like sm_90", name)
            found.append(CodeFiles(name, fields.text("ptx"), fields.text("cubin", "")))
        if not found:
            self.top.fail("code", "code for one architecture at least", [])
        return tuple(found)

    def _kernels(self) -> list[KernelInfo]:
        found = []
        for fields in self.top.children("kernels", 1 << 14):
            name, threads = fields.text("name"), fields.integer("threads", 32, MAX_THREADS)
            if not _NAME.fullmatch(name):
                fields.fail("name", "a C identifier", name)
            if threads % 32:
                fields.fail("threads", "whole warps of 32", threads)
            static, dynamic = (fields.integer(key, 0, MAX_SHARED_BYTES) for key in ("static", "dynamic"))
            found.append(KernelInfo(name, threads, static, dynamic))
        return found

    def _kv(self, fields: Fields) -> KVPlan:
        planes = tuple(
            KVPlane(
                plane.text("name"),
                plane.integer("heads", 1, 1 << 16),
                plane.integer("bytes", 1, 1 << 20),
                plane.integer("positions", 0, 1 << 30, 0),
            )
            for plane in fields.children("planes", 16)
        )
        return KVPlan(fields.integer("layers", 0, 1 << 16), planes, fields.integer("block", 1, 1 << 16))

    def _program(self, fields: Fields) -> GpuProgram:
        tokens, arena = fields.integer("max_tokens", 1, 1 << 20), fields.integer("arena_bytes", 0, 1 << 44)
        launches = tuple(self._launch(launch, arena) for launch in fields.children("launches", MAX_LAUNCHES))
        replays = fields.values.get("replays")
        if not isinstance(replays, bool):
            fields.fail("replays", "true or false", replays)
        name, piece_tokens = fields.text("name"), fields.integer("piece_tokens", 0, 1 << 16)
        return GpuProgram(name, tokens, arena, launches, piece_tokens, replays)

    def _launch(self, fields: Fields, arena: int) -> GpuLaunch:
        kernel = fields.text("kernel")
        if kernel not in self.kernels:
            fields.fail("kernel", "one of gpu.kernels", kernel)
        arguments = tuple(self._argument(argument, arena) for argument in fields.children("arguments", MAX_ARGUMENTS))
        writes = tuple(fields.integers("writes", 0, max(0, len(arguments) - 1)))
        if any(isinstance(arguments[i], SizeArgument | WeightArgument) for i in writes):
            fields.fail("writes", "numbers of arguments that are memory and no weights", list(writes))
        waits = tuple(self._wait(wait, arena) for wait in fields.children("waits", 1 << 10, ()))
        return GpuLaunch(kernel, _size(fields, "grid"), arguments, writes, fields.text("origin", ""), waits)

    def _wait(self, fields: Fields, arena: int) -> Wait:
        last = self.pieces - 1
        piece, done = fields.integer("piece", 0, last), tuple(fields.integers("done", 0, last))
        if "pairs" not in fields.values:
            return Wait(piece, done)
        return Wait(piece, done, fields.integer("ids", 0, arena), _size(fields, "pairs"))

    def _argument(self, fields: Fields, arena: int) -> Argument:
        values = fields.values
        if "arena" in values:
            return ArenaArgument(*self._range(fields, "arena", arena))
        if "weight" in values:
            offset, nbytes = self._range(fields, "weight", self.weights_bytes)
            return WeightArgument(offset, nbytes, fields.integer("piece", 0, self.pieces - 1))
        if "kv" in values:
            layer = fields.integer("kv", 0, self.kv.layers - 1)
            return KVArgument(layer, fields.integer("plane", 0, len(self.kv.planes) - 1))
        if "input" in values:
            if values["input"] not in INPUTS:
                fields.fail("input", f"one of {', '.join(INPUTS)}", values["input"])
            return InputArgument(str(values["input"]))
        if "size" not in values:
            fields.fail("", "an argument: arena, weight, kv, input or size", values)
        return SizeArgument(_size(fields, "size"))

    def _range(self, fields: Fields, key: str, end: int) -> tuple[int, int]:
        """(offset, bytes) inside of memory of `end` bytes."""
        offset, nbytes = fields.integer(key, 0, end), fields.integer("bytes", 0, end)
        if offset + nbytes > end or offset % 16:
            fields.fail(key, f"a multiple of 16 with {nbytes} bytes behind it below {end}", offset)
        return offset, nbytes


def _size(fields: Fields, key: str) -> SizeExpr:
    text = fields.text(key)
    try:
        return SizeExpr(text)
    except RuntimeDiagnostic as refused:
        fields.fail(key, refused.expected, text)

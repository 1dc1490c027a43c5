"""Loads an artifact's object code into this process.

Takes the bytes of one relocatable object (already checked by `runtime.artifact`), gives callables through ctypes, which
release the interpreter lock while native code runs. LLVM's ORC linker does the loading: nothing is compiled and no
system linker is needed. Refuses an object of another format or architecture, and one that lacks a promised symbol.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from runtime import host
from runtime.errors import RuntimeDiagnostic
from runtime.manifest_fields import REBUILD_HINT

_TEAM_SYMBOLS = ("stratum_run", "stratum_worker", "stratum_shutdown")
_ELF_MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine, System V ABI
_RELOCATABLE = 1  # e_type
_library_numbers = count()

_RUN = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
_SHUTDOWN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class NativeCode:
    """Loaded object code; alive until `close`. No thread may be inside it then.

    `run(team, function, arguments)` returns 0 or, when a bounded wait expired, another number; `worker(team, thread)`
    returns after `shutdown(team)`; all three take addresses. `functions` are the addresses of the step functions.
    """

    def __init__(self, code: bytes, step_symbols: Sequence[str], *, where: str) -> None:
        if sys.platform.startswith("linux"):
            _check_elf(code, where)
        self._library = _link(lambda builder: builder.add_object_img(code), (*_TEAM_SYMBOLS, *step_symbols), where)
        self.functions = {symbol: self._library[symbol] for symbol in step_symbols}
        self.run: Callable[[int, int, int], int] = _RUN(self._library["stratum_run"])
        self.worker: Callable[[int, int], None] = _WORKER(self._library["stratum_worker"])
        self.shutdown: Callable[[int], None] = _SHUTDOWN(self._library["stratum_shutdown"])

    def close(self) -> None:
        """Unloads the code."""
        self._library.close()


class _Library:
    """Linked code and the LLVM objects that keep it in memory."""

    def __init__(self, compiler: Any, tracker: Any, symbols: Sequence[str]) -> None:
        self._compiler = compiler
        self._tracker = tracker
        self._addresses = {symbol: int(tracker[symbol]) for symbol in symbols}

    def __getitem__(self, symbol: str) -> int:
        return self._addresses[symbol]

    def close(self) -> None:
        self._tracker.close()
        self._compiler.close()


def load_libraries() -> Any:
    """LLVM, ready to link; what it takes in memory is then taken."""
    import llvmlite.binding as llvm  # heavy: only when code is loaded

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


def _link(add: Callable[[Any], object], symbols: Sequence[str], where: str) -> _Library:
    """A library of its own with what `add` puts into it; the C library's symbols are visible to it."""
    llvm = load_libraries()
    builder = llvm.JITLibraryBuilder().add_current_process()
    add(builder)
    for symbol in symbols:
        builder.export_symbol(symbol)
    try:
        compiler = llvm.create_lljit_compiler(suppress_errors=True)
        tracker = builder.link(compiler, f"stratum-{next(_library_numbers)}")
    except RuntimeError as fault:
        raise RuntimeDiagnostic(
            f"the object code cannot be loaded: {str(fault).strip()}",
            where=where,
            expected=f"an object file that defines {', '.join(symbols)}",
            hint=REBUILD_HINT,
        ) from None
    return _Library(compiler, tracker, symbols)


def _check_elf(code: bytes, where: str) -> None:
    """Looks at the ELF header before LLVM does: LLVM ends the process on some foreign objects."""
    expected = f"a 64-bit little-endian relocatable ELF object for {host.host_architecture()}"
    if len(code) < 64 or code[:6] != b"\x7fELF\x02\x01":
        raise RuntimeDiagnostic(
            "the object code is not an ELF object", where=where, expected=expected, hint=REBUILD_HINT
        )
    kind, machine = struct.unpack_from("<HH", code, 16)
    if kind != _RELOCATABLE or _ELF_MACHINES.get(machine) != host.host_architecture():
        raise RuntimeDiagnostic(
            f"the object code is for ELF machine {machine} (type {kind})",
            where=where,
            expected=expected,
            hint=REBUILD_HINT,
        )


class CycleCounter:
    """Reads the counter that kernels stamp their profile with (TSC on x86-64, the virtual counter on AArch64)."""

    _TEXT = """
    declare i64 @llvm.readcyclecounter()
    define i64 @stratum_cycles() {
      %1 = call i64 @llvm.readcyclecounter()
      ret i64 %1
    }
    """

    def __init__(self) -> None:
        self._library = _link(lambda builder: builder.add_ir(self._TEXT), ("stratum_cycles",), "cycle counter")
        self._read = ctypes.CFUNCTYPE(ctypes.c_int64)(self._library["stratum_cycles"])

    def __call__(self) -> int:
        return self._read()

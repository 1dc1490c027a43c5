"""Runs the PTX of a kernel on numpy arrays: an oracle of the way from tile IR to PTX text, for tests.

Knows the instructions that the kernels here have, by the words of NVIDIA's "Parallel Thread Execution ISA", and refuses
others. All threads that stand at the lowest place go on together; what a warp does together waits for all its lanes, so
that they meet again behind branches. Copies arrive at once: that they are waited for is for `ir.grid_interpreter`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from ir.ops.grid_matrix import multiply_fragments
from ir.ops.tile_products import FmaOp
from tests.codegen.nvptx.ptx_hopper import FACTORS, GLOBAL_BASE, HopperInstructions

_TYPES: dict[str, Any] = {
    **{
        f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
        for kind, code in (("b", "u"), ("u", "u"), ("s", "i")) for bits in (16, 32, 64)
    },
    "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64), "pred": np.dtype(bool),
}  # fmt: skip
_PAIRS: dict[str, Any] = {"bf16x2": ml_dtypes.bfloat16, "f16x2": np.float16}
_WIDTHS = {"%rs": 2, "%rd": 8, "%r": 4, "%p": 1, "done": 1, "%left": 4}  # bytes of registers by their names
_WARP = 32
_TOGETHER = {"mma": _WARP, "shfl": _WARP, "ldmatrix": _WARP, "wgmma": 4 * _WARP}  # threads of one instruction
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.fmin, "max": np.fmax,  # of a number and no number the number
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    guard: str  # a predicate register, "" without one
    negated: bool
    words: tuple[str, ...]  # of the name, between its dots
    operands: tuple[Any, ...]  # a text, or a tuple of texts for {a, b}


@dataclass
class PtxKernel:
    """The code of one entry of a module."""

    parameters: list[str]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: str = ""

    @classmethod
    def of(cls, text: str, name: str) -> PtxKernel:
        head, body = text.split(f".entry {name}(", 1)[1].split("\n{\n", 1)
        made = cls(re.findall(r"(\w+_param_\d+)", head))
        lines = body.split("\n}\n", 1)[0].splitlines()
        statement = ""
        for line in lines:
            line = line.split("//")[0].strip().removesuffix(" }")
            if line.startswith("{ .reg"):
                continue
            if re.fullmatch(r"[$\w]+:", line):
                made.labels[line[:-1]] = len(made.code)
            elif line and not line.startswith("."):
                statement += " " + line
                if statement.endswith(";"):
                    made.code.append(_instruction(statement.strip(" ;")))
                    statement = ""
        return made


def _instruction(text: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%p\d+|done)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
    assert found, text
    operands = [
        tuple(x.strip() for x in part[1:-1].split(",")) if part.startswith("{") else part.strip()
        for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[4])
    ]
    return Instruction(found[2] or "", found[1] == "!", tuple(found[3].split(".")), tuple(operands))


class PtxMachine(HopperInstructions):
    """One launch: registers, memory and the place of every thread."""

    def __init__(self, kernel: PtxKernel, arguments: Sequence[Any], blocks: int, threads: int, shared: int) -> None:
        self.kernel, self.blocks, self.threads, self.total = kernel, blocks, threads, blocks * threads
        self.registers: dict[str, np.ndarray] = {}
        self.shared = np.full((blocks, shared), 0xCB, np.uint8)
        self.parameters: dict[str, int] = {}
        self.barriers = {}
        images, at = [], GLOBAL_BASE
        for name, value in zip(kernel.parameters, arguments, strict=True):
            if isinstance(value, np.ndarray):
                image = np.zeros(-(-value.nbytes // 256) * 256, np.uint8)
                image[: value.nbytes] = value.reshape(-1).view(np.uint8)
                images.append(image)
                self.parameters[name], at = at, at + len(image)
            else:
                self.parameters[name] = int(value)
        self.memory = np.concatenate(images)

    def run(self) -> None:
        place, waits = np.zeros(self.total, np.int64), np.zeros(self.total, bool)
        end = len(self.kernel.code)
        while True:
            ready = (place < end) & ~waits
            if not ready.any():
                assert not waits.any(), "threads wait at a barrier in vain"
                return
            who = self._next(place, ready)
            at = int(place[who[0]])
            place[who] += 1
            step = self.kernel.code[at]
            if step.guard:
                who = who[self.registers[step.guard][who] != step.negated]
            if not len(who):
                continue
            if step.words[0] == "bra":
                place[who] = self.kernel.labels[step.operands[0]]
            elif step.words[0] == "ret":
                place[who] = end
            elif step.words[0] == "bar":
                waits[who] = True
                whole = waits.reshape(self.blocks, -1).all(axis=1)
                waits &= ~np.repeat(whole, self.threads)
            else:
                self.execute(step, who)

    def _next(self, place: np.ndarray, ready: np.ndarray) -> np.ndarray:
        """The threads at the lowest place from which some can go on."""
        for at in np.unique(place[ready]):
            here = ready & (place == at)
            size = _TOGETHER.get(self.kernel.code[at].words[0], 1)
            here &= np.repeat(here.reshape(-1, size).all(axis=1), size)
            found = self.awake(self.kernel.code[at].words, self.kernel.code[at].operands, np.flatnonzero(here))
            if len(found):
                return found
        raise AssertionError("the lanes of a warp do not meet again, or a barrier is waited for in vain")

    # -- values

    def read(self, operand: str, type: str, who: np.ndarray) -> np.ndarray:
        dtype = _TYPES[type]
        if operand.startswith("%"):
            special = {"%tid.x": who % self.threads, "%ctaid.x": who // self.threads}
            special |= {"%ntid.x": np.full(len(who), self.threads), "%nctaid.x": np.full(len(who), self.blocks)}
            if operand in special:
                return special[operand].astype(dtype)
            bits = self.registers[operand][who]
            if bits.dtype == bool:
                return bits
            return bits.astype(f"u{min(bits.itemsize, dtype.itemsize)}").view(dtype)  # a wide register's low part
        if operand.startswith(("0f", "0d")):
            return np.full(len(who), np.array([int(operand[2:], 16)], f"u{dtype.itemsize}").view(dtype)[0])
        if re.fullmatch(r"-?\d+", operand):
            wide = np.array([int(operand)], np.int64 if int(operand) < 2**63 else np.uint64)
            return np.repeat(wide.astype(f"u{dtype.itemsize}").view(dtype), len(who))
        return np.zeros(len(who), dtype)  # the name of shared memory: it begins at 0

    def write(self, target: str, value: np.ndarray, who: np.ndarray) -> None:
        width = next(w for prefix, w in _WIDTHS.items() if target.startswith(prefix))
        if value.dtype.itemsize < width and value.dtype.kind in "iu":
            value = value.astype(f"{value.dtype.kind}{width}")  # into a wider register, its sign kept
        bits = value if value.dtype == bool else np.ascontiguousarray(value).view(f"u{width}")
        if target not in self.registers:
            self.registers[target] = np.zeros(self.total, bits.dtype)
        self.registers[target][who] = bits

    def bytes_at(self, operand: str, width: int, space: str, who: np.ndarray) -> tuple[Any, Any]:
        """(index into memory, memory) of `width` bytes for each thread; bounds and alignment are checked."""
        name, offset = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", operand).groups()  # type: ignore[union-attr]
        start = self.read(name, "u64", who).astype(np.int64) + int(offset or 0)
        assert (start % width == 0).all(), operand
        span = start[:, None] + np.arange(width)
        if space == "shared":
            assert (span >= 0).all() and (span < self.shared.shape[1]).all(), operand
            return (np.broadcast_to((who // self.threads)[:, None], span.shape), span), self.shared
        span = span - GLOBAL_BASE
        assert (span >= 0).all() and (span < len(self.memory)).all(), operand
        return span, self.memory

    # -- instructions

    def execute(self, step: Instruction, who: np.ndarray) -> None:
        name, words, operands = step.words[0], step.words, step.operands
        special = getattr(self, f"_{name}", None)
        if special is not None:
            special(words, operands, who)
            return
        type = words[-1]
        if words[-2:] == ("rn", "bf16x2"):
            self._pairs(name, operands, who)
            return
        values = [self.read(o, type, who) for o in operands[1:]]
        if name in _BINARY:
            made = _BINARY[name](*values)
        elif name in ("mul", "mad") and words[1] in ("lo", "rn"):
            made = values[0] * values[1] + (values[2] if name == "mad" else 0)
        elif name == "mul" and words[1] == "wide":
            made = values[0].astype(f"{values[0].dtype.kind}8") * values[1].astype(f"{values[0].dtype.kind}8")
        elif name == "mul" and words[1] == "hi":
            exact = values[0].astype(object) * values[1].astype(object)  # whole numbers without an end
            made = (exact >> 8 * values[0].dtype.itemsize).astype(values[0].dtype)
        elif name == "fma":
            made = np.asarray(FmaOp.reference(*values))
        elif name in ("div", "rcp"):
            made = self._quotient(*(values if name == "div" else (np.ones_like(values[0]), values[0])))
        elif name == "sqrt":
            made = np.sqrt(values[0])
        elif name == "neg":
            made = -values[0]
        elif name == "not":
            made = ~values[0]
        elif name == "abs":
            made = np.abs(values[0])
        elif name == "ex2":
            made = np.exp2(values[0].astype(np.float64)).astype(np.float32)
            made[made < np.float32(2.0**-126)] = 0
        else:
            raise ValueError(f"{'.'.join(words)} is not among the instructions that are known here")
        self.write(operands[0], made.astype(made.dtype if words[1] == "wide" else _TYPES[type]), who)

    @staticmethod
    def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if a.dtype.kind == "f":
            return a / b
        return (np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)).astype(a.dtype) if a.dtype.kind == "i" else a // b

    def _pairs(self, name: str, operands: Sequence[Any], who: np.ndarray) -> None:
        values = [self.read(o, "b32", who).view(ml_dtypes.bfloat16).astype(np.float64) for o in operands[1:]]
        made = values[0] * values[1] + values[2] if name == "fma" else values[0] + values[1]
        self.write(operands[0], made.astype(ml_dtypes.bfloat16).view(np.uint32), who)

    def _mov(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        target, source = operands
        if isinstance(source, tuple):  # {low, high} -> a register of twice the width
            halves = [self.read(s, f"b{int(words[1][1:]) // 2}", who) for s in source]
            self.write(target, np.stack(halves, axis=1).view(_TYPES[words[1]])[:, 0], who)
        elif isinstance(target, tuple):
            parts = self.read(source, words[1], who)[:, None].view(_TYPES[f"b{int(words[1][1:]) // 2}"])
            for i, register in enumerate(target):
                self.write(register, parts[:, i], who)
        elif words[1] == "pred":
            known = source.startswith("%p")
            self.write(target, self.registers[source][who] if known else np.full(len(who), source == "-1"), who)
        else:
            self.write(target, self.read(source, words[1], who), who)

    def _setp(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        a, b = (self.read(o, words[2], who) for o in operands[1:])
        self.write(operands[0], _COMPARE[words[1]](a, b), who)

    def _selp(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        a, b = (self.read(o, words[1], who) for o in operands[1:3])
        self.write(operands[0], np.where(self.registers[operands[3]][who], a, b), who)

    def _shl(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        count = self.read(operands[2], "u32", who)
        value = self.read(operands[1], words[1], who)
        self.write(operands[0], (value << count.astype(value.dtype)).astype(value.dtype), who)

    def _shr(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        value = self.read(operands[1], words[1], who)
        self.write(operands[0], value >> self.read(operands[2], "u32", who).astype(value.dtype), who)

    def _bfe(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        value = self.read(operands[1], words[1], who)
        first, count = int(operands[2]), int(operands[3])
        self.write(operands[0], (value >> value.dtype.type(first)) & value.dtype.type((1 << count) - 1), who)

    def _bfi(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        first, count = int(operands[3]), int(operands[4])
        low, value = (self.read(o, words[1], who) for o in operands[1:3])
        mask = value.dtype.type((1 << count) - 1 << first)
        self.write(operands[0], value & ~mask | low << value.dtype.type(first) & mask, who)

    def _prmt(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        chosen = int(operands[3].rstrip("U"), 0)
        assert words[1] == "b32" and not chosen & 0x8888, operands
        both = np.stack([self.read(o, "b32", who) for o in operands[1:3]], axis=1).view(np.uint8)
        picked = np.ascontiguousarray(both[:, [chosen >> 4 * i & 7 for i in range(4)]])
        self.write(operands[0], picked.view(np.uint32)[:, 0], who)

    def _cvt(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        if words[2] in _PAIRS:  # the first operand becomes the upper half
            upper, lower = (self.read(o, "f32", who).astype(_PAIRS[words[2]]) for o in operands[1:])
            self.write(operands[0], np.stack([lower, upper], axis=1).view(np.uint32)[:, 0], who)
            return
        if words[2] == "satfinite":  # two f8e4m3, the first operand the upper
            upper, lower = (self.read(o, "f32", who).clip(-448, 448) for o in operands[1:])
            codes = np.stack([lower, upper], axis=1).astype(ml_dtypes.float8_e4m3fn)
            self.write(operands[0], codes.view(np.uint16)[:, 0], who)
            return
        to, source = (words[-2], words[-1])
        value = self.read(operands[1], source, who)
        if words[1] == "rni":
            value = np.rint(value)
        self.write(operands[0], value.astype(ml_dtypes.bfloat16 if to == "bf16" else _TYPES[to]), who)

    def _ld(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        if words[1] == "param":
            self.write(operands[0], np.full(len(who), self.parameters[operands[1][1:-1]], np.int64), who)
            return
        targets = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
        item = _TYPES[words[-1]].itemsize
        index, memory = self.bytes_at(operands[1], item * len(targets), words[1], who)
        values = np.ascontiguousarray(memory[index]).view(_TYPES[words[-1]])
        for i, target in enumerate(targets):
            self.write(target, values[:, i], who)

    def _st(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        sources = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        values = np.stack([self.read(s, words[-1], who) for s in sources], axis=1)
        index, memory = self.bytes_at(operands[0], values.dtype.itemsize * len(sources), words[1], who)
        memory[index] = values.view(np.uint8)

    def _cp(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        if words[2] == "bulk":
            self._bulk(operands, who)
            return
        if words[2] not in ("ca", "cg"):
            return  # commit_group, wait_group
        nbytes = int(operands[2])
        assert nbytes == 16 or (words[2], nbytes) == ("ca", 4)
        target, shared = self.bytes_at(operands[0], nbytes, "shared", who)
        shared[target] = 0
        there = self.read(operands[3], "u32", who) == nbytes
        if there.any():
            index, memory = self.bytes_at(operands[1], nbytes, "global", who[there])
            shared[tuple(axis[there] for axis in target)] = memory[index]

    # -- warps

    @staticmethod
    def _warps(who: np.ndarray) -> None:
        lanes = who.reshape(-1, _WARP)
        assert (lanes == lanes[:, :1] + np.arange(_WARP)).all() and (lanes[:, 0] % _WARP == 0).all()

    def _shfl(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        self._warps(who)
        assert words[2] == "bfly" and operands[3:] == ("31", "-1")
        lanes = np.arange(len(who)) ^ int(operands[2])
        self.write(operands[0], self.read(operands[1], "b32", who)[lanes], who)

    def _ldmatrix(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        self._warps(who)
        index, memory = self.bytes_at(operands[1], 16, "shared", who)
        matrices = np.ascontiguousarray(memory[index]).view(np.uint16).reshape(-1, 4, 8, 8)
        if "trans" in words:
            matrices = matrices.swapaxes(2, 3)
        for i, target in enumerate(operands[0]):
            pairs = np.ascontiguousarray(matrices[:, i]).view(np.uint32)  # warp, row, pair of columns
            self.write(target, pairs.reshape(-1), who)

    def _mma(self, words: Sequence[str], operands: Sequence[Any], who: np.ndarray) -> None:
        self._warps(who)
        element = FACTORS[words[7]]
        factors = [np.stack([self.read(r, "b32", who) for r in group], axis=1).view(element) for group in operands[1:3]]
        sums = np.stack([self.read(r, words[-1], who) for r in operands[3]], axis=1)
        made = multiply_fragments(*(v.reshape(-1, _WARP, v.shape[1]) for v in (sums, *factors))).reshape(-1, 4)
        for i, target in enumerate(operands[0]):
            self.write(target, np.ascontiguousarray(made[:, i]), who)


def run_ptx(text: str, name: str, arguments: Sequence[Any], *, blocks: int, threads: int, shared: int) -> None:
    """Runs an entry of a module on arrays, changed in place, and ints."""
    machine = PtxMachine(PtxKernel.of(text, name), arguments, blocks, threads, max(16, shared))
    with np.errstate(all="ignore"):
        machine.run()
    for parameter, value in zip(machine.kernel.parameters, arguments, strict=True):
        if isinstance(value, np.ndarray):
            at = machine.parameters[parameter] - GLOBAL_BASE
            value.reshape(-1).view(np.uint8)[:] = machine.memory[at : at + value.nbytes]

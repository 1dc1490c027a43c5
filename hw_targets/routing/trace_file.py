"""Reads and writes routing traces: the text format `route_trace v1`, described in docs/routing_traces.md.

A file is a preamble of `#` lines with the model's facts, a line of column names, and one line for each routed expert.
Columns are found by name, in any order; unknown ones are ignored. Files come from elsewhere and are not trusted: sizes
are bounded by what the file holds, numbers by their meaning, and each fault is one diagnostic that names the line.
"""

from __future__ import annotations

import io
import re
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hw_targets.routing.trace import NO_EXPERT, RoutingTrace
from ir.diagnostics import DiagnosticError

MAGIC = "# route_trace v1"
COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight")
_OPTIONAL = ("batch",)
_FILE_LIMIT = 1 << 28  # bytes of text; some 8 million routed experts
_LINE_LIMIT = 4096
_HOLES = 64  # a dense array may have this many cells for each line that the file holds
_FACT = re.compile(r"(\w+)=(\S+)")
_LAYERS_LIMIT = 4096
_EXPERTS_LIMIT = 1 << 16
_BYTES_LIMIT = 1 << 50

Rows = dict[str, npt.NDArray[np.float64]]


def read_trace(path: str | Path) -> RoutingTrace:
    """The trace in the file, plain or gzip. DiagnosticError names the file and the line of the first fault."""
    try:
        with open(path, "rb") as file:
            data = file.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise DiagnosticError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    if data.startswith(b"\x1f\x8b"):
        data = _unzipped(data, str(path))
    if len(data) > _FILE_LIMIT:
        raise DiagnosticError("the trace is too large", where=str(path), expected=f"at most {_FILE_LIMIT} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_a_trace(str(path), f"byte {error.start} is not UTF-8") from None
    return parse_trace(text, where=str(path))


def _unzipped(data: bytes, where: str) -> bytes:
    """The text of a gzip file, at most one byte more than the limit."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        text = unpacker.decompress(data, _FILE_LIMIT + 1)
    except zlib.error as error:
        raise DiagnosticError(f"damaged gzip data: {error}", where=where) from None
    if not unpacker.eof and len(text) <= _FILE_LIMIT:
        raise DiagnosticError("the gzip data end too early", where=where)
    return text


def parse_trace(text: str, *, where: str = "trace") -> RoutingTrace:
    """The trace in `text`; `where` is the name that diagnostics give it."""
    if not text.startswith(MAGIC):
        raise _not_a_trace(where, "the first line is another one")
    model, sizes, head, body_start, body_line = _read_preamble(text, where)
    names = [name.strip() for name in head.split(",")]
    missing = [name for name in COLUMNS if name not in names]
    if missing or len(set(names)) != len(names):
        problem = f"no column {missing[0]!r}" if missing else "a column stands twice"
        raise DiagnosticError(problem, where=f"{where}:{body_line - 1}", expected=",".join(COLUMNS))
    rows = _read_rows(text[body_start:], names, where, body_line)
    return _assemble(rows, model, sizes, where, body_line)


def _not_a_trace(where: str, why: str) -> DiagnosticError:
    return DiagnosticError(
        f"not a routing trace: {why}",
        where=where,
        expected=f"a text file that begins with '{MAGIC}'",
        hint="'compile-model run MODEL --record-routing FILE' writes one",
    )


def _read_preamble(text: str, where: str) -> tuple[dict[str, str], dict[int, tuple[int, int]], str, int, int]:
    """(facts of the model, layer -> (expert bytes, dense bytes), names of the columns, where lines begin, their
    number)."""
    facts: dict[str, str] = {}
    sizes: dict[int, tuple[int, int]] = {}
    position, line_number = 0, 0
    while position < len(text):
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        line, line_number = text[position:end].rstrip("\r"), line_number + 1
        position = end + 1
        if len(line) > _LINE_LIMIT:
            raise DiagnosticError(f"a line of {len(line)} characters", where=f"{where}:{line_number}")
        if not line.startswith("#"):
            _check_facts(facts, where)
            return facts, sizes, line, position, line_number + 1
        found = dict(_FACT.findall(line))
        if "layer" in found:
            at = f"{where}:{line_number}"
            layer = _fact(found, "layer", at, 0, _LAYERS_LIMIT)
            if layer in sizes:
                raise DiagnosticError(f"layer {layer} is described twice", where=at)
            expert = _fact(found, "expert_bytes", at, 0, _BYTES_LIMIT)
            dense = _fact(found, "dense_bytes", at, 0, _BYTES_LIMIT) if "dense_bytes" in found else 0
            sizes[layer] = (expert, dense)
        else:
            facts = found | facts
    raise DiagnosticError("there is no line of column names", where=where, expected=",".join(COLUMNS))


def _check_facts(facts: dict[str, str], where: str) -> None:
    experts = _fact(facts, "n_expert", where, 1, _EXPERTS_LIMIT)
    _fact(facts, "n_expert_used", where, 1, experts)


def _fact(found: dict[str, str], name: str, where: str, low: int, high: int) -> int:
    text = found.get(name)
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 18 or not low <= int(text) <= high:
        said = "is not given" if text is None else f"is {text!r}"
        raise DiagnosticError(f"{name} {said}", where=where, expected=f"{name}=<a number from {low} to {high}>")
    return int(text)


def _read_rows(body: str, names: list[str], where: str, first_line: int) -> Rows:
    """Every line's numbers, by column."""
    wanted = [name for name in (*COLUMNS, *_OPTIONAL) if name in names]
    if not body.strip():
        raise DiagnosticError("the trace has no lines of routed experts", where=where)
    try:
        table = np.loadtxt(
            io.StringIO(body),
            delimiter=",",
            comments=None,
            ndmin=2,
            dtype=np.float64,
            usecols=[names.index(name) for name in wanted],
        )
    except ValueError:
        raise _bad_line(body, names, wanted, where, first_line) from None
    return {name: table[:, index] for index, name in enumerate(wanted)}


def _bad_line(body: str, names: list[str], wanted: list[str], where: str, first_line: int) -> DiagnosticError:
    """The diagnostic for the first line that is not numbers (numpy's own message counts lines differently)."""
    for number, line in enumerate(body.splitlines(), first_line):
        if not line.strip():
            continue
        fields = line.split(",")
        at = f"{where}:{number}"
        if len(fields) < len(names):
            return DiagnosticError(f"{len(fields)} fields", where=at, expected=f"{len(names)}: {','.join(names)}")
        for name in wanted:
            field = fields[names.index(name)][:40]
            try:
                float(field)
            except ValueError:
                return DiagnosticError(f"{name} is {field!r}", where=at, expected="a number")
    return DiagnosticError("the lines of routed experts cannot be read", where=where)


def _integers(rows: Rows, name: str, high: int, where: str, first_line: int) -> npt.NDArray[np.int64]:
    values = rows[name]
    wrong = ~((values >= 0) & (values <= high) & (values == np.floor(values)))
    if wrong.any():
        index = int(np.argmax(wrong))
        raise DiagnosticError(
            f"{name} is {values[index]:g} in the {index + 1}. routed expert",
            where=f"{where}:{first_line + index}",
            expected=f"a whole number from 0 to {high}",
        )
    return values.astype(np.int64)


def _assemble(
    rows: Rows, model: dict[str, str], sizes: dict[int, tuple[int, int]], where: str, first_line: int
) -> RoutingTrace:
    """The rows as arrays [token, layer, slot]; tokens by pass, turn and position."""
    expert_count, top_k = int(model["n_expert"]), int(model["n_expert_used"])
    turn = _integers(rows, "turn", 1 << 40, where, first_line)
    phase = _integers(rows, "phase", 1, where, first_line)
    position = _integers(rows, "step", 1 << 40, where, first_line)
    layer = _integers(rows, "layer", _LAYERS_LIMIT, where, first_line)
    slot = _integers(rows, "slot", top_k - 1, where, first_line)
    expert = _integers(rows, "expert", expert_count - 1, where, first_line)
    layers = np.unique(layer)
    _check_sizes(layers, sizes, where)
    if "batch" in rows:
        passes = _integers(rows, "batch", 1 << 40, where, first_line)
    else:  # a turn's prompt is one batch, each of its decoded tokens is one
        number = np.where(phase == 0, 0, position + 1)
        passes = np.unique(np.stack([turn, number], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    tokens, token = np.unique(np.stack([passes, turn, position, phase], axis=1), axis=0, return_inverse=True)
    cells = len(tokens) * len(layers) * top_k
    if cells > _HOLES * len(turn) + (1 << 16):
        raise DiagnosticError(
            f"{len(turn)} routed experts of {len(tokens)} tokens in {len(layers)} layers: nearly all are missing",
            where=where,
            expected=f"{top_k} lines for each token and layer",
        )
    cell = (token.reshape(-1) * len(layers) + np.searchsorted(layers, layer)) * top_k + slot
    again = _given_twice(cell)
    if again is not None:
        raise DiagnosticError(
            f"slot {slot[again]} of layer {layer[again]} at step {position[again]} is given twice",
            where=f"{where}:{first_line + again}",
        )
    experts = np.full(cells, NO_EXPERT, np.int32)
    weights = np.full(cells, np.nan, np.float32)
    experts[cell] = expert
    weights[cell] = np.clip(rows["weight"], -1e30, 1e30)
    shape = (len(tokens), len(layers), top_k)
    return RoutingTrace(
        model=model.get("model", ""),
        arch=model.get("arch", ""),
        expert_count=expert_count,
        top_k=top_k,
        layers=tuple(layers.tolist()),
        expert_bytes=tuple(sizes[n][0] for n in layers.tolist()),
        dense_bytes=tuple(sizes[n][1] for n in layers.tolist()),
        experts=experts.reshape(shape),
        weights=weights.reshape(shape),
        turn=tokens[:, 1],
        position=tokens[:, 2],
        batch=tokens[:, 0],
        decode=tokens[:, 3] == 1,
    )


def _check_sizes(layers: npt.NDArray[np.int64], sizes: dict[int, tuple[int, int]], where: str) -> None:
    """Without a size a cache would seem to hold a layer's experts for nothing."""
    for number in layers.tolist():
        if sizes.get(number, (0, 0))[0] <= 0:
            raise DiagnosticError(
                f"layer {number} has routed experts, but no size",
                where=where,
                expected=f"a line '# layer={number} expert_bytes=<bytes> dense_bytes=<bytes>'",
            )


def _given_twice(cell: npt.NDArray[np.int64]) -> int | None:
    """The row of the lowest cell that a row before it has filled."""
    order = np.argsort(cell, kind="stable")
    twice = np.flatnonzero(cell[order][1:] == cell[order][:-1])
    return int(order[int(twice[0]) + 1]) if len(twice) else None


def write_trace(trace: RoutingTrace, path: str | Path) -> None:
    """Writes the trace as text; `read_trace` gives it back with weights to six digits."""
    Path(path).write_text(format_trace(trace), encoding="utf-8")


def format_trace(trace: RoutingTrace) -> str:
    """The text of the file: preamble, column names, one line for each routed expert, with the column `batch`."""
    model = re.sub(r"\s", "_", trace.model) or "unknown"
    lines = [
        MAGIC,
        f"# model={model} arch={trace.arch or 'unknown'} n_layer={max(trace.layers, default=-1) + 1} "
        f"n_expert={trace.expert_count} n_expert_used={trace.top_k}",
    ]
    for layer, expert, dense in zip(trace.layers, trace.expert_bytes, trace.dense_bytes, strict=True):
        lines.append(f"# layer={layer} expert_bytes={expert} dense_bytes={dense}")
    lines.append(",".join((*COLUMNS, "batch")))
    for token, layer, slot in np.argwhere(trace.experts >= 0).tolist():
        phase = int(trace.decode[token])
        lines.append(
            f"{trace.turn[token]},{phase},{trace.position[token]},{trace.layers[layer]},{slot},"
            f"{trace.experts[token, layer, slot]},{trace.weights[token, layer, slot]:.6g},{trace.batch[token]}"
        )
    return "\n".join(lines) + "\n"

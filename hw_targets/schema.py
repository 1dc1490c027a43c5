"""Target files: TOML text -> `Target`.

    name = "server"            description; nodes = 8; power, idle = "360W" (one whole node), source; [price] hour,
                               purchase, currency, source
    [llvm]                     triple, cpu, features (implied ones are added), disabled: of the host's CPU
    [[unit]]                   name, kind (cpu | gpu | near-memory), tier, count, arch, cores, multiprocessors, clock,
                               peak = { f32 = "0.1TFLOP/s" }, efficiency = 0.7 or { f16 = 0.7 }, bandwidth_efficiency,
                               launch, barrier, power, idle, source
    [[cache]]                  level, kind, size, line, shared_by
    [[tier]]                   name, count, capacity, reserve, read, write, latency, page_fault, power, idle, energy,
                               read_by_threads = [{ threads, read }], source
    [[link]]                   name, from, to, count, bandwidth, back, latency, duplex, switch, efficiency, pageable,
                               pinned, power, energy, source
    [[switch]]                 name, count, bandwidth, source
    [[fabric]]                 name, tier, scope (node | cluster), topology (switch | ring | mesh), bandwidth, latency,
                               efficiency, energy, source
    [[storage]]                name, count, capacity, tier, switch, latency, burst, burst_bytes, power, idle, energy,
                               points = [{ block, depth, read, write, access (any | random | sequential) }], source

Peaks are of one core and without structured sparsity; `cores` of a GPU or near-memory unit is 1 unless stated, so that
a datasheet's figure can be copied. Bandwidths of links and fabrics are those of one direction. Capacities, bandwidths
and peaks are those of one copy out of `count`, in one of `nodes` nodes. A speed, time, power or share without a
`source` is refused. `source` is one text for the whole table, or a table that has a text for each such figure
(`source = { peak = "datasheet", efficiency = "measured" }`). So are refused: unknown fields, unknown units of measure,
and tiers and switches that are named but not described; each with the path of the field in the file.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from hw_targets.schema_reader import ELEMENTS, Reader
from hw_targets.schema_tables import TargetFile
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError

__all__ = ["ELEMENTS", "MAX_FILE_BYTES", "load_file", "parse_target"]

MAX_FILE_BYTES = 1 << 20


def load_file(path: Path) -> Target:
    """The target that a TOML file describes."""
    where = str(path)
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as fault:
        raise DiagnosticError(f"cannot read the target file: {fault.strerror}", where=where) from None
    if len(text) > MAX_FILE_BYTES:
        raise DiagnosticError("the target file is too large", where=where, expected=f"at most {MAX_FILE_BYTES} bytes")
    return parse_target(text, where)


def parse_target(text: bytes | str, where: str = "") -> Target:
    """The target that TOML text describes. Raises DiagnosticError naming the field."""
    try:
        table = msgspec.toml.decode(text, type=TargetFile)
    except msgspec.ValidationError as fault:
        raise DiagnosticError(f"not a valid target: {fault}", where=where, hint="see hw_targets/schema.py") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise DiagnosticError(f"not a TOML file: {fault}", where=where) from None
    return Reader(where).target(table)

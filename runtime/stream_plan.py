"""What is kept in memory and what is read when it is needed: the part of a placement that the runtime executes.

A `StreamPlan` is plain data and JSON (`schema: "stratum.stream/1"`). Pieces are those of the manifest, by number; a
dense piece that is not resident is read each time a program comes to it, in the order of the file, up to
`window_bytes` ahead. Experts come and go in a cache of `expert_bytes`. Rows of a table that is not resident are read
for the tokens of a step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from runtime.errors import RuntimeDiagnostic
from runtime.eviction import DEFAULT_POLICY, POLICIES
from runtime.manifest import Manifest, ProgramInfo
from runtime.stand_ins import check_stand_ins

SCHEMA = "stratum.stream/1"
SCOPES = ("global", "layer")
_LARGEST = 1 << 50


@dataclass(frozen=True)
class StreamPlan:
    """See the module's text. All sizes in bytes.

    `step_tokens`: most tokens of one native call; longer steps are run in parts of the same program, with the same
    bits. `guesses`: most experts of the next layer that are read because its router would choose them for what this
    layer's router reads; 0 for none. `disk_bytes_per_s`: what the plan counts on, 0 where it does not. A step of
    at most `short_tokens` tokens leaves `short_bytes` of the activations unused: experts take them. `stand_ins`:
    missing experts of less than this share of their tokens' routing weight are computed from copies in fewer bits
    (`runtime.stand_ins`); 0 for none, and then tokens are those of the full model. `kv_bytes` are kept for the KV
    cache of the whole context: experts have what sequences do not take of them yet. `pinned` are experts that are read
    first and never leave, as (number of the layer among those with experts, expert); they count against
    `expert_bytes`, which must leave one token's experts beside them. `budget_bytes` and `other_bytes` (interpreter,
    activations, KV cache: what is no weight) are for reports.
    """

    budget_bytes: int
    resident: tuple[int, ...]
    window_bytes: int = 0
    expert_bytes: int = 0
    rows_bytes: int = 16 << 20
    scope: str = "global"
    policy: str = DEFAULT_POLICY
    step_tokens: int = 1 << 20
    threads: int = 4
    request_bytes: int = 2 << 20
    other_bytes: int = 0
    guesses: int = 0
    disk_bytes_per_s: int = 0
    short_tokens: int = 0
    short_bytes: int = 0
    stand_ins: float = 0.0
    kv_bytes: int = 0
    pinned: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> str:
        """Stable text."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> StreamPlan:
        """Raises RuntimeDiagnostic for other texts."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as fault:
            raise RuntimeDiagnostic(f"not a readable stream plan: {fault}") from None
        if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
            raise RuntimeDiagnostic("not a stream plan", expected=f'an object with "schema": "{SCHEMA}"')
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(raw) - known)
        if unknown or "budget_bytes" not in raw or not isinstance(raw.get("resident"), list):
            what = f"the unknown field {unknown[0]!r}" if unknown else "no 'budget_bytes' or 'resident'"
            raise RuntimeDiagnostic(f"the stream plan has {what}", expected=", ".join(sorted(known)))
        raw["resident"] = tuple(raw["resident"])
        if isinstance(pinned := raw.get("pinned", []), list):
            raw["pinned"] = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in pinned)
        plan = cls(**raw)
        for field in fields(cls):
            plan._check_field(field.name)
        return plan

    def _check_field(self, name: str) -> None:
        value: Any = getattr(self, name)
        if name in ("scope", "policy"):
            allowed = SCOPES if name == "scope" else POLICIES
            if value not in allowed:
                raise RuntimeDiagnostic(f"'{name}' of the stream plan is {value!r}", expected=", ".join(allowed))
            return
        if name == "stand_ins":
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise RuntimeDiagnostic(f"'stand_ins' of the stream plan is {value!r}", expected="a share, 0 to 1")
            return
        if name == "pinned":
            if not (isinstance(value, tuple) and all(_is_entry(entry) for entry in value)):
                raise RuntimeDiagnostic(
                    "'pinned' of the stream plan is no list of experts",
                    expected="[[layer, expert], ...] in numbers from 0",
                )
            return
        numbers = value if name == "resident" else (value,)
        least = 1 if name in ("step_tokens", "threads", "request_bytes") else 0
        most = 64 if name == "threads" else _LARGEST
        if not all(type(n) is int and least <= n <= most for n in numbers):
            raise RuntimeDiagnostic(f"'{name}' of the stream plan is {value!r}", expected=f"{least} to {most}")

    def check(self, manifest: Manifest) -> None:
        """Raises RuntimeDiagnostic where the plan does not fit the artifact: nothing may wait for ever."""
        pieces = manifest.weights.pieces
        check_stand_ins(manifest, self.stand_ins)
        if len(set(self.resident)) != len(self.resident) or any(p >= len(pieces) for p in self.resident):
            raise RuntimeDiagnostic(
                "the stream plan names resident pieces that do not exist, or one twice",
                expected=f"different numbers of pieces, 0..{len(pieces) - 1}",
            )
        for number in self.resident:
            if pieces[number].kind in ("experts", "stand_ins"):
                raise RuntimeDiagnostic(
                    f"the stream plan keeps piece {number} resident, which holds experts",
                    expected="expert_bytes, which says how many of them are kept",
                )
        for program in manifest.programs:
            needed = live_bytes(manifest, program, frozenset(self.resident))
            if self.window_bytes < needed:
                raise RuntimeDiagnostic(
                    f"the stream plan has a window of {self.window_bytes} bytes for dense weights",
                    expected=f"at least {needed}, what '{program.name}' uses at once",
                )
        self._check_pinned(manifest)
        needed = least_expert_bytes(manifest) + self.pinned_bytes(manifest)
        if self.scope == "layer":
            needed *= sum(piece.kind == "experts" for piece in pieces)
        if self.expert_bytes < needed:
            beside = ", beside those that are pinned" if self.pinned else ""
            raise RuntimeDiagnostic(
                f"the stream plan has {self.expert_bytes} bytes for experts",
                expected=f"at least {needed}, the experts of one token{beside}",
            )

    def _check_pinned(self, manifest: Manifest) -> None:
        layers = [piece.count for piece in manifest.weights.pieces if piece.kind == "experts"]
        if self.pinned and self.scope != "global":
            raise RuntimeDiagnostic("the stream plan pins experts beside shares of layers", expected="scope: global")
        if len(set(self.pinned)) != len(self.pinned) or any(
            layer >= len(layers) or expert >= layers[layer] for layer, expert in self.pinned
        ):
            counts = f"{len(layers)} layers with experts, {max(layers, default=0)} each at most"
            raise RuntimeDiagnostic(
                "the stream plan pins experts that do not exist, or one twice", expected=f"experts of {counts}"
            )

    def pinned_bytes(self, manifest: Manifest) -> int:
        """What the pinned experts take."""
        layers = [piece for piece in manifest.weights.pieces if piece.kind == "experts"]
        return sum(layers[layer].place(expert)[1] for layer, expert in self.pinned)

    def expert_bytes_in(self, tokens: int, kv_bytes: int | None = None) -> int:
        """What experts have in steps of so many tokens, while the KV cache takes `kv_bytes` (None: all of it)."""
        short = self.short_bytes if tokens <= self.short_tokens else 0
        return self.expert_bytes + short + (0 if kv_bytes is None else max(0, self.kv_bytes - kv_bytes))

    def tokens_at_once(self, manifest: Manifest) -> int:
        """Tokens of one native call: no more than whose experts are sure to fit."""
        tokens = self.step_tokens
        layers = [piece for piece in manifest.weights.pieces if piece.kind == "experts"]
        free = self.expert_bytes - self.pinned_bytes(manifest)
        share = free // (len(layers) if self.scope == "layer" and layers else 1)
        for piece in layers:
            if share < piece.bytes:
                tokens = min(tokens, share // piece.unit // max(1, manifest.experts_per_token))
        return max(1, tokens)


def _is_entry(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(n) is int and 0 <= n < _LARGEST for n in value)


def live_bytes(manifest: Manifest, program: ProgramInfo, resident: frozenset[int]) -> int:
    """The most bytes of streamed dense pieces that the program uses at a time."""
    pieces = manifest.weights.pieces
    live: dict[int, int] = {}
    most = 0
    for wait in program.awaits:
        for piece in wait.done:
            live.pop(piece, None)
        if pieces[wait.piece].kind == "dense" and wait.piece not in resident:
            live[wait.piece] = pieces[wait.piece].bytes
        most = max(most, sum(live.values()))
    return most


def least_expert_bytes(manifest: Manifest) -> int:
    """Bytes of the experts of one token in the layer where they are largest."""
    layers = [piece for piece in manifest.weights.pieces if piece.kind == "experts"]
    return max((piece.largest(max(1, manifest.experts_per_token)) for piece in layers), default=0)

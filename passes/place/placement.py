"""The plan: what lies where, how it is computed, and what that promises; frozen, and the same as JSON.

    text = placement.to_json()               # schema "stratum.plan/1", stable: keys in order, exact numbers
    Placement.from_json(text, "plan.json")   # equal to `placement`; faults name the field

What a user may edit are the entries (`groups`, `kv`, `expert_formats`) and the session; the rest is computed from them
anew when the file is given back (`passes.place.replay`). Refuses other schemas, unknown and missing fields, and wrong
types.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import msgspec

from ir.diagnostics import DiagnosticError

SCHEMA = "stratum.plan/1"
MAX_BYTES = 16 << 20
Mode = Literal["resident", "streamed", "cached", "split"]
RIGHT_GUESSES = 0.98  # of experts, where nothing measured it: 0.97 to 1.00 on olmoe-1b-7b (docs/streaming.md)
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Amount = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


@dataclass(frozen=True)
class Placed:
    """One group of layers that is kept and computed alike. `nbytes` is of all its layers, at `tier`.

    `group`: embedding, attention, mlp, experts or head; `layers`: `0-3,8`, "" for embedding and head. `slots` is the
    cache of one layer (cached) or its experts on `unit` (split, where `rest_unit` computes the others). Of what a cache
    lacks `rest_unit` computes all (`missed` is `there`), or what it has done before it could be brought (`sooner`).
    `recipe` is the one of `quality.formats` that `format` comes from, "" for that of the plan; of experts that of all
    that no entry of `expert_formats` names. `pieces` of a built
    model: of each layer these pieces of its weights file only, by commas (`mlp.down_proj`); "" is all that no other
    entry names.
    """

    group: str
    layers: str
    tier: str
    mode: Mode
    unit: str
    format: str
    nbytes: int
    slots: Amount = 0
    rest_unit: str = ""
    prefill_unit: str = ""
    recipe: str = ""
    missed: Literal["", "sooner", "there"] = ""
    pieces: str = ""


@dataclass(frozen=True)
class PlacedKV:
    """Where the cache of some layers lies, and which unit attends to it.

    `positions`: where the cache of each layer is divided, the positions of each sequence that lie there; 0 is all.
    Of two entries for a layer the one in the memory of the unit that computes its attention has the newest.
    """

    layers: str
    tier: str
    unit: str
    format: str
    nbytes: int
    positions: Amount = 0


@dataclass(frozen=True)
class PlacedExperts:
    """Experts (`0-3,8`) of some layers whose recipe is not that of their group's entry."""

    layers: str
    experts: str
    recipe: str


@dataclass(frozen=True)
class Degrees:
    """How the work is spread: a layer's products over `tensor` units, layers over `pipeline` stages, experts over
    `expert` units (1: cut like products), sequences over `data` copies, the vocabulary over `vocabulary` units."""

    tensor: Count = 1
    pipeline: Count = 1
    expert: Count = 1
    data: Count = 1
    vocabulary: Count = 1

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True)
class ExpertCache:
    """Experts kept in slots of a faster tier. `hit_rate` is expected, `belady` the best any policy can do. `pinned`:
    experts that never leave, as (number of the layer among those with experts, expert)."""

    tier: str
    slots: int
    nbytes: int
    scope: Literal["layer", "global"]
    policy: str
    hit_rate: float
    source: str
    belady: float | None = None
    pinned: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class SessionPlan:
    """What the plan is made for."""

    context: Count
    batch: Count
    prompt: Count
    generate: Count
    chunk: Count
    micro_batches: Count
    depth: Count
    ahead: Amount = 0


@dataclass(frozen=True)
class Resource:
    """Seconds that a resource is busy in a phase."""

    name: str
    seconds: float


@dataclass(frozen=True)
class PhasePlan:
    """A decode step of the whole batch, or the prefill of one prompt."""

    seconds: float
    bound: str
    resources: tuple[Resource, ...]


@dataclass(frozen=True)
class TierPlan:
    """Bytes of one tier or storage (of one device where there are several) at the peak, beside its capacity."""

    name: str
    capacity: int
    weights: int = 0
    cache: int = 0
    kv: int = 0
    activations: int = 0
    buffers: int = 0

    @property
    def peak(self) -> int:
        return self.weights + self.cache + self.kv + self.activations + self.buffers


@dataclass(frozen=True)
class QualityPlan:
    """The recipes that formats were chosen among, what the choice loses (beside the first recipe throughout: `asked`)
    and the average bits of a weight; `source` says how losses are known, the bounds what bounded the choice, `uses` how
    it is known which experts are picked how often ("": experts of a layer share a format)."""

    formats: tuple[str, ...]
    loss: float
    bits: float
    asked: float
    source: str
    most_loss: float | None = None
    least_bits: float | None = None
    uses: str = ""


@dataclass(frozen=True)
class KVQuality:
    """The formats that those of the cache were chosen among, what the choice loses by `source`, and what it may lose
    together with formats of weights."""

    formats: tuple[str, ...]
    loss: float
    source: str
    most_loss: float | None = None


@dataclass(frozen=True)
class StandInPlan:
    """What it would do to compute missing experts of less than `share` of a token's weight from copies in fewer bits:
    the share `used` of the experts asked for, and seconds and bytes read of a decode step, beside those without."""

    share: float
    used: float
    step_seconds: float
    read_bytes: float
    read_bytes_without: float
    source: str


@dataclass(frozen=True)
class TriedSchedule:
    """A schedule that was simulated for a plan: seconds of a step, and of a prompt (None: the step was too long
    already)."""

    depth: int
    micro_batches: int
    ahead: int
    step_seconds: float
    prompt_seconds: float | None


@dataclass(frozen=True)
class Placement:
    """A whole plan."""

    model: str
    target: str
    recipe: str
    dtype: str
    session: SessionPlan
    degrees: Degrees
    groups: tuple[Placed, ...]
    kv: tuple[PlacedKV, ...]
    decode: PhasePlan
    prefill: PhasePlan
    tiers: tuple[TierPlan, ...]
    expert_cache: ExpertCache | None = None
    prefill_threshold: int | None = None
    gap: float = 0.0
    joules_per_token: float | None = None
    decode_at_context: float | None = None  # the same where sequences fill the context, if a layer has kv in two places
    simulated_step: float | None = None  # seconds of a decode step, event by event; `decode` is its closed-form bound
    simulated_prefill: float | None = None  # of a prompt; of a built model on this machine as the runtime takes it
    simulated_prefill_bound: str = ""  # what most of that goes to
    quality: QualityPlan | None = None
    prefill_threshold_bound: int | None = None  # in closed form; `prefill_threshold` is simulated where it can be
    stand_ins: StandInPlan | None = None
    schedules: tuple[TriedSchedule, ...] = ()  # that were simulated, of which the session has the fastest
    expert_formats: tuple[PlacedExperts, ...] = ()
    kv_quality: KVQuality | None = None  # where formats of the cache were chosen
    schema: str = SCHEMA

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch while decoding, as simulated where that was done."""
        seconds = self.simulated_step or self.decode.seconds
        return self.session.batch / seconds if seconds else 0.0

    def to_json(self) -> str:
        """The stable text: `schema` first, then the fields in the order of this class."""
        fields = asdict(self)
        return json.dumps({"schema": fields.pop("schema"), **fields}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str | bytes, where: str = "plan") -> Placement:
        """The plan that a text holds. DiagnosticError naming the field when it is none."""
        if len(text) > MAX_BYTES:
            raise DiagnosticError("the plan is too large", where=where, expected=f"at most {MAX_BYTES >> 20} MiB")
        try:
            value: Any = json.loads(text)
        except (ValueError, RecursionError) as fault:
            raise DiagnosticError(f"the plan is no JSON: {fault}", where=where) from None
        schema = value.get("schema") if isinstance(value, dict) else None
        if schema != SCHEMA:
            raise DiagnosticError(f"the plan has the schema {str(schema)[:60]!r}", where=where, expected=f"{SCHEMA!r}")
        _only_known(value, where)
        try:
            return msgspec.convert(value, Placement)
        except msgspec.ValidationError as fault:
            raise DiagnosticError(f"the plan is not valid: {fault}", where=where, hint="see docs/plan.md") from None


def layer_numbers(text: str) -> list[int]:
    """The layers that `0-3,8` names. DiagnosticError for other texts."""
    found: list[int] = []
    for run in text.split(",") if text else []:
        first, _, last = run.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or len(run) > 13:
            raise DiagnosticError(f"{text!r} are no layers", expected="such as 0-3,8")
        found.extend(range(int(first), min(int(last or first), 1 << 12) + 1))
    return found


def span(layers: tuple[int, ...]) -> str:
    """`0-3,8`: numbers of layers as text."""
    runs: list[list[int]] = []
    for i in layers:
        if runs and runs[-1][1] + 1 == i:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


_PARTS: dict[str, type] = {
    "session": SessionPlan,
    "degrees": Degrees,
    "groups": Placed,
    "kv": PlacedKV,
    "decode": PhasePlan,
    "prefill": PhasePlan,
    "tiers": TierPlan,
    "expert_cache": ExpertCache,
    "quality": QualityPlan,
    "stand_ins": StandInPlan,
    "schedules": TriedSchedule,
    "expert_formats": PlacedExperts,
    "kv_quality": KVQuality,
}


def _only_known(value: dict[str, Any], where: str) -> None:
    """Refuses keys that mean nothing: a mistyped one must not be read as a missing one."""
    for key, part in (("", value), *value.items()):
        kind = _PARTS.get(key) if key else Placement
        for item in part if isinstance(part, list) else [part]:
            if kind is None or not isinstance(item, dict):
                continue
            known = list(kind.__dataclass_fields__)
            extra = [name for name in item if name not in known]
            if extra:
                at = f"{key}: " if key else ""
                raise DiagnosticError(
                    f"the plan is not valid: {at}unknown field {extra[0]!r}", where=where, expected=", ".join(known)
                )

"""What our own cost model says where others published a figure: phases of a model that lies in given places.

    Case("Llama-2-7b-hf", "a100-80gb", prompt=2048, generate=1).first_token(peak=True)

Rooflines are taken without efficiencies and dispatch (`ideal`), so that ideal over published is the efficiency reached;
else with what the target file states.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import hw_targets
from frontends.model_shape import ModelShape
from frontends.shape_library import load_shape
from hw_targets.cost_model import tier_rate
from hw_targets.target import Target
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.milp import MANY_NODES, solve_counts
from passes.place.outcome import Outcome, PhaseOutcome, evaluate
from passes.place.parallel import together
from passes.place.pins import parse_pin
from passes.place.problem import Problem, Session
from passes.place.solve import choices_of


def ideal(target: Target) -> Target:
    """The target at its stated peaks: no efficiency, no dispatch, all memory pinned."""
    units = tuple(
        dataclasses.replace(u, efficiency=(), bandwidth_efficiency=None, launch_seconds=None, barrier_seconds=None)
        for u in target.units
    )
    links = tuple(dataclasses.replace(x, efficiency=None, pinned=True) for x in target.links)
    return dataclasses.replace(target, units=units, links=links)


MODELS = Path(__file__).with_name("models")
RESIDENT = ("weights=resident", "weights=gpu", "kv=gpu")


@dataclass(frozen=True)
class System:
    """What a system does that a plan of ours does not.

    `in_turn`: copies over a link are waited for, as is all that units do; only a drive is read ahead. `expand` bytes
    are moved to make a float of each low-bit weight before its product, and with `expand_cache` of each element of a
    low-bit cache, at `expand_share` of the memory's rate (0: what the target says that kernels reach). Attention of
    the GPU reads a cache at `attend_share` of that rate (0: the same). `pass_ms` is what each pass of a prompt costs
    beside its products.
    """

    in_turn: bool = False
    expand: float = 0.0
    expand_share: float = 0.0
    expand_cache: bool = False
    attend_share: float = 0.0
    pass_ms: float = 0.0


NOTHING = System()


@dataclass(frozen=True)
class Case:
    """A model on a target with some places given (`pins`; the solver chooses the rest) and a session.

    `prompts` of the `batch` pass at once, in chunks of `chunk` tokens each (0: whole). `tensor` GPUs work together.
    `top_k` experts of a token where that is not the model's own number. `model` is a built-in name or one of `models/`.
    `gpu_batches`: parts of the batch for each of which a `system` that expands weights does so anew.
    """

    model: str
    target: str
    recipe: str = ""
    pins: tuple[str, ...] = RESIDENT
    tensor: int = 1
    dtype: str = "f16"
    batch: int = 1
    prompt: int = 512
    generate: int = 32
    chunk: int = 0
    prompts: int = 1
    micro_batches: int = 1
    context: int = 0
    top_k: int = 0
    gpu_batches: int = 1
    system: System = NOTHING

    def outcome(self, *, peak: bool = False) -> Outcome:
        """Both phases; at the stated peaks with nothing lost when `peak`."""
        return _outcome(self, peak)

    def problem(self, *, peak: bool = False) -> Problem:
        shape, found = shape_named(self.model, self.top_k), hw_targets.load(self.target)
        machine = machine_of(ideal(found) if peak else found, tensor=self.tensor)
        use = Session(
            self.context or self.prompt + self.generate, self.batch, self.prompt, self.generate,
            self.chunk or self.prompt, self.micro_batches, prompts=self.prompts,
        )  # fmt: skip
        problem = Problem(shape, machine, formats_of(self.recipe, self.dtype), use)
        if not peak and self.tensor > 1:
            telling = (
                together(shape, found, n, p, self.tensor) for n, p in ((self.batch, 1), (use.prompt_rows, use.passes))
            )
            decode, prefill = telling
            problem = dataclasses.replace(problem, together_decode=decode, together_prefill=prefill)
        problem = dataclasses.replace(problem, pins=tuple(parse_pin(p, shape, machine) for p in self.pins))
        return problem if peak or self.system == NOTHING else _with_system(problem, self)

    def seconds(self, phase: PhaseOutcome, *, peak: bool) -> float:
        """Of a phase, as the system goes through it."""
        if peak or not self.system.in_turn:
            return phase.seconds
        drives = {f"{store.name} read" for store in hw_targets.load(self.target).storage}
        busy = dict(phase.busy)
        return max(sum(s for name, s in busy.items() if name not in drives), *(busy.get(d, 0.0) for d in drives))

    def step(self, *, peak: bool = False) -> float:
        """Seconds of a decode step of all sequences."""
        return self.seconds(self.outcome(peak=peak).decode, peak=peak)

    def prompt_seconds(self, *, peak: bool = False) -> float:
        """Seconds of the prompts that pass at once."""
        return self.seconds(self.outcome(peak=peak).prefill, peak=peak)

    def decode(self, *, peak: bool = False) -> float:
        """Tokens a second while decoding."""
        return self.batch / self.step(peak=peak)

    def first_token(self, *, peak: bool = False) -> float:
        """Milliseconds of the prompt."""
        return 1e3 * self.prompt_seconds(peak=peak)

    def prefill(self, *, peak: bool = False) -> float:
        """Tokens of prompts a second."""
        return self.prompt * self.prompts / self.prompt_seconds(peak=peak)

    def generation(self, *, peak: bool = False) -> float:
        """Tokens made a second, the time of the prompts included, by each of the GPUs that work together."""
        seconds = self.batch / self.prompts * self.prompt_seconds(peak=peak) + self.generate * self.step(peak=peak)
        return self.batch * self.generate / seconds / self.tensor


def _with_system(problem: Problem, case: Case) -> Problem:
    """The problem with what the system does besides, on the path of both phases."""
    system, session = case.system, problem.session
    weights = system.expand * _low_bit_weights(problem) / _gpu_rate(problem, system.expand_share) * case.gpu_batches
    step = [("expanding", weights)]
    packed, floats = _cache_bytes(problem)
    if system.expand_cache and packed < floats:
        step.append(("expanding", system.expand * floats / 2 / _gpu_rate(problem, system.expand_share)))
    if system.attend_share and "kv=cores" not in case.pins:
        read = floats if system.expand_cache else packed
        slowly = read / _gpu_rate(problem, system.attend_share) - packed / _gpu_rate(problem, 0.0)
        step.append(("attention", max(0.0, slowly)))
    prompts = weights * case.prompts / case.batch + system.pass_ms / 1e3 * session.passes
    return dataclasses.replace(
        problem,
        together_decode=(*problem.together_decode, *step),
        together_prefill=(*problem.together_prefill, ("expanding", prompts)),
    )


def _low_bit_weights(problem: Problem) -> int:
    """How many weights are stored in less than 16 bits."""
    return sum(p.weights * p.count for p in problem.parts() if p.weights and p.weight_bytes < 2 * p.weights)


def _cache_bytes(problem: Problem) -> tuple[float, float]:
    """Of the cache that a decode step reads: as it is stored, and as 16-bit floats."""
    tokens = problem.session.batch * problem.session.decode_context
    stored = sum(problem.formats.kv_bytes(layer) for layer in problem.shape.layers)
    return float(tokens * stored), 2.0 * tokens * problem.shape.kv_elements_per_token()


def _gpu_rate(problem: Problem, share: float) -> float:
    """Bytes a second of the GPU's memory: a share of what is stated, or what kernels of ours are planned to reach."""
    unit = problem.machine.unit("gpu")
    planned = tier_rate(problem.machine.target, unit.tier, unit)
    return planned / (unit.bandwidth_efficiency or 1.0) * share if share else planned


@lru_cache(maxsize=32)
def shape_named(model: str, top_k: int = 0) -> ModelShape:
    """A built-in shape or one of `models/`, perhaps with another number of experts a token."""
    own = MODELS / f"{model}.json"
    shape = load_shape(own if own.is_file() else model)
    if not top_k:
        return shape
    layers = (
        dataclasses.replace(x, mlp=dataclasses.replace(x.mlp, top_k=top_k)) if x.mlp.is_moe else x for x in shape.layers
    )
    return dataclasses.replace(shape, layers=tuple(layers))


@lru_cache(maxsize=512)
def _outcome(case: Case, peak: bool) -> Outcome:
    problem = case.problem(peak=peak)
    # The best itself, so that figures depend on the machine's alone and not on where a version of the solver stops.
    solved = solve_counts(problem, choices_of(problem), nodes=10 * MANY_NODES, within=0.0)
    assert solved is not None, f"{case.model} does not fit {case.target} with {case.pins}"
    return evaluate(problem, solved.choice)

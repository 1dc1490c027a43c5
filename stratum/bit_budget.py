"""`--bits-per-weight` and `--size`: from a budget to a recipe that spends it where it is needed most.

    found = find_recipe(Path("model"), BitBudget(bits_per_weight=4.25), progress=reporter)
    found.recipe                          # passes.quantize.recipe.Recipe; its text reproduces the build
    print(found.report)                   # what was chosen and why

Bits per weight count what products multiply by (attention, MLP, experts, head), scales and zero points included; the
embedding table, routers and norms are beside, in their own formats. `size` counts the whole weights file. Formats are
chosen by `passes.quantize.bits_solver` from sensitivities that are measured once per model and kept beside the cache
of models; so are the tokens that they are measured with, and the recipes found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frontends.huggingface import ImportedModel, import_model
from hw_targets.cache_dir import cache_root
from hw_targets.routing import read_trace
from ir.diagnostics import DiagnosticError
from passes.quantize.bit_choice import BitChoice, BitProblem, choose
from passes.quantize.bit_recipe import candidates_of, recipe_of
from passes.quantize.bit_report import report_of
from passes.quantize.expert_groups import by_expert
from passes.quantize.expert_uses import uses_of_trace
from passes.quantize.recipe import Recipe, load_recipe, read_recipe
from passes.quantize.sensitivity import WholeModel, affordable_sequences, estimate, measure
from passes.quantize.sensitivity_table import SensitivityTable
from passes.quantize.weight_groups import joined_products
from stratum.calibration_tokens import tokens_of_model, tokens_of_text
from stratum.model_cache import cache_entry
from stratum.progress import Progress

SELF, NONE = "self", "none"  # in place of a text: the model's own, and none at all
SEQUENCES, LENGTH = 12, 256
CHECK_EVERY = 4  # of the sequences, each fourth compares whole assignments; the others measure sensitivities
MAX_LOGITS = 1 << 25  # numbers of logits held at once: rows are thinned out for large vocabularies
MAX_TRIES = 6


@dataclass(frozen=True)
class BitBudget:
    """What a user asks for. Exactly one of `bits_per_weight` and `size` (bytes of the weights file) is set.

    `recipe` gives the candidates and the activations (see `passes.quantize.bit_recipe`); `calibration` is the path of a
    text, "self" or "none". `by_expert`: the experts of a layer may get several formats; `trace` is then a routing trace
    that says how often each is picked.
    """

    bits_per_weight: float | None = None
    size: int | None = None
    recipe: str | None = None
    calibration: str = SELF
    by_expert: bool = False
    trace: Path | None = None

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.size is None):
            raise DiagnosticError("a budget is bits per weight or a size", expected="one of the two")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight <= 64:
            raise DiagnosticError(
                f"{self.bits_per_weight} bits per weight", expected="a number above 0 and at most 64, such as 4.25"
            )
        if self.trace is not None and not self.by_expert:
            raise DiagnosticError(
                "a routing trace says how often experts are picked, and they share formats",
                expected="by_expert as well",
            )
        if self.size is not None and self.size < 1:
            raise DiagnosticError(f"a size of {self.size} bytes", expected="one byte or more, such as 2GiB")


@dataclass(frozen=True)
class FoundRecipe:
    """The recipe, the file it is kept in, and the explanation as text and as data."""

    recipe: Recipe
    path: Path
    report: str
    facts: dict[str, Any]


def find_recipe(
    model: Path, budget: BitBudget, *, target: str = "host", dtype: str = "bf16", progress: Progress | None = None
) -> FoundRecipe:
    """The recipe for a Hugging Face directory, from the cache when it has been found before.

    Raises DiagnosticError for a budget that is too small, a text that cannot be used, and models that `stratum.build`
    refuses or that are quantized already.
    """
    from frontends.checkpoint_files import check_directory
    from stratum.weights_file import weights_file_bytes

    model = check_directory(Path(model))
    tell: Progress = progress or (lambda stage, done, total, unit="": None)
    base = load_recipe(budget.recipe) if budget.recipe else None
    known = f"{_known_text(budget.calibration)} {SEQUENCES}x{LENGTH}"
    numbers = [str(budget.bits_per_weight), str(budget.size), target, dtype]
    if budget.trace is not None:
        read_trace(budget.trace)  # refuses what is none before anything is measured
    apart = [f"by expert {_known_text(str(budget.trace)) if budget.trace else ''}"] if budget.by_expert else []
    said = [base.to_toml() if base else "", budget.recipe or "", known, *apart]
    entry = cache_entry(model, ["recipe", *numbers, *said])
    folder = cache_root() / "recipes"
    path, facts_path = folder / f"{entry.name}.toml", folder / f"{entry.name}.json"
    cached = _cached(path, facts_path)
    if cached is not None:
        return cached

    def file_bytes(recipe: Recipe) -> int:
        return weights_file_bytes(model, recipe, target=target, dtype=dtype)

    imported = import_model(model)
    with imported.checkpoint:
        choice = _solve(imported, budget, known, file_bytes, tell)
    recipe = recipe_of(choice, base)
    report, facts = report_of(choice, _source_words(budget.calibration), file_bytes(recipe))
    facts["report"] = report
    _write(path, recipe.to_toml())
    _write(facts_path, json.dumps(facts))
    return FoundRecipe(recipe, path, report, facts)


def _solve(
    imported: ImportedModel,
    budget: BitBudget,
    known: str,
    file_bytes: Callable[[Recipe], int],
    tell: Progress,
) -> BitChoice:
    candidates = candidates_of(budget.recipe)
    roles = {name: spec.role for name, spec in imported.weights.items()}
    func, products = joined_products(imported.module, roles)
    groups = [group for _, group in products]
    if not groups:
        raise DiagnosticError("the model has no weights to choose formats for", where=str(imported.directory))
    kept = cache_entry(imported.directory, ["sensitivity", known]).name
    table = SensitivityTable(cache_root() / "sensitivity" / f"{kept}.jsonl")
    read = imported.checkpoint.read
    whole: WholeModel | None = None
    if budget.calibration == NONE:
        estimate(
            products,
            read,
            candidates,
            table,
            by_expert=budget.by_expert,
            tell=lambda d, t: tell("sensitivity", d, t, "formats"),
        )
    else:
        tokens = _tokens(imported, budget, table.path, tell)
        checks = np.arange(len(tokens)) % CHECK_EVERY == CHECK_EVERY - 1
        if not checks.any():
            checks[-1] = len(tokens) > 1
        step = max(1, tokens.size * imported.config.vocab_size // MAX_LOGITS)
        measure(
            func,
            products,
            read,
            tokens[~checks][: affordable_sequences(products, tokens.shape[1])],
            candidates,
            table,
            row_step=step,
            by_expert=budget.by_expert,
            tell=lambda d, t: tell("sensitivity", d, t, "formats"),
        )
        whole = WholeModel(func, products, read, tokens[checks] if checks.any() else tokens, row_step=step)
    if budget.by_expert:
        experts = {g.layer: g.shape[0] for g in groups if len(g.shape) == 3 and g.layer is not None}
        uses = uses_of_trace(read_trace(budget.trace), experts, budget.trace) if budget.trace is not None else {}
        groups, table = by_expert(groups, candidates, table, uses)
    problem = BitProblem.of(groups, candidates, table)
    number = 0

    def compare(assignment: Any) -> float:
        nonlocal number
        number += 1
        tell("compare", number, 0, "assignments")
        assert whole is not None
        return whole.loss(assignment)

    return _within(problem, budget, file_bytes, compare if whole is not None else None)


def _within(
    problem: BitProblem,
    budget: BitBudget,
    file_bytes: Callable[[Recipe], int],
    compare: Callable[[Any], float] | None,
) -> BitChoice:
    """The choice whose products take their bits, or whose weights file takes at most the size."""
    base = load_recipe(budget.recipe) if budget.recipe else None
    if budget.bits_per_weight is not None:
        return choose(problem, int(budget.bits_per_weight * problem.count / 8), compare)
    assert budget.size is not None
    smallest = problem.smallest()
    beside = file_bytes(recipe_of(smallest, base)) - smallest.winner.solution.nbytes
    if beside + smallest.winner.solution.nbytes > budget.size:
        raise DiagnosticError(
            f"the weights file cannot be as small as {budget.size} bytes",
            expected=f"{beside + smallest.winner.solution.nbytes} bytes or more, of which {max(0, beside)} are for the "
            "embedding table, routers, norms and padding",
            hint="allow formats of fewer bits with --recipe, or a larger size",
        )
    room = budget.size - beside
    for step in (None, compare):  # the padding depends a little on the formats: found without measuring first
        for _ in range(MAX_TRIES):
            choice = choose(problem, room, step)
            over = file_bytes(recipe_of(choice, base)) - budget.size
            if over <= 0:
                break
            room -= over
        else:
            return smallest
        if compare is None:
            break
    return choice


def _tokens(imported: ImportedModel, budget: BitBudget, table: Path | None, tell: Progress) -> np.ndarray:
    """int32 [sequences, length]; those that the model wrote are kept beside the table."""
    length = min(LENGTH, imported.config.max_context)
    vocab = imported.config.vocab_size
    if budget.calibration != SELF:
        text = Path(budget.calibration)
        return tokens_of_text(imported.directory, text, vocab_size=vocab, sequences=SEQUENCES, length=length)
    assert table is not None
    kept = table.with_suffix(".npy")
    if kept.is_file():
        try:
            found = np.load(kept, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            found = np.zeros(0)
        if found.dtype == np.int32 and found.shape == (SEQUENCES, length) and found.min() >= 0 and found.max() < vocab:
            return found
    from stratum.building import ensure_built

    begin = next(iter(_begin_ids(imported.directory)), None)
    made = tokens_of_model(
        ensure_built(imported.directory, progress=tell),
        begin=begin,
        sequences=SEQUENCES,
        length=length,
        tell=lambda d, t: tell("text", d, t, "sequences"),
    )
    _write(kept, made)
    return made


def _begin_ids(directory: Path) -> tuple[int, ...]:
    from frontends.config import open_config, token_ids

    return token_ids(open_config(directory), "bos_token_id")


def _known_text(calibration: str) -> str:
    """What tells one calibration from another: the hash of a text."""
    if calibration in (SELF, NONE):
        return calibration
    try:
        return hashlib.blake2b(Path(calibration).read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise DiagnosticError(
            f"the text cannot be read: {error.strerror}",
            where=calibration,
            expected=f"a text file, '{SELF}' or '{NONE}'",
        ) from None


def _source_words(calibration: str) -> str:
    words = {SELF: "a text of the model's own", NONE: "the weights alone, without activations"}
    return words.get(calibration, Path(calibration).name)


# -- the cache -------------------------------------------------------------------------------------------------------


def _cached(path: Path, facts_path: Path) -> FoundRecipe | None:
    try:
        recipe = read_recipe(path.read_text(encoding="utf-8"), str(path))
        facts = json.loads(facts_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, DiagnosticError):
        return None
    if not isinstance(facts, dict) or not isinstance(facts.get("report"), str):
        return None
    return FoundRecipe(recipe, path, facts["report"], facts)


def _write(path: Path, content: str | np.ndarray) -> None:
    """Writes under a temporary name and renames."""
    import os

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                np.save(file, content)
        temporary.replace(path)
    except OSError as error:
        raise DiagnosticError(
            f"the cache cannot be written: {error.strerror}",
            where=str(path.parent),
            hint="set STRATUM_CACHE to a directory with room",
        ) from None

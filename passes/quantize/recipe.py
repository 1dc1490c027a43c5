"""Recipes: which number format each weight, the activations in front of it and the KV cache get. TOML in, checked.

    recipe = load_recipe("w4a8-g32,kv8")          # names of shipped recipes and paths of files; later ones override
    recipe.storage("model.layers.0.mlp.up_proj.weight", "mlp.up").format

    name = "w4a8-g32"
    description = "4-bit weights, 8-bit activations"
    [weights]                                      # every weight that a product multiplies by, routers left out
    format = "q4_sym<group=32, scale=f16>"
    activations = "q8_sym<group=32, scale=f32>"
    rounding = "mse"
    [[rule]]                                       # the last rule that fits decides, key by key
    role = "head"                                  # or match = "regular expression of a tensor's whole name", or both
    format = "q6_sym<group=32, scale=f16>"
    [[rule]]
    experts = "0-3,8"                              # some of the experts of a layer, by number
    format = "q8_sym<group=32, scale=f16>"
    [kv]
    format = "bf16"

Refuses what is no TOML, unknown keys and roles (naming near ones), texts that are no format or regular expression,
and formats that cannot be multiplied by each other. docs/passes/quantize.md lists all keys.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, ROUNDINGS, NumberFormat, PlainFormat, read_format
from ir.spelling import did_you_mean
from passes.quantize.expert_ranges import ranges_text, read_ranges
from passes.quantize.recipe_formats import ANY_WIDTH, cache_type, can_meet, is_fp8, is_int8

SHIPPED = Path(__file__).parent / "recipes"
MAX_BYTES = 4 << 20  # of a file: a rule for each of 30 000 tensors
FLOATS = (F32, BF16, F16)
STORED = "stored"  # in place of a format: what the checkpoint has
FLOAT = "float"  # in place of a format: the 16-bit or 32-bit floats that the build is for
ROLES = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "experts": ("gate", "up", "down"),
    "head": (),
    "embedding": (),
    "router": (),
}
HELD_BACK = ("embedding", "router")  # only a rule that names the role reaches them
_ALL_ROLES = [*ROLES, *(f"{role}.{part}" for role, parts in ROLES.items() for part in parts)]


@dataclass(frozen=True)
class Choice:
    """What a recipe says of a weight; None where it says nothing.

    `format` and `activations` are formats, or "stored" (what the checkpoint has) and "float" (what the build is for).
    `rotate` is the block of a Hadamard rotation, 0 for none; `outliers` how many columns of a matrix stay floats.
    """

    format: NumberFormat | str | None = None
    activations: NumberFormat | str | None = None
    rounding: str | None = None
    rotate: int | None = None
    outliers: int | None = None

    def over(self, other: Choice) -> Choice:
        """This choice, and the other one where this says nothing."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Choice(**{name: mine if mine is not None else theirs for name, mine, theirs in pairs})


@dataclass(frozen=True)
class Rule:
    """A choice for the weights of a role and of names that `match` fits wholly; "" fits all. `experts` are ranges of
    numbers of experts, first and last; none: all weights, those that are no experts' too."""

    choice: Choice
    role: str = ""
    match: str = ""
    experts: tuple[tuple[int, int], ...] = ()
    where: str = field(default="", compare=False)

    def fits(self, name: str, role: str, expert: int | None = None) -> bool:
        """Whether the rule is about the tensor `name` of `role` (like `mlp.up`), or about this expert of it."""
        if self.experts and (expert is None or not any(a <= expert <= b for a, b in self.experts)):
            return False
        if self.role and role != self.role and not role.startswith(self.role + "."):
            return False
        if role in HELD_BACK and self.role != role:
            return False
        return not self.match or re.fullmatch(self.match, name) is not None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `kv` is the format of the KV cache as text, "" for that of the build."""

    name: str
    description: str = ""
    weights: Choice = Choice()
    rules: tuple[Rule, ...] = ()
    kv: str = ""

    def choice(self, name: str, role: str, expert: int | None = None) -> Choice:
        """All that is said of the tensor `name` of `role`: the last rule that fits decides, key by key.

        `expert`: the number of the expert that the tensor belongs to, or that is meant of a tensor of many.
        """
        found = Choice() if role in HELD_BACK else self.weights
        for rule in self.rules:
            if rule.fits(name, role, expert):
                found = rule.choice.over(found)
        return found

    def over(self, other: Recipe) -> Recipe:
        """Both together, this one deciding where both speak."""
        return Recipe(
            f"{other.name},{self.name}",
            "; ".join(d for d in (other.description, self.description) if d),
            self.weights.over(other.weights),
            (*other.rules, *self.rules),
            self.kv or other.kv,
        )

    def to_toml(self) -> str:
        """The text of a file that reads as an equal recipe."""
        lines = [f"name = {_quoted(self.name)}", f"description = {_quoted(self.description)}"]
        if self.weights != Choice():
            lines += ["", "[weights]", *_choice_lines(self.weights)]
        for rule in self.rules:
            selectors = [("role", rule.role), ("match", rule.match), ("experts", ranges_text(rule.experts))]
            lines += ["", "[[rule]]", *(f"{key} = {_quoted(text)}" for key, text in selectors if text)]
            lines += _choice_lines(rule.choice)
        if self.kv:
            lines += ["", "[kv]", f"format = {_quoted(self.kv)}"]
        return "\n".join(lines) + "\n"


def _choice_lines(choice: Choice) -> Iterable[str]:
    for f in dataclasses.fields(choice):
        value = getattr(choice, f.name)
        if value is not None:
            yield f"{f.name} = {value if isinstance(value, int) else _quoted(str(value))}"


def _quoted(text: str) -> str:
    """A basic string of TOML."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in plain) + '"'


# -- finding them ----------------------------------------------------------------------------------------------------


def shipped_recipes() -> dict[str, Recipe]:
    """The recipes that come with the compiler, by name."""
    paths = sorted(SHIPPED.glob("*.toml"))
    return {path.stem: read_recipe(path.read_text(encoding="utf-8"), path.name) for path in paths}


def load_recipe(text: str | Iterable[str]) -> Recipe:
    """The recipe that a command line names: names and paths by commas, later ones deciding where several speak.

    A part with a `/` or ending in `.toml` is a path. Raises DiagnosticError for what is not there or no recipe.
    """
    parts = [part.strip() for part in (text.split(",") if isinstance(text, str) else text)]
    if not all(parts):
        raise DiagnosticError(f"a recipe has no name in {','.join(parts)!r}", expected="names or paths by commas")
    recipe: Recipe | None = None
    for part in parts:
        found = _load_one(part)
        recipe = found if recipe is None else found.over(recipe)
    assert recipe is not None
    return recipe


def is_path(part: str) -> bool:
    """Whether a part of what `load_recipe` takes names a file instead of a shipped recipe."""
    return "/" in part or part.endswith(".toml")


def _load_one(part: str) -> Recipe:
    if is_path(part):
        return read_recipe(_read_file(Path(part)), part)
    path = SHIPPED / f"{part}.toml"
    names = sorted(p.stem for p in SHIPPED.glob("*.toml"))
    if part not in names:
        raise DiagnosticError(
            f"there is no recipe {part!r}{did_you_mean(part, names)}",
            expected=f"one of {', '.join(names)}, or the path of a file: ./{part}.toml",
        )
    return read_recipe(path.read_text(encoding="utf-8"), path.name)


def _read_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DiagnosticError(f"the recipe cannot be read: {error.strerror}", where=str(path)) from error
    if len(data) > MAX_BYTES:
        raise DiagnosticError("the recipe is too large", where=str(path), expected=f"{MAX_BYTES >> 20} MiB or less")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DiagnosticError(f"the recipe is no UTF-8 text (byte {error.start})", where=str(path)) from error


# -- checking --------------------------------------------------------------------------------------------------------


def read_recipe(text: str, where: str) -> Recipe:
    """The recipe that a TOML text holds; `where` names the text in faults. Raises DiagnosticError."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DiagnosticError(f"the recipe is no TOML: {reason}", where=where) from error
    top = _Table(table, where, "the recipe")
    top.only(("name", "description", "weights", "rule", "kv"))
    kv = top.table("kv")
    kv.only(("format",))
    rules = tuple(_rule(rule) for rule in top.tables("rule"))
    weights = top.table("weights")
    weights.only(tuple(f.name for f in dataclasses.fields(Choice)))
    recipe = Recipe(top.text("name") or Path(where).stem, top.text("description"), _choice(weights), rules, _kv(kv))
    _check_pairs(recipe, where)
    return recipe


class _Table:
    """A table of the file, and what it is called in faults."""

    def __init__(self, values: Mapping[str, Any], where: str, what: str) -> None:
        self.values, self.where, self.what = values, where, what

    def fault(self, message: str, expected: str = "", hint: str = "") -> DiagnosticError:
        return DiagnosticError(f"{self.what}: {message}", where=self.where, expected=expected, hint=hint)

    def only(self, keys: tuple[str, ...]) -> None:
        for key in self.values:
            if key not in keys:
                raise self.fault(f"unknown key {key!r}{did_you_mean(key, keys)}", f"one of {', '.join(keys)}")

    def of_type(self, key: str, kind: type, words: str) -> Any:
        value = self.values.get(key)
        if value is not None and type(value) is not kind:
            raise self.fault(f"{key} is {value!r}", words)
        return value

    def text(self, key: str) -> str:
        return self.of_type(key, str, "a text in quotes") or ""

    def table(self, key: str) -> _Table:
        return _Table(self.of_type(key, dict, f"a table: [{key}]") or {}, self.where, f"[{key}]")

    def tables(self, key: str) -> list[_Table]:
        found = self.of_type(key, list, f"tables: [[{key}]]") or []
        for value in found:
            if not isinstance(value, dict):
                raise self.fault(f"{key} holds {value!r}", f"tables: [[{key}]]")
        return [_Table(value, self.where, f"{key} {i + 1}") for i, value in enumerate(found)]


def _choice(table: _Table) -> Choice:
    rounding = table.text("rounding") or None
    if rounding is not None and rounding not in ROUNDINGS:
        raise table.fault(f"unknown rounding {rounding!r}{did_you_mean(rounding, ROUNDINGS)}", " or ".join(ROUNDINGS))
    rotate = table.of_type("rotate", int, "a block size: 64, or 0 for none")
    if rotate is not None and not (0 <= rotate <= 1 << 16 and rotate & (rotate - 1) == 0):
        raise table.fault(f"rotate = {rotate}", "a power of two, or 0 for no rotation")
    outliers = table.of_type("outliers", int, "a number of columns")
    if outliers is not None and not 0 <= outliers <= 4096:
        raise table.fault(f"outliers = {outliers}", "a number of columns, 0 .. 4096")
    if rotate and outliers:
        raise table.fault("rotate and outliers exclude each other: a rotation spreads what the columns hold")
    return Choice(_format(table, "format"), _activations(table), rounding, rotate, outliers)


def _rule(table: _Table) -> Rule:
    table.only(("role", "match", "experts", *(f.name for f in dataclasses.fields(Choice))))
    role, match, experts = table.text("role"), table.text("match"), _experts(table)
    if not role and not match and not experts:
        raise table.fault(
            "it says not what it is about", 'role = "head", match = "regular expression", experts = "0-3,8", or several'
        )
    if role in ("norm", "bias"):
        raise table.fault(f"role {role!r} has no choice of formats: norms and biases stay f32")
    if role and role not in _ALL_ROLES:
        raise table.fault(f"unknown role {role!r}{did_you_mean(role, _ALL_ROLES)}", f"one of {', '.join(_ALL_ROLES)}")
    try:
        re.compile(match)
    except (re.error, OverflowError, RecursionError) as error:
        at = getattr(error, "pos", None)
        shown = f"\n  {match}\n  {' ' * at}^" if at is not None and match.isprintable() else ""
        raise table.fault(f"match is no regular expression: {getattr(error, 'msg', error)}{shown}") from error
    choice = _choice(table)
    if choice == Choice():
        raise table.fault("it says nothing", f"one of {', '.join(f.name for f in dataclasses.fields(Choice))}")
    if role == "embedding":
        low = not isinstance(choice.format, str | PlainFormat | None)
        others = choice.activations is not None or choice.rotate or choice.outliers
        if low or others:
            raise table.fault("an embedding is looked up, not multiplied", 'format = "bf16", "f16", "f32" and no more')
    if experts and role.partition(".")[0] not in ("", "experts"):
        raise table.fault(f"role {role!r} has no experts", 'role = "experts" or one of its parts, or no role')
    return Rule(choice, role, match, experts, f"{table.where}: {table.what}")


def _experts(table: _Table) -> tuple[tuple[int, int], ...]:
    """`experts` of a rule."""
    text = table.text("experts")
    found = read_ranges(text)
    if found is None:
        raise table.fault(f"experts = {text!r}", 'numbers and ranges of them by commas: "0-3,8"')
    return found


def _format(table: _Table, key: str) -> NumberFormat | str | None:
    text = table.text(key)
    if not text or text in (STORED, FLOAT):
        return text or None
    try:
        found = read_format(text) or _parsed(text)
    except DiagnosticError as error:
        words = error.diagnostics[0].message
        like = f'a format like "q4_sym<group=32, scale=f16>" or "bf16", or "{STORED}", "{FLOAT}"'
        raise table.fault(f"{key} = {text!r}: {words}", like) from error
    if isinstance(found, PlainFormat) and found not in FLOATS:
        raise table.fault(f"{key} = {text!r} holds no weights", "f32, bf16, f16 or a low-bit format")
    return found


def _parsed(text: str) -> NumberFormat:
    """What the text form of the IR calls so, or the fault in it. Loads the IR's grammar with all its types and ops."""
    from ir.parse_value import parse_format

    return parse_format(text)


def _activations(table: _Table) -> NumberFormat | str | None:
    found = _format(table, "activations")
    if found is None or found == FLOAT or found in FLOATS:
        return found
    if found == STORED or not (is_int8(found) or is_fp8(found)):
        raise table.fault(
            f"activations = {str(found)!r} cannot be made while a product runs",
            '"bf16", "f32", "f16", "float", "q8_sym<group=N, scale=f32>", "q8_sym<group=row, scale=f32>", or, in front '
            'of FP8, "f8e4m3<block=row, scale=f32>", "f8e4m3<block=1xN, scale=f32>"',
        )
    return found


def _kv(table: _Table) -> str:
    text = table.text("format")
    try:
        return cache_type(text, 1, ANY_WIDTH).format_text if text else ""
    except DiagnosticError as error:
        words = error.diagnostics[0].message
        like = '"bf16", "f16", "f32", or "q8_sym<group=row, scale=f16>" and its options'
        raise table.fault(f"format = {text!r}: {words}", like) from error


def _check_pairs(recipe: Recipe, where: str) -> None:
    """Refuses activations of 8 bits in front of weights of another kind, where one table says both."""
    named = [("[weights]", recipe.weights), *((rule.where or "rule", rule.choice) for rule in recipe.rules)]
    for what, choice in named:
        weights, activations = choice.format, choice.activations
        if weights is None or activations is None or isinstance(weights, str):
            continue
        if not can_meet(activations, weights):
            raise DiagnosticError(
                f"{what}: {activations} activations cannot be multiplied by {weights} weights",
                where=where,
                expected='activations = "bf16" or "f32", q8_sym in front of integers, or f8e4m3 in front of f8e4m3',
            )

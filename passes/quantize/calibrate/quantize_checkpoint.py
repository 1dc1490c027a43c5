"""A checkpoint of floats in, a quantized one in the compressed-tensors layout out.

    report = quantize_checkpoint(imported, recipe, "gptq", Path("out"), sequences=tokens)

`method`: rtn rounds every weight to the nearest with least squared error; gptq and awq need `sequences`, int32
[count, length], of calibration text. Finished tensors are kept in a directory beside `out` and reused by the next call
with the same model, recipe, method and text, whatever ended the one before; the results are the same bytes. `out` comes
into being whole, by a rename. Refuses an `out` that exists, what `targets` refuses, and weights or activations that are
no finite numbers, by the name of the tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from frontends.huggingface import ImportedModel
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.formats import PackedArray
from passes.quantize.calibrate.awq import Scaling, find_folds, find_scaling
from passes.quantize.calibrate.awq_clip import GroupGrams, divided, round_clipped
from passes.quantize.calibrate.compressed_layout import layout_parts, packed_of
from passes.quantize.calibrate.executor import LayerwiseForward, Product
from passes.quantize.calibrate.gptq import DAMPING, Curvature, gptq, gram
from passes.quantize.calibrate.output_directory import MAX_SHARD_BYTES, write_directory
from passes.quantize.calibrate.state import KeptTensors
from passes.quantize.calibrate.targets import Targets, find_targets
from passes.quantize.recipe import Recipe
from passes.quantize.rounding import quantize_rows

METHODS = ("rtn", "gptq", "awq")
RESULTS_VERSION = 2  # of what the same inputs give
_FACTORS = "factors of awq"  # under this name they are kept
_KEPT_CURVATURES = 256 << 20  # bytes
_ENOUGH_ROWS = 4  # an expert is calibrated with its own rows when it has at least k / 4
Tell = Callable[[str, float, float, str], None]


@dataclass
class Report:
    """What was done. `experts`: how many weights of experts were calibrated by rows of their own, with those of all
    tokens added (too few of their own), or rounded to the nearest (none). `awq`: inputs scaled, and why others not.
    """

    method: str
    recipe: str
    tokens: int
    formats: dict[str, int] = field(default_factory=dict)
    bits_per_weight: float = 0.0
    experts: dict[str, int] = field(default_factory=dict)
    awq: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """`path` of the directory, its report, and how many tensors an earlier run had finished."""

    path: Path
    report: Report
    reused: int


def quantize_checkpoint(
    imported: ImportedModel,
    recipe: Recipe,
    method: str,
    out: Path,
    *,
    sequences: np.ndarray | None = None,
    tell: Tell | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Result:
    """Writes `out`; see the module docstring."""
    if method not in METHODS:
        raise DiagnosticError(f"unknown method {method!r}", expected=f"one of {', '.join(METHODS)}")
    if (sequences is None) != (method == "rtn"):
        raise DiagnosticError(
            f"{method} is given {'no ' if sequences is None else ''}calibration text",
            expected="text for gptq and awq, none for rtn, which measures nothing",
        )
    check_output(out, imported.directory)
    targets = find_targets(imported, recipe)
    key = _key(imported, recipe, method, sequences)
    with KeptTensors(out.with_name(f".{out.name}.quantize"), key) as kept:
        run = _Run(imported, targets, kept, sequences, tell or _silent)
        getattr(run, method)()
        report = Report(method, recipe.name, 0 if sequences is None else int(sequences.size))
        run.describe(report)
        write_directory(
            imported,
            targets,
            kept,
            run.scaling,
            out,
            json.dumps(asdict(report), indent=2) + "\n",
            tell or _silent,
            max_shard_bytes,
        )
        kept.remove()
    return Result(out, report, run.reused)


def check_output(out: Path, model: Path) -> None:
    """Raises DiagnosticError unless `out` can become a new directory."""
    if out.exists() or out.is_symlink():
        raise DiagnosticError("is there already", where=str(out), expected="a name for a new directory")
    if not out.parent.is_dir():
        raise DiagnosticError("there is no such directory", where=str(out.parent))
    if out.name in ("", ".", "..") or model.resolve() in out.resolve().parents:
        raise DiagnosticError("lies inside of the model", where=str(out), expected="a place beside it")


def _silent(stage: str, done: float, total: float, unit: str = "") -> None:
    """Progress that nobody watches."""


def _key(imported: ImportedModel, recipe: Recipe, method: str, sequences: np.ndarray | None) -> str:
    """What decides the bytes of the finished tensors."""
    config = imported.directory / "config.json"
    files = {}
    for path in sorted({info.file for info in imported.checkpoint.tensors.values()}):
        status = path.stat()
        files[path.name] = (status.st_size, status.st_mtime_ns)
    text = b"" if sequences is None else sequences.astype("<i4").tobytes() + repr(sequences.shape).encode()
    return json.dumps(
        {
            "results_version": RESULTS_VERSION,
            "method": method,
            "recipe": recipe.to_toml(),
            "config": hashlib.blake2b(config.read_bytes(), digest_size=16).hexdigest(),
            "files": files,
            "calibration": hashlib.blake2b(text, digest_size=16).hexdigest(),
        },
        indent=1,
    )


class _Run:
    """One method over all targets. Every finished tensor is in `kept`."""

    def __init__(
        self,
        imported: ImportedModel,
        targets: Targets,
        kept: KeptTensors,
        sequences: np.ndarray | None,
        tell: Tell,
    ) -> None:
        self.imported, self.targets, self.kept, self.tell = imported, targets, kept, tell
        self.sequences = sequences if sequences is not None else np.zeros((1, 1), np.int32)
        self.func = imported.module.function("step")
        self.scaling = Scaling()
        self.reused = 0
        self.experts: dict[str, int] = {}
        self._sizes = {name: imported.checkpoint.info(name).nbytes for name in targets.formats}
        self._done = 0
        self._curvatures, self._grams = _Curvatures(), GroupGrams(_ENOUGH_ROWS)

    # -- methods -----------------------------------------------------------------------------------------------------

    def rtn(self) -> None:
        for name in self.targets.formats:
            if self._finished(name) is None:
                self._nearest(name)

    def awq(self) -> None:
        kept = self.kept.load(_FACTORS)
        if kept is not None:
            self.scaling = Scaling.from_arrays(kept, find_folds(self.func)[1])
        else:
            formats = self.targets.formats
            read, roles = self.imported.checkpoint.read, self.targets.roles
            self.scaling = find_scaling(
                self.func, read, self.sequences, roles, formats, lambda at, of: self.tell("search", at, of, "ops")
            )
            self.kept.save(_FACTORS, self.scaling.arrays())
        forward = LayerwiseForward(self.func, self.imported.checkpoint.read, self.sequences, self.targets.roles)
        forward.run_products(self._clipped)

    def gptq(self) -> None:
        forward = LayerwiseForward(self.func, self.imported.checkpoint.read, self.sequences, self.targets.roles)
        forward.run_products(self._second_order)

    def _clipped(self, product: Product) -> None:
        """The hook: keeps the weight with its factors, clipped; what is behind it goes on with the floats."""
        name = product.name
        if name not in self.targets.formats:
            return
        self._check_input(product)
        source = self._source(product)
        if self._finished(name) is not None:
            return
        format, w = self.targets.formats[name], self._weight(name)
        grams = self._grams.of(product, source, w.shape[1] // format.groups(w.shape[1]))
        try:
            if grams is None:
                self._keep(name, self._rounded(name, w))
            else:
                self._keep(name, round_clipped(format, w, divided(grams, self.scaling.columns.get(name))))
        except DiagnosticError as error:
            raise self._named(name, error) from None

    def _check_input(self, product: Product) -> None:
        if not np.isfinite(product.x).all():
            raise DiagnosticError(
                f"the model computes numbers that are not finite in front of {product.name}",
                where=str(self.imported.directory),
                expected="weights of a working model",
            )

    def _second_order(self, product: Product) -> np.ndarray | None:
        """The hook: the weight as it is stored from now on."""
        name = product.name
        format = self.targets.formats.get(name)
        if format is None:
            return None
        self._check_input(product)
        source = self._source(product)
        packed = self._finished(name)
        if packed is None:
            curvature = self._curvatures.of(product, source)
            w = self._weight(name)
            try:
                packed = gptq(format, w, curvature) if curvature is not None else self._rounded(name, w)
            except DiagnosticError as error:
                raise self._named(name, error) from None
            self._keep(name, packed)
        return format.unpack(packed)

    def _source(self, product: Product) -> str:
        """Which rows a weight is calibrated by: own, shared or none."""
        if product.expert is None:
            return "own"
        enough = len(product.x) >= product.x.shape[1] // _ENOUGH_ROWS
        source = "own" if enough or (product.shared is None and len(product.x)) else "shared"
        if source == "shared" and product.shared is None:
            source = "none"
        said = {"own": "own rows", "shared": "rows of all tokens added", "none": "rounded to the nearest"}[source]
        self.experts[said] = self.experts.get(said, 0) + 1
        return source

    # -- tensors -----------------------------------------------------------------------------------------------------

    def _finished(self, name: str) -> PackedArray | None:
        """A tensor that is there already."""
        if not self.kept.has(name):
            return None
        parts = self.kept.load(name)
        if parts is None:
            return None
        try:
            packed = packed_of(self.targets.formats[name], self._shape(name), parts)
        except (KeyError, ValueError, DiagnosticError):
            return None  # made again
        self.reused += 1
        self._count(name)
        return packed

    def _shape(self, name: str) -> tuple[int, int]:
        n, k = self.imported.weights[name].shape
        return n, k

    def _weight(self, name: str) -> np.ndarray:
        w = self.scaling.apply(name, self.imported.checkpoint.read(name))
        if not np.isfinite(w).all():
            row, column = (int(i) for i in np.argwhere(~np.isfinite(w))[0])
            info = self.imported.checkpoint.info(name)
            raise DiagnosticError(
                f"tensor {name!r} holds {w[row, column]} in row {row}, column {column}",
                where=str(info.file),
                expected="finite numbers",
            )
        return w

    def _nearest(self, name: str) -> PackedArray:
        try:
            packed = self._rounded(name, self._weight(name))
        except DiagnosticError as error:
            raise self._named(name, error) from None
        self._keep(name, packed)
        return packed

    def _named(self, name: str, error: DiagnosticError) -> DiagnosticError:
        """The fault, with the name of the tensor unless it has it."""
        first = error.diagnostics[0]
        if name in first.message:
            return error
        where = str(self.imported.checkpoint.info(name).file)
        expected = "; ".join(note.message for note in first.notes)
        return DiagnosticError(f"tensor {name!r}: {first.message}", where=where, expected=expected)

    def _rounded(self, name: str, w: np.ndarray) -> PackedArray:
        return quantize_rows(self.targets.formats[name], w, self.targets.roundings[name])

    def _keep(self, name: str, packed: PackedArray) -> None:
        self.kept.save(name, layout_parts(packed))
        self._count(name)

    def _count(self, name: str) -> None:
        self._done += self._sizes[name]
        self.tell("round", self._done, sum(self._sizes.values()), "bytes")

    def describe(self, report: Report) -> None:
        """Fills the report in."""
        bits = weights = 0
        for name, format in self.targets.formats.items():
            report.formats[str(format)] = report.formats.get(str(format), 0) + 1
            shape = self._shape(name)
            bits += 8 * format.nbytes(shape)
            weights += shape[0] * shape[1]
        report.bits_per_weight = round(bits / weights, 4)
        report.experts = dict(sorted(self.experts.items()))
        report.notes = list(self.targets.notes)
        if report.method == "awq":
            report.awq = {"inputs scaled": self.scaling.inputs, **self.scaling.skipped}


class _Curvatures:
    """Curvatures by input and expert, the last few kept: q, k and v share one, and so do gate and up."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Value, int | None], Curvature | None] = OrderedDict()
        self._all: tuple[Value, np.ndarray] | None = None

    def of(self, product: Product, source: str) -> Curvature | None:
        """That of the rows of a product; None when there are none."""
        key = (product.source, product.expert)
        if key not in self._kept:
            if self._kept and next(reversed(self._kept))[0] is not product.source:
                self._kept.clear()  # inputs come one after another
            self._kept[key] = self._make(product, source)
            while (
                sum(c.nbytes for c in self._kept.values() if c is not None) > _KEPT_CURVATURES and len(self._kept) > 1
            ):
                self._kept.popitem(last=False)
        return self._kept[key]

    def _make(self, product: Product, source: str) -> Curvature | None:
        if source == "none":
            return None
        rows, k = product.x.shape
        enough = max(1, k // _ENOUGH_ROWS)
        damping = DAMPING
        sums = gram(product.x)
        if source == "shared" and product.shared is not None:
            # as many rows of all tokens as are missing
            if self._all is None or self._all[0] is not product.source:
                self._all = (product.source, gram(product.shared) / len(product.shared))
            sums += self._all[1] * (enough - rows)
        elif rows < enough:
            damping = min(1.0, DAMPING * enough / rows)  # few rows say little of most directions
        return Curvature.of(sums, damping)

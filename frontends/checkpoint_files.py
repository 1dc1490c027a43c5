"""Which files of a Hugging Face directory hold the weights.

Takes a directory, gives the safetensors files to read: `model.safetensors`, or the shards that
`model.safetensors.index.json` names. Refuses, saying what would work: pickles (`.bin`, `.pt`, `.pth`; reading one runs
code of whoever wrote it), GGUF, adapters, names in the index that leave the directory, and missing shards.

Links: a file's real place must be the directory itself, or the blob store of the Hugging Face cache it belongs to
(`<repo>/snapshots/<revision>/x` -> `<repo>/blobs/<hash>`). Any other link could make a downloaded model read files of
the user, so it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from frontends.json_file import MEBIBYTE, file_size, read_text
from ir.diagnostics import DiagnosticError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 * MEBIBYTE
MAX_SHARDS = 10_000
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_CONVERT_PICKLE = (
    "load the model with transformers in a sandbox you trust and call "
    "model.save_pretrained(DIR, safe_serialization=True), or use a revision of the model that has .safetensors files"
)


@dataclass(frozen=True)
class WeightFiles:
    """`files` in order of their names. `placement` maps tensor to file name when an index says so, else it is empty."""

    files: tuple[Path, ...]
    placement: dict[str, str]
    index: Path | None = None


class _Index(msgspec.Struct):
    """The part of the index that is read; a typed decoder keeps memory near the size of the file."""

    weight_map: dict[str, str]


def check_directory(directory: Path) -> Path:
    """`directory`, which must be a directory; a diagnostic says what to do with a file of weights instead."""
    if directory.is_dir():
        return directory
    where = str(directory)
    if not directory.exists():
        raise DiagnosticError("there is no such directory", where=where, expected="a Hugging Face model directory")
    suffix = directory.suffix.lower()
    if suffix == ".gguf":
        raise _gguf(where)
    if suffix in PICKLE_SUFFIXES:
        raise _pickle(where)
    hint = "give the directory that holds it, with its config.json" if suffix == ".safetensors" else ""
    raise DiagnosticError("is a file", where=where, expected="a Hugging Face model directory", hint=hint)


def companion(directory: Path, name: str) -> Path | None:
    """The file `name` of the directory, or None when there is none. A link that leaves the directory is refused."""
    path = directory / name
    if not path.is_symlink() and not path.exists():
        return None
    return _inside(directory, path)


def find_weight_files(directory: Path) -> WeightFiles:
    """The weight files of a model directory, every one of them present."""
    check_directory(directory)
    single = companion(directory, SINGLE_FILE)
    if single is not None:
        return WeightFiles((single,), {})
    index = companion(directory, INDEX_FILE)
    if index is None:
        raise _no_weights(directory)
    placement = _read_index(index)
    names = sorted(set(placement.values()))
    if not names or len(names) > MAX_SHARDS:
        raise DiagnosticError(f"names {len(names)} files", where=str(index), expected=f"1 to {MAX_SHARDS} shards")
    for name in names:
        _check_shard_name(name, index)
    paths = [directory / name for name in names]
    missing = [p.name for p in paths if not p.is_symlink() and not p.exists()]
    if missing:
        listed = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise DiagnosticError(
            f"{len(missing)} of {len(names)} weight files are missing: {listed}",
            where=str(index),
            expected="every file that the index names",
            hint="the download may have been interrupted; fetch the missing files",
        )
    return WeightFiles(tuple(_inside(directory, p) for p in paths), placement, index)


def _read_index(index: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(read_text(index, limit=MAX_INDEX_BYTES), type=_Index).weight_map
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DiagnosticError(
            f"is no index of shards: {error}", where=str(index), expected='{"weight_map": {"tensor": "file", ...}}'
        ) from None


def _check_shard_name(name: str, index: Path) -> None:
    plain = name not in ("", ".", "..") and not any(c in name for c in "/\\\0:")
    if not plain:
        raise DiagnosticError(
            f"the index names the file {name[:200]!r}, which is not a plain file name",
            where=str(index),
            expected="names of files in the same directory, without '/' or '..'",
        )
    if not name.endswith(".safetensors"):
        if name.endswith(PICKLE_SUFFIXES):
            raise _pickle(f"{index}: {name}")
        raise DiagnosticError(
            f"the index names {name[:200]!r}, which is no safetensors file",
            where=str(index),
            expected="names ending in .safetensors",
        )


def _inside(directory: Path, path: Path) -> Path:
    """`path`, whose real place must be in `directory` or in the blob store of the cache; see the module docstring."""
    file_size(path)  # missing targets, loops of links, pipes and devices end here
    home = directory.resolve()
    real = path.resolve()
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if real.parent != home and not in_cache:
        raise DiagnosticError(
            f"is a link to {real}, outside of the model directory",
            where=str(path),
            expected="a file in the directory, or a link into the blobs of the Hugging Face cache it belongs to",
            hint="copy the file into the directory",
        )
    return path


def _no_weights(directory: Path) -> DiagnosticError:
    where = str(directory)
    names = sorted(p.name for p in directory.iterdir())
    expected = f"{SINGLE_FILE}, or {INDEX_FILE} and its shards"
    if "adapter_model.safetensors" in names:
        hint = "merge the adapter into its base model and save the result"
        return DiagnosticError("holds an adapter (LoRA), not a model", where=where, expected=expected, hint=hint)
    others = [n for n in names if n.endswith(".safetensors")]
    if others:
        message = f"has no {SINGLE_FILE} and no index; there are only {', '.join(others[:4])}"
        return DiagnosticError(message, where=where, expected=expected, hint="fetch or write the index file")
    pickles = [n for n in names if n.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return _pickle(f"{directory}/{pickles[0]}")
    ggufs = [n for n in names if n.endswith(".gguf")]
    if ggufs:
        return _gguf(f"{directory}/{ggufs[0]}")
    return DiagnosticError("holds no weights", where=where, expected=expected)


def _pickle(where: str) -> DiagnosticError:
    return DiagnosticError(
        "is a pickle; reading one runs any code it holds, so it is refused",
        where=where,
        expected="weights in .safetensors files",
        hint=_CONVERT_PICKLE,
    )


def _gguf(where: str) -> DiagnosticError:
    return DiagnosticError(
        "is a GGUF file, which cannot be read yet",
        where=where,
        expected="a Hugging Face directory with config.json and .safetensors files",
        hint="use the model that the GGUF file was converted from",
    )

"""Write a checkpoint with random weights: any family and size, with a valid tokenizer, in bounded memory.

    python examples/make_model.py llama-1.1b OUT --dtype bf16
    python examples/make_model.py tiny-qwen3_moe OUT --set num_experts=16 --set tie_word_embeddings=true
    python examples/make_model.py olmoe-1b-7b OUT --dtype bf16 --embedding-scale 400 --router session
    python examples/make_model.py --list

Every weight is drawn independently from a normal distribution, by 32 random bits that pick a point on a table of its
quantiles: fast, never periodic, and the same on every machine. A tensor's stream is seeded by the seed and the
tensor's name alone, so sharding or a different dtype changes no value but its rounding.
"""

import argparse
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import ml_dtypes
import numpy as np

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples import filler_tokenizer
from examples.model_presets import PRESETS, ModelRequestError, TensorShape, config_fields, spelled, tensor_shapes
from examples.session_router import SessionRouter

DTYPES = {
    "f32": ("F32", "float32", np.dtype("<f4")),
    "f16": ("F16", "float16", np.dtype("<f2")),
    "bf16": ("BF16", "bfloat16", np.dtype(ml_dtypes.bfloat16)),
}  # safetensors name, config.json name, numpy dtype
BLOCK = 1 << 17  # elements drawn at a time: their working arrays stay inside a second-level cache
NORM_SPREAD, BIAS_SPREAD = 0.1, 0.1
ROUTERS = ("random", "session")
_FAMILIES_WITH_BOS = ("llama", "mistral", "mixtral")


Values = Callable[[TensorShape], Iterator[np.ndarray]]


@dataclass(frozen=True)
class _Shard:
    name: str
    tensors: tuple[TensorShape, ...]


def write_model(
    preset: str,
    out: Path,
    *,
    dtype: str = "f32",
    seed: int = 0,
    config_style: str = "v5",
    shard_size: int | None = None,
    init_std: float | None = None,
    embedding_scale: float = 1.0,
    router: str = "random",
    overrides: dict[str, object] | None = None,
    force: bool = False,
) -> Path:
    """Write a Hugging Face model directory with random weights.

    Args:
        preset: a name in `PRESETS`, a family (its tiny model), or the path of a config.json.
        out: the directory; made if missing.
        dtype: "f32", "f16" or "bf16".
        config_style: config.json's spelling, before ("v4") or since ("v5") transformers v5.
        shard_size: largest number of tensor bytes in a file (a larger tensor gets a file of its own); None: one file.
        init_std: standard deviation of every matrix and of the embedding. None: 1/sqrt(fan-in) of each, which keeps
            activations and logits near 1, so that a mistake anywhere shows; the usual 0.02 gives flat logits.
        embedding_scale: factor on the embedding. Larger values (50) let the token decide over what the layers add
            up, so that a random router spreads tokens evenly; tied logits are scaled with it.
        router: "random", or "session": experts are as popular as in a recorded session (`examples.session_router`).
        overrides: config.json fields, in either spelling.
        force: overwrite a checkpoint that is already in `out`.
    Returns:
        `out`.
    Raises:
        ModelRequestError: for an unknown name or value, contradicting sizes, an occupied directory, or a full disk.
    """
    if dtype not in DTYPES or config_style not in ("v4", "v5"):
        raise ModelRequestError(
            f"dtype must be one of {', '.join(DTYPES)} and config_style v4 or v5, not {dtype!r} and {config_style!r}"
        )
    if router not in ROUTERS:
        raise ModelRequestError(f"router must be one of {', '.join(ROUTERS)}, not {router!r}")
    if shard_size is not None and shard_size < 1:
        raise ModelRequestError(f"shard_size must be at least 1 byte, not {shard_size}")
    if seed < 0:
        raise ModelRequestError(f"seed must not be negative, but is {seed}")
    fields = config_fields(preset, overrides)
    add_bos = fields["model_type"] in _FAMILIES_WITH_BOS
    try:
        tokenizer = filler_tokenizer.tokenizer_json(fields["vocab_size"], add_bos)
    except ValueError as error:
        raise ModelRequestError(f"vocab_size: {error}") from error
    tensors = tensor_shapes(fields)
    values: Values = functools.partial(tensor_values, seed=seed, init_std=init_std, embedding_scale=embedding_scale)
    if router == "session":
        deviation = embedding_scale * (fields["hidden_size"] ** -0.5 if init_std is None else init_std)
        values = SessionRouter(fields, values, deviation, seed).values
    _take_directory(out, sum(_bytes(tensor, dtype) for tensor in tensors), force)
    for name, content in {
        "config.json": spelled(fields, config_style, DTYPES[dtype][1]),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": filler_tokenizer.tokenizer_config(add_bos, fields["max_position_embeddings"]),
        "generation_config.json": {
            "bos_token_id": fields["bos_token_id"],
            "eos_token_id": fields["eos_token_id"],
            "pad_token_id": fields["pad_token_id"],
            "do_sample": False,
        },
    }.items():
        text = json.dumps(content, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
        (out / name).write_text(text + "\n", encoding="utf-8")
    shards = _shards(tensors, dtype, shard_size)
    for shard in shards:
        _write_shard(out / shard.name, shard.tensors, dtype, values)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_bytes(tensor, dtype) for tensor in tensors)},
            "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return out


def tensor_values(
    tensor: TensorShape, seed: int, init_std: float | None, embedding_scale: float
) -> Iterator[np.ndarray]:
    """The values of one tensor in row-major order, in float32 blocks of at most `BLOCK` elements."""
    if tensor.role == "norm":
        center, spread = 1.0, NORM_SPREAD
    elif tensor.role == "bias":
        center, spread = 0.0, BIAS_SPREAD
    else:
        center, spread = 0.0, tensor.shape[-1] ** -0.5 if init_std is None else init_std
        spread *= embedding_scale if tensor.role == "embedding" else 1.0
    low, slope = _quantiles()
    low, slope = (center + spread * low).astype(np.float32), (spread * slope).astype(np.float32)
    name_hash = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:16], "big")
    bits = np.random.SFC64(np.random.SeedSequence([seed, name_hash]))
    left = int(np.prod(tensor.shape, dtype=np.int64))
    while left:
        count = min(left, BLOCK)
        # Raw words, not a Generator's methods: numpy promises that only the former never change between versions.
        halves = bits.random_raw((count + 1) // 2).astype("<u8", copy=False).view("<u2")
        coarse, fine = halves[0::2][:count], halves[1::2][:count]
        values = slope[coarse]
        values *= fine
        values += low[coarse]
        yield values
        left -= count


@functools.cache
def _quantiles() -> tuple[np.ndarray, np.ndarray]:
    """65536 quantiles of the standard normal distribution, and 1/65536 of the step from each to the next."""
    normal, count = NormalDist(), 1 << 16
    edges = np.array([normal.inv_cdf((index + 0.5) / (count + 1)) for index in range(count + 1)])
    return edges[:-1], np.diff(edges) / count


def _bytes(tensor: TensorShape, dtype: str) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * DTYPES[dtype][2].itemsize


def _shards(tensors: list[TensorShape], dtype: str, shard_size: int | None) -> list[_Shard]:
    groups: list[list[TensorShape]] = []
    room = 0
    for tensor in tensors:
        if not groups or (shard_size is not None and _bytes(tensor, dtype) > room):
            groups.append([])
            room = shard_size or 0
        groups[-1].append(tensor)
        room -= _bytes(tensor, dtype)
    if len(groups) == 1:
        return [_Shard("model.safetensors", tuple(groups[0]))]
    return [
        _Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def _write_shard(path: Path, tensors: tuple[TensorShape, ...], dtype: str, values: Values) -> None:
    """Header first, then the tensors block by block: nothing of a tensor is kept."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + _bytes(tensor, dtype)
        header[tensor.name] = {"dtype": DTYPES[dtype][0], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for block in values(tensor):
                file.write(block.astype(DTYPES[dtype][2], copy=False).view(np.uint8).data)


def _take_directory(out: Path, size: int, force: bool) -> None:
    """Make `out`, check that it is free and that `size` bytes fit."""
    if out.exists() and not out.is_dir():
        raise ModelRequestError(f"{out} is a file, not a directory")
    out.mkdir(parents=True, exist_ok=True)
    old = sorted([*out.glob("model*.safetensors"), *out.glob("model.safetensors.index.json")])
    if old and not force:
        raise ModelRequestError(f"{out} already holds {old[0].name}; choose another directory, or force overwriting")
    for path in old:
        path.unlink()
    free = shutil.disk_usage(out).free
    if size > free:
        raise ModelRequestError(f"the weights need {size} bytes; {out} has {free} free")


def _parse_setting(text: str) -> tuple[str, object]:
    """`name=value` with a JSON value; a value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _parse_size(text: str) -> int:
    """A number of bytes: 500000, 500MB, 2GiB."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.rstrip("kKmMgGiIbB")
    unit = text[len(number) :].upper()
    if not number.isdigit() or unit not in units:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GiB, got {text!r}")
    return int(number) * units[unit]


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", help="a preset, a family, or the path of a config.json")
    parser.add_argument("out", nargs="?", type=Path, help="the directory to write")
    parser.add_argument("--list", action="store_true", help="print the presets and stop")
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config-style", choices=["v4", "v5"], default="v5", help="spelling before or since v5")
    parser.add_argument("--shard-size", type=_parse_size, help="largest file, such as 2GiB; default: one file")
    parser.add_argument("--init-std", type=float, help="of every matrix; default: 1/sqrt(fan-in)")
    parser.add_argument("--embedding-scale", type=float, default=1.0, help="factor on the token embedding")
    parser.add_argument("--router", choices=ROUTERS, default="random", help="session: experts as popular as in one")
    parser.add_argument(
        "--set",
        action="append",
        type=_parse_setting,
        default=[],
        metavar="NAME=VALUE",
        help="override a config.json field; VALUE is JSON",
    )
    parser.add_argument("--force", action="store_true", help="overwrite a checkpoint that is there")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(PRESETS))
        return 0
    if options.preset is None or options.out is None:
        parser.error("a preset and an output directory are needed; --list names the presets")
    try:
        out = write_model(
            options.preset,
            options.out,
            dtype=options.dtype,
            seed=options.seed,
            config_style=options.config_style,
            shard_size=options.shard_size,
            init_std=options.init_std,
            embedding_scale=options.embedding_scale,
            router=options.router,
            overrides=dict(options.set),
            force=options.force,
        )
    except (ModelRequestError, OSError) as error:
        print(f"make_model: {error}", file=sys.stderr)
        return 2
    files = sorted(out.glob("model*.safetensors"))
    print(f"{out}: {sum(file.stat().st_size for file in files):,} bytes of weights in {len(files)} file(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

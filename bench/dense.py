"""Every speed and memory figure of a dense model in one run: ours, a peer's, the machine's limits. Prints markdown.

    python -m bench.dense [--preset llama-1.1b] [--work build/bench] [--no-peer]

Measured one after another, nothing at the same time:
  machine      read bandwidth and bf16 peak (the calibration of `hw_targets`)
  build        wall time and peak memory of `compile-model build`, beside reading, writing and syncing the same bytes
  code         the 22 layers' code: graph to object, with a cold and a warm cache
  start        imports, `--help`, first token of a 16-token prompt from an artifact that the page cache holds
  speed        llama-bench's rows, and torch eager bf16 on the same shape
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.measure import ROOT, Finished, cli, machine, median, run, seconds_to_first_byte, table

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-1.1b", help="a preset of examples/make_model.py")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="where models are kept")
    parser.add_argument("--only-speed", action="store_true", help="just the last table")
    parser.add_argument("--no-peer", action="store_true", help="without torch")
    parser.add_argument("--depth", default="0,1920", help="depths of the decode rows")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.work / options.preset
    if not (model / "config.json").exists():
        run([sys.executable, "examples/make_model.py", options.preset, str(model), "--dtype", "bf16"])
    artifact = options.work / f"{options.preset}.stratum"

    print(f"{machine()}\n")
    if not options.only_speed:
        rows = [*build_rows(model, artifact), *code_rows(model), *start_rows(artifact)]
        print(table(["what", "measured", "bar", "ratio"], rows), "\n")
    print(table(["test", "stratum", "of the machine's limit", "torch eager bf16", "ratio"],
                speed_rows(model, artifact, options.depth, peer=not options.no_peer)))  # fmt: skip


def copy_seconds(source: Path, directory: Path) -> float:
    """Seconds to read a file, write its bytes and sync them."""
    target = directory / "copy.bin"
    start = time.perf_counter()
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 8 * MIB)
        os.fsync(writer.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def build_rows(model: Path, artifact: Path) -> list[list[str]]:
    """Build time and memory, beside a copy of the same bytes."""
    weights = next(model.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=artifact.parent) as folder:
        copies = [copy_seconds(weights, Path(folder)) for _ in range(3)]
        builds: list[Finished] = []
        for number in range(3):  # an empty cache each time: code is generated, too
            shutil.rmtree(artifact, ignore_errors=True)
            cache = {"STRATUM_CACHE": f"{folder}/{number}"}
            builds.append(run(cli("build", str(model), "-o", str(artifact)), env=cache))
    seconds, copied = median([b.seconds for b in builds]), median(copies)
    return [
        ["build, wall", f"{seconds:.1f} s", f"<= 2 x copy ({copied:.1f} s)", f"{seconds / copied:.2f}"],
        ["build, peak memory", f"{max(b.peak_bytes for b in builds) / MIB:.0f} MiB", "< 1024 MiB", ""],
    ]


_CODE = """
import json, sys, time
from pathlib import Path
import hw_targets
from codegen.code_bundle import CodeBundle, bundle_key, load_bundle, store_bundle
from codegen.compile_step import compile_step
from codegen.build_pipeline import default_pipeline
from codegen.object_cache import ObjectCache
from frontends.huggingface import import_model
from ir import print_module
from passes.pass_manager import PassManager
from passes.pipeline_text import print_pipeline
imported = import_model(Path(sys.argv[1]))
target, cache = hw_targets.load("host"), ObjectCache()
start = time.perf_counter()
passes = default_pipeline(target, "bf16")
key = bundle_key(print_module(imported.module), print_pipeline(passes), target)
bundle = load_bundle(cache, key)
warm = bundle is not None
if bundle is None:
    PassManager(passes).run(imported.module)
    bundle = CodeBundle.of(imported.module, compile_step(imported.module.function("step"), target, cache=cache))
    store_bundle(cache, key, bundle)
print(json.dumps([time.perf_counter() - start, warm, len(bundle.object_code)]))
"""


def code_rows(model: Path) -> list[list[str]]:
    """Passes, lowering and LLVM for the whole step, then the same from the cache."""
    cold, warm, size = [], [], 0
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            for times in (cold, warm):
                done = run([sys.executable, "-c", _CODE, str(model)], env={"STRATUM_CACHE": folder})
                seconds, was_cached, size = json.loads(done.stdout)
                if was_cached != (times is warm):
                    raise SystemExit("the code cache did not do what this measures")
                times.append(seconds)
    return [
        [f"code of the step ({size // 1024} KiB), cold", f"{median(cold):.2f} s", "< 5 s", ""],
        ["code of the step, warm", f"{median(warm) * 1000:.0f} ms", "< 300 ms", ""],
    ]


def sixteen_tokens(artifact: Path) -> str:
    """A prompt of 16 tokens for the artifact's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    text = ""
    while len(tokenizer.encode(text).ids) < 16:
        text += " a"
    return text


def start_rows(artifact: Path) -> list[list[str]]:
    """Process start to import, to help, to the first token."""
    programs = ("pass", "import stratum")
    python = [median([run([sys.executable, "-c", code]).seconds for _ in range(5)]) for code in programs]
    helped = median([run(cli("--help")).seconds for _ in range(5)])
    prompt = sixteen_tokens(artifact)
    first = [seconds_to_first_byte(cli("run", str(artifact), "--prompt", prompt, "-n", "2")) for _ in range(8)]
    return [
        ["import stratum", f"{(python[1] - python[0]) * 1000:.0f} ms over a bare interpreter", "< 300 ms", ""],
        ["compile-model --help", f"{helped * 1000:.0f} ms", "", ""],
        ["first token of a 16-token prompt, from process start", f"{median(first[1:]) * 1000:.0f} ms", "< 500 ms", ""],
    ]


def speed_rows(model: Path, artifact: Path, depth: str, peer: bool) -> list[list[str]]:
    """llama-bench rows beside torch."""
    records: list[dict[str, Any]] = []
    tests = [("-p", "512", "-n", "0"), *(("-p", "0", "-n", "64", "-d", d) for d in depth.split(","))]
    for arguments in tests:
        # Bandwidth drifts on shared machines: the limit is measured anew beside every row.
        run(cli("targets", "detect", "--calibrate", "--json"))
        done = run(cli("bench", str(artifact), *arguments, "-r", "5", "-o", "jsonl", "--quiet"))
        records += [json.loads(line) for line in done.stdout.splitlines()]
    torch: dict[str, Any] = {}
    if peer:
        done = run([sys.executable, "-m", "bench.torch_peer", str(model), "--threads", str(records[0]["n_threads"])])
        torch = json.loads(done.stdout)
    rows = []
    for r in records:
        prefill = r["n_prompt"] > 0
        name = f"pp{r['n_prompt']}" if prefill else f"tg{r['n_gen']}"
        name += f" @ d{r['n_depth']}" if r["n_depth"] else ""
        limit = r["fraction_of_peak" if prefill else "fraction_of_bandwidth"]
        machine_limit = r["calibration"]["bf16_peak" if prefill else "read_bandwidth"] / 1e9
        what = f"{machine_limit:.0f} GFLOP/s bf16" if prefill else f"{machine_limit:.1f} GB/s read"
        other = median(torch["prefill" if prefill else "decode"]) if torch and not r["n_depth"] else None
        rows.append([
            name, f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f} t/s", f"{100 * limit:.1f} % of {what}",
            f"{other:.2f} t/s" if other else "", f"{r['avg_ts'] / other:.2f} x" if other else "",
        ])  # fmt: skip
    return rows


if __name__ == "__main__":
    main()

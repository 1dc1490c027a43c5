"""Target files, their names, overrides and messages."""

import dataclasses
import importlib.metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hw_targets
from codegen.compile_worker import CompileRequest, compile_many, shutdown
from hw_targets import Target, registry
from hw_targets.quantities import enough_bytes, format_bytes, parse_quantity
from hw_targets.schema import load_file, parse_target
from ir.diagnostics import DiagnosticError

FULL = """
name = "server"
description = "an example"
power = "360W"
source = "measured at the plug"
[llvm]
triple = "x86_64-unknown-linux-gnu"
cpu = "x86-64-v4"
features = ["avx512bf16"]
disabled = ["sse4a"]
[[unit]]
name = "cores"
tier = "dram"
cores = 8
clock = "3.7GHz"
peak = { f32 = "117GFLOP/s", bf16 = "0.234TFLOP/s" }
source = "measured"
[[unit]]
name = "ndp"
kind = "near-memory"
tier = "cxl"
[[cache]]
level = 2
size = "1MiB"
[[tier]]
name = "dram"
capacity = "64GiB"
reserve = "2GiB"
read = "57GB/s"
latency = "90ns"
source = "measured"
[[tier]]
name = "cxl"
capacity = "256GiB"
[[link]]
name = "cxl-bus"
from = "cxl"
to = "dram"
bandwidth = "26GB/s"
source = "datasheet"
[[storage]]
name = "nvme"
capacity = "2TB"
source = "measured"
points = [{ block = "128KiB", depth = 8, read = "6.5GB/s", write = "3GB/s" }, { block = 4096, depth = 1, read = 5e7 }]
"""


INSTRUCTION_SETS = ["aarch64", "cuda", "cuda-sm90a", "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16"]


def test_every_listed_target_loads():
    names = hw_targets.names()
    assert names[0] == "host" and names[1:] == sorted(names[1:])
    assert [name for name in names[1:] if not hw_targets.load(name).is_machine] == INSTRUCTION_SETS
    for name in names:
        target = hw_targets.load(name)
        assert target.name == name and target.description
        assert target.unit() is not None and target.tier() is not None


@pytest.mark.parametrize(
    ("name", "bits", "registers", "has", "lacks"),
    [
        ("x86-64-v2", 128, 16, "sse4.2", "avx"),
        ("x86-64-v3", 256, 16, "fma", "avx512f"),
        ("x86-64-v4", 512, 32, "avx512bw", "avx512bf16"),
        ("x86-64-v4-bf16", 512, 32, "avx512bf16", "avx512fp16"),
        ("aarch64", 128, 32, "neon", "dotprod"),
    ],
)
def test_what_the_levels_offer(name, bits, registers, has, lacks):
    target = hw_targets.load(name)
    assert (target.vector_bits, target.num_vector_registers) == (bits, registers)
    assert target.has(has) and not target.has(lacks)
    assert has in target.required_features()


def test_every_target_compiles():
    targets = [
        hw_targets.load(name)
        for name in ("host", *INSTRUCTION_SETS, "b200", "gh200", "phone-ufs4")
        if not name.startswith("cuda")
    ]
    text = "define float @f(float %a) {\n  %y = fmul float %a, %a\n  ret float %y\n}\n"
    requests = [CompileRequest(text, t.llvm_triple, t.llvm_cpu, t.feature_string(), name=t.name) for t in targets]
    assert all(code[:4] == b"\x7fELF" for code in compile_many(requests, workers=1))
    shutdown()


def test_levels_run_each_other_upwards():
    v2, v3, v4, arm = (hw_targets.load(n) for n in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64"))
    assert v4.can_run(v3) and v3.can_run(v2) and v2.can_run(v2)
    assert not v2.can_run(v3) and not v4.can_run(arm)


def test_full_file():
    t = parse_target(FULL, "server.toml")
    cores = t.unit("cores")
    assert cores.peak_of("bf16") == pytest.approx(8 * 0.234e12)
    assert cores.peak_of("f32", cores=2) == pytest.approx(2 * 117e9)
    assert cores.peak_of("i8") is None and t.unit("ndp").peak_of("f32") is None
    assert cores.clock_hz == pytest.approx(3.7e9)
    dram = t.tier("dram")
    assert (dram.capacity_bytes, dram.reserve_bytes) == (64 << 30, 2 << 30)
    assert dram.read_bandwidth == 57e9 and dram.write_bandwidth is None
    assert dram.latency_seconds == pytest.approx(90e-9)
    assert t.links[0].from_tier == "cxl" and t.links[0].bandwidth == 26e9
    assert [(p.block_bytes, p.queue_depth, p.read_bandwidth) for p in t.storage[0].points] == [
        (131072, 8, 6.5e9),
        (4096, 1, 5e7),
    ]
    assert t.cache_bytes(2) == 1 << 20 and t.cache_bytes(3) is None
    assert t.power_watts == 360
    assert t.feature_string().startswith("+64bit,") and t.feature_string().endswith("+xsave,-sse4a")
    assert t.unit("gpu") is None and t.tier("hbm") is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        t.name = "other"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "server"', 'nam = "server"', "missing required field `name`|unknown field `nam`"),
        ("cores = 8", 'cores = "eight"', r"Expected `int \| null`, got `str` - at `\$\.unit\[0\]\.cores`"),
        ("cores = 8", "cores = 0", r"unit\[0\]\.cores: error: 0 cores"),
        ('clock = "3.7GHz"', 'clock = "3.7GB"', "'3.7GB' is not a quantity of kind frequency"),
        ('bf16 = "0.234TFLOP/s"', 'bf61 = "0.234TFLOP/s"', "'bf61' is not an element"),
        ('source = "measured"', 'source = ""', r"unit\[0\]\.source: error: missing"),
        ('read = "57GB/s"', 'read = "fast"', r"tier\[0\]\.read: error: 'fast' is not a number"),
        ('tier = "cxl"', 'tier = "hbm"', "the tier 'hbm' is not described"),
        ('to = "dram"', 'to = "ram"', "link cxl-bus: error: the tier 'ram' is not described"),
        ('name = "cxl"', 'name = "dram"', "two are named 'dram'"),
        ('kind = "near-memory"', 'kind = "fpga"', "'fpga' is not a kind of unit"),
        ("level = 2", "level = 0", r"cache\[0\]: error: level 0"),
        ('disabled = ["sse4a"]', 'disabled = ["avx2"]', "avx2 is enabled too"),
        ('triple = "x86_64-unknown-linux-gnu"', 'triple = "x86"', "'x86' is not a triple"),
        ("depth = 8", "depth = 0", r"storage\[0\]\.points\[0\]\.depth: error: 0"),
        ('name = "nvme"', 'name = "../nvme"', "'../nvme' is not a name"),
        ("[llvm]", "[llvm", "not a TOML file"),
        ('capacity = "64GiB"', 'capacity = "-1GiB"', "is out of range"),
        ('capacity = "64GiB"', "capacity = nan", "is out of range"),
    ],
)
def test_faulty_file_names_the_field(old, new, message):
    assert old in FULL
    with pytest.raises(DiagnosticError, match=message) as caught:
        parse_target(FULL.replace(old, new, 1), "server.toml")
    assert str(caught.value).startswith("server.toml")


def test_file_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(FULL)
    assert hw_targets.load(str(path)).name == "server"
    assert hw_targets.load(f"{path}{{dram=8GiB}}").tier("dram").capacity_bytes == 8 << 30


def test_unreadable_and_huge_files(tmp_path):
    with pytest.raises(DiagnosticError, match="cannot read the target file: No such file"):
        load_file(tmp_path / "nothing.toml")
    with pytest.raises(DiagnosticError, match="cannot read the target file"):
        load_file(tmp_path)
    (tmp_path / "huge.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(DiagnosticError, match="too large"):
        load_file(tmp_path / "huge.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DiagnosticError, match="not a TOML file"):
        load_file(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("h200", "h200-sxm"),
        ("RTX4090", "rtx-4090"),
        ("epyc_9654", "epyc-9654"),
        ("X86-64-V3", "x86-64-v3"),
        ("x86-64-v4", "x86-64-v4"),
        ("m2", "m2-ultra"),
    ],
)
def test_first_words_and_spellings_of_a_name(name: str, meant: str) -> None:
    assert hw_targets.load(name).name == meant


def test_first_words_of_two_names_are_none() -> None:
    with pytest.raises(DiagnosticError, match="unknown target 'a100'") as caught:
        hw_targets.load("a100")
    assert "did you mean a100-40gb or a100-80gb?" in str(caught.value)


@pytest.mark.parametrize(("name", "hint"), [("x86-64-v5", "x86-64-v4"), ("hots", "host"), ("arch64", "aarch64")])
def test_unknown_name_suggests(name, hint):
    with pytest.raises(DiagnosticError, match="unknown target") as caught:
        hw_targets.load(name)
    assert f"did you mean {hint}?" in str(caught.value)
    assert "x86-64-v2, x86-64-v3" in str(caught.value)


class FakePoint:
    def __init__(self, name, value, loaded):
        self.name, self.value, self.loaded = name, value, loaded

    def load(self):
        return self.loaded


@pytest.mark.parametrize("form", ["target", "function", "path"])
def test_target_of_a_package(monkeypatch, tmp_path, form):
    (tmp_path / "t.toml").write_text(FULL)
    target = parse_target(FULL)
    loaded = {"target": target, "function": lambda: target, "path": str(tmp_path / "t.toml")}[form]
    points = [FakePoint("acme", "acme:target", loaded)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    assert "acme" in hw_targets.names()
    assert isinstance(hw_targets.load("acme"), Target)
    assert hw_targets.load("acme").name == "server"


@pytest.mark.parametrize(("loaded", "message"), [(42, "is a int"), (lambda: 1 / 0, "failed to load: division by zero")])
def test_faulty_target_of_a_package(monkeypatch, loaded, message):
    monkeypatch.setattr(registry, "_entry_points", lambda: {"acme": FakePoint("acme", "acme:target", loaded)})
    with pytest.raises(DiagnosticError, match=message) as caught:
        hw_targets.load("acme")
    assert "acme:target" in str(caught.value)


def test_overrides():
    t = hw_targets.load("x86-64-v4{dram=8GiB, cores.cores=4 dram.read=40GB/s,cores.peak.bf16=1TFLOP/s}")
    assert t.tier("dram").capacity_bytes == 8 << 30
    assert t.tier("dram").read_bandwidth == 40e9
    assert t.unit("cores").peak_of("bf16") == 4e12
    assert "given on the command line" in t.tier("dram").source


def test_feature_overrides():
    more = hw_targets.load("x86-64-v3{features=+avx512bf16+gfni}")
    assert more.has("avx512bf16") and more.has("avx512bw") and more.vector_bits == 512
    less = hw_targets.load("x86-64-v4{without=avx512f}")
    assert less.vector_bits == 256 and not less.has("avx512bw")
    assert "-avx512f" in less.feature_string()
    both = hw_targets.load("x86-64-v4{without=avx512f features=+avx512vnni}")
    assert both.has("avx512f") and "-avx512f" not in both.feature_string()
    named = hw_targets.load("x86-64-v2{cpu=x86-64-v3}")
    assert named.llvm_cpu == "x86-64-v3" and named.has("avx2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x86-64-v3{hbm=80GiB}", "has nothing named 'hbm'"),
        ("x86-64-v3{dram.reed=1GB/s}", "dram has no field 'reed'"),
        ("x86-64-v3{dram}", "'dram' is not an override"),
        ("x86-64-v3{dram=1GiB dram=2GiB}", "dram is given twice"),
        ("x86-64-v3{dram=80}{}", "is not a target"),
        ("x86-64-v3{dram=much}", "'much' is not a number with a unit"),
        ("x86-64-v3{cores.cores=0}", "0 is not a count"),
        ("x86-64-v3{cores.cores=1.5}", "1.5 is not a count"),
        ("x86-64-v3{features=AVX}", "'AVX' is not a list of features"),
        ("", "is not a target"),
    ],
)
def test_faulty_overrides(text, message):
    with pytest.raises(DiagnosticError, match=message):
        hw_targets.load(text)


def test_faulty_override_suggests():
    with pytest.raises(DiagnosticError, match=r"did you mean dram\.read\?"):
        hw_targets.load("x86-64-v3{drum.read=1GB/s}")


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("80GiB", "bytes", 80 * 2**30),
        ("1.5 kB", "bytes", 1500),
        (4096, "bytes", 4096),
        ("57GB/s", "bandwidth", 57e9),
        ("2e9", "bandwidth", 2e9),
        ("90ns", "time", 90e-9),
        ("16TOP/s", "rate", 16e12),
        ("3.7GHz", "frequency", 3.7e9),
        ("300mW", "power", 0.3),
    ],
)
def test_quantities(text, kind, value):
    assert parse_quantity(text, kind) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("80GiB", "time"),
        ("80 GiB/s", "bytes"),
        ("ns", "time"),
        ("1e99B", "bytes"),
        ("5kIX", "bytes"),
        ("2g", "bytes"),
        ("5gb/s", "bandwidth"),
    ],
)
def test_faulty_quantities(text, kind):
    with pytest.raises(DiagnosticError):
        parse_quantity(text, kind)


@pytest.mark.parametrize("text", ["2GiB", "2gib", "2 GIB", "2048MiB", "2147483648", "0.000002PiB"])
def test_sizes_in_any_case(text):
    assert parse_quantity(text, "bytes") == pytest.approx(2 << 30, rel=0.1)


@given(st.integers(0, 1 << 60))
def test_enough_bytes_are_enough(value):
    assert value <= parse_quantity(enough_bytes(value), "bytes") <= value * 1.011 + 1


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1024, 1 << 30)] == ["0 B", "1023 B", "1.0 KiB", "1.0 GiB"]

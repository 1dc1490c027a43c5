"""A small sound plan as text, and the step functions whose plans are looked at."""

from __future__ import annotations

from functools import cache

from codegen.build_pipeline import default_pipeline
from codegen.compile_step import LoweredStep, lower_step
from ir import parse, verify
from ir.formats import BF16
from ir.ops.builtin import FuncOp, ModuleOp
from passes.pass_manager import PassManager
from tests.codegen.harness import host_target
from tests.codegen.models import Model, Shape, build_model

ARENA = 256
PLAN = """
func @decode() {
  %n = plan.size {which = "tokens"} : () -> index
  %ids = plan.input {which = "ids"} : () -> buffer<i32>
  %w = plan.weight {symbol = @w, offset = 0, bytes = 64} : () -> buffer<f32>
  %a = plan.reserve {offset = 0, bytes = 64} : () -> buffer<f32>
  plan.launch %ids, %a, %n {kernel = @first, writes = [1], reads = [0]} : (buffer<i32>, buffer<f32>, index) -> ()
  plan.barrier : () -> ()
  %b = plan.reserve {offset = 64, bytes = 64} : () -> buffer<f32>
  %kv = plan.kv {layer = 0, position_bytes = 128} : () -> buffer<f32>
  plan.launch %a, %w, %b, %kv {kernel = @second, writes = [2, 3], reads = [0, 1]}
    : (buffer<f32>, buffer<f32>, buffer<f32>, buffer<f32>) -> ()
  plan.release %a : (buffer<f32>) -> ()
  %c = plan.reserve {offset = 128, bytes = 64} : () -> buffer<f32>
  plan.launch %w, %c {kernel = @third, writes = [1], reads = [0]} : (buffer<f32>, buffer<f32>) -> ()
  plan.barrier : () -> ()
  %out = plan.input {which = "logits"} : () -> buffer<f32>
  plan.launch %b, %c, %kv, %out {kernel = @fourth, writes = [3], reads = [0, 1, 2]}
    : (buffer<f32>, buffer<f32>, buffer<f32>, buffer<f32>) -> ()
  plan.release %b : (buffer<f32>) -> ()
  plan.release %c : (buffer<f32>) -> ()
  plan.barrier : () -> ()
  return
}
"""


def changed(old: str, new: str, count: int = 1) -> str:
    """The plan with `old` replaced the first `count` times."""
    assert old in PLAN
    return PLAN.replace(old, new, count)


def program(text: str) -> FuncOp:
    module = parse(text)
    verify(module)
    return module.function("decode")


SHAPES = {
    "dense": Shape(layers=2),
    "experts": Shape(experts=4, norms="head", element=BF16),
    "stand_ins": Shape(experts=4, norms="head", element=BF16),
    "window": Shape(layers=2, window=5, bias=True, clip=0.5, norms="row", q_heads=2, kv_heads=2),
}


@cache
def model(name: str) -> Model:
    """A model after the passes, in bf16 when its weights are."""
    made = build_model(SHAPES[name])
    dtype = "bf16" if SHAPES[name].element == BF16 else "f32"
    copies = ("w2a8",) if name == "stand_ins" else ()
    PassManager(default_pipeline(host_target(), dtype, stand_ins=copies)).run(made.module)
    return made


@cache
def lowered(name: str) -> LoweredStep:
    """Its plans and kernels. A test that changes them puts them back."""
    return lower_step(model(name).step, host_target().llvm_features)


@cache
def plan_and_tile(name: str) -> tuple[ModuleOp, ModuleOp]:
    """The two levels as modules of their own."""
    step = lowered(name)
    return step.plan_module(), step.tile_module()

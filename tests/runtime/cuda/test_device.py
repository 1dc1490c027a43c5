"""The wrapper of NVIDIA's driver, on an emulated one: refusals, memory, order of work, graphs, what is given back."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from runtime.cuda.device import Arguments, CudaDevice, host_view, open_device
from runtime.cuda.driver import DeviceFault, NoDevice, OutOfDeviceMemory
from runtime.cuda.modules import Image, fits, in_order
from runtime.errors import RuntimeDiagnostic
from tests.runtime.cuda.emulated_driver import EmulatedDriver, Status
from tests.runtime.cuda.emulated_kernels import PythonRunner
from tests.runtime.cuda.emulated_memory import EmulationFault
from tests.runtime.cuda.emulated_streams import Hazard, Ranges

ORDERS = ("eager", "lazy", "shuffled")


def scale(blocks: int, reach: Any, target: int, source: int, count: int, factor: int) -> tuple[Ranges, Ranges]:
    """target[i] = source[i] * factor, bytes."""
    reach(target, count)[:] = reach(source, count) * np.uint8(factor)
    return [(source, source + count)], [(target, target + count)]


PTX = b".version 7.8\n.target sm_80\n.visible .entry scale(\n"


def emulated(**options: Any) -> tuple[EmulatedDriver, CudaDevice]:
    driver = EmulatedDriver(PythonRunner({"scale": (4, scale)}), **options)
    return driver, open_device(driver=driver)


def cubin(architecture: str) -> bytes:
    body = b".entry scale("
    head = b"\x7fELF %s " % architecture.encode()
    return head + str(len(head) + 4 + len(body)).encode().ljust(4) + body + bytes(64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 11040}, "the NVIDIA driver knows CUDA 11.4"),
        ({"devices": 0}, "the NVIDIA driver finds no GPU"),
        ({"capability": 75}, "emulated GPU is sm_75"),
    ],
)
def test_machines_without_a_usable_gpu(options: dict[str, Any], message: str) -> None:
    driver = EmulatedDriver(**options)
    with pytest.raises(NoDevice, match=message):
        open_device(driver=driver)
    assert driver.leaks() == []


def test_a_driver_that_does_not_start() -> None:
    driver = EmulatedDriver()
    driver.plant("cuInit", Status.CUDA_ERROR_NO_DEVICE)
    with pytest.raises(NoDevice, match="no NVIDIA driver that works: cuInit gave CUDA_ERROR_NO_DEVICE"):
        open_device(driver=driver)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(NoDevice, match=r"cuda-bindings is not installed[\s\S]*pip install 'stratum\[cuda\]'"):
        open_device()

    def broken(name: str) -> None:
        raise ImportError("libfoo.so: no such file\nand more")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(NoDevice, match=r"cannot be loaded \(libfoo.so: no such file\)"):
        open_device()


def test_a_library_that_is_missing() -> None:
    class NoLibrary:
        def cuInit(self, flags: int) -> None:  # noqa: N802 - a name of the driver
            raise RuntimeError("libcuda.so not found\nsearched: everywhere")

    with pytest.raises(NoDevice, match=r"works: cuInit: libcuda\.so not found$"):
        open_device(driver=NoLibrary())


@pytest.mark.parametrize("order", ORDERS)
def test_copies_and_launches(order: str) -> None:
    driver, device = emulated(order=order)
    stream, module = device.new_stream(), device.load([Image("sm_80", PTX, True)], "here")
    host, a, b = device.allocate_pinned(100, "host"), device.allocate(100, "a"), device.allocate(100, "b")
    view = host_view(host, 100)
    view[:] = np.arange(100)
    device.copy_in(a, host, 100, stream)
    device.fill(b, 7, 100, stream)
    device.launch(device.function(module, "scale"), 1, 32, 0, Arguments([b, a, 90, 2]), stream)
    device.copy(a, b, 100, stream)
    device.copy_out(host, a, 100, stream)
    device.synchronize(stream)
    assert view.tolist() == [*(2 * i for i in range(90)), *[7] * 10]
    for address in (a, b):
        device.free(address)
    device.free_pinned(host)
    device.free_stream(stream)
    device.free_module(module)
    device.close()
    device.close()
    assert driver.leaks() == [] and device.used_bytes() == 0


@pytest.mark.parametrize("order", ORDERS)
def test_two_streams_need_an_event(order: str) -> None:
    _, device = emulated(order=order, seed=3)
    first, second, event = device.new_stream(), device.new_stream(), device.new_event()
    host, a = device.allocate_pinned(64, "host"), device.allocate(64, "a")
    host_view(host, 64)[:] = 5
    device.copy_in(a, host, 64, first)
    device.record(event, first)
    device.wait(second, event)
    device.fill(a, 9, 32, second)
    device.synchronize(second)
    device.copy_out(host, a, 64, first)  # after what the host has waited for
    device.synchronize(first)
    assert host_view(host, 64).tolist() == [9] * 32 + [5] * 32
    with pytest.raises(Hazard, match="both touch 32 bytes"):
        device.fill(a, 1, 64, first)
        device.fill(a, 9, 32, second)
        device.synchronize(first)
        device.synchronize(second)


def test_memory_that_the_host_changes_too_early() -> None:
    _, device = emulated(order="lazy")
    stream, host, a = device.new_stream(), device.allocate_pinned(8, "host"), device.allocate(8, "a")
    host_view(host, 8)[:] = 1
    device.copy_in(a, host, 8, stream)
    host_view(host, 8)[:] = 2
    with pytest.raises(EmulationFault, match="had still to read"):
        device.synchronize(stream)


def test_bounds_are_checked() -> None:
    _, device = emulated(order="eager")
    stream, a = device.new_stream(), device.allocate(64, "a")
    with pytest.raises(EmulationFault, match=r"bytes 32\.\.96 of 64"):
        device.fill(a + 32, 0, 64, stream)


@pytest.mark.parametrize("order", ORDERS)
def test_a_graph_replays_with_the_addresses_it_was_captured_with(order: str) -> None:
    driver, device = emulated(order=order)
    stream, module = device.new_stream(), device.load([Image("sm_80", PTX, True)], "here")
    host, a = device.allocate_pinned(16, "host"), device.allocate(16, "a")
    view, function = host_view(host, 16), device.function(module, "scale")
    arguments = Arguments([a, a, 16, 3])
    device.begin_capture(stream)
    device.copy_in(a, host, 16, stream)
    device.launch(function, 1, 32, 0, arguments, stream)
    device.copy_out(host, a, 16, stream)
    graph = device.end_capture(stream)
    arguments.values[3] = 100  # the graph has the old number
    for value in (1, 2):
        view[:] = value
        device.launch_graph(graph, stream)
        device.synchronize(stream)
        assert view.tolist() == [3 * value] * 16
    device.free(a)
    with pytest.raises(EmulationFault, match="nothing is at"):
        device.launch_graph(graph, stream)
        device.synchronize(stream)
    device.free_graph(graph)
    device.begin_capture(stream)
    with pytest.raises(DeviceFault, match="STREAM_CAPTURE_UNSUPPORTED"):
        device.synchronize(stream)
    device.abandon_capture(stream)
    device.begin_capture(stream)
    device.abandon_capture(stream)
    device.free_pinned(host)
    device.free_stream(stream)
    device.free_module(module)
    device.close()
    assert driver.leaks() == []


def test_time_between_events() -> None:
    _, device = emulated()
    stream, a = device.new_stream(), device.allocate(10_000_000, "a")
    start, end = device.new_event(timed=True), device.new_event(timed=True)
    device.record(start, stream)
    device.fill(a, 0, 10_000_000, stream)
    device.record(end, stream)
    device.synchronize_event(end)
    assert device.seconds_between(start, end) == pytest.approx(1e-3)


def test_memory_ends_at_the_limit_and_at_the_device() -> None:
    driver, device = emulated(memory_bytes=1 << 20)
    with pytest.raises(OutOfDeviceMemory, match=r"no room for weights: 2097152 bytes[\s\S]*at most 1048576 bytes"):
        device.allocate(2 << 20, "weights")
    small = open_device(limit_bytes=1 << 19, driver=driver)
    kept = small.allocate(1 << 18, "a")
    assert small.free_bytes() == 1 << 18
    with pytest.raises(OutOfDeviceMemory, match=r"beside the 262144 in use[\s\S]*allow more memory"):
        small.allocate((1 << 18) + 1, "b")
    driver.plant("cuMemHostAlloc", Status.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(OutOfDeviceMemory, match="pinned host memory"):
        device.allocate_pinned(1 << 20, "staging")
    small.free(kept)
    small.close()
    device.close()
    assert driver.leaks() == []


@pytest.mark.parametrize("failing", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", ""])
def test_virtual_memory(failing: str) -> None:
    driver, device = emulated(granule=1 << 12)
    at, stream = device.reserve(4 << 12, "the cache"), device.new_stream()
    if failing:
        driver.plant(failing, Status.CUDA_ERROR_OUT_OF_MEMORY)
        with pytest.raises(OutOfDeviceMemory):
            device.map(at, 1 << 12, "the cache")
        assert device.used_bytes() == 0 and not driver.memory.handles
    device.map(at, 1 << 12, "the cache")
    device.map(at + (1 << 12), 1 << 12, "the cache")
    device.fill(at, 1, 2 << 12, stream)
    device.synchronize(stream)
    with pytest.raises(EmulationFault, match="no memory behind"):
        device.fill(at, 1, 3 << 12, stream)
        device.synchronize(stream)
    assert device.used_bytes() == 2 << 12
    device.unmap(at, 1 << 12)
    device.unmap(at + (1 << 12), 1 << 12)
    device.free_reservation(at, 4 << 12)
    device.free_stream(stream)
    device.close()
    assert driver.leaks() == []


@pytest.mark.parametrize(
    ("architecture", "is_ptx", "capability", "yes"),
    [
        ("sm_80", True, (9, 0), True), ("sm_90", True, (8, 9), False), ("sm_90a", True, (9, 0), True),
        ("sm_90a", True, (10, 0), False), ("sm_80", False, (8, 9), True), ("sm_80", False, (9, 0), False),
        ("sm_89", False, (8, 6), False), ("sm_100", True, (10, 0), True), ("sm_100", True, (12, 0), True),
    ],
)  # fmt: skip
def test_which_code_runs_where(architecture: str, is_ptx: bool, capability: tuple[int, int], yes: bool) -> None:
    assert fits(Image(architecture, b"", is_ptx), capability) is yes


def test_the_best_code_comes_first() -> None:
    images = [Image(a, b"", p) for a, p in (("sm_80", True), ("sm_90", True), ("sm_90", False), ("sm_90a", True))]
    assert [(i.architecture, i.is_ptx) for i in in_order(images, (9, 0))] == [
        ("sm_90a", True), ("sm_90", False), ("sm_90", True), ("sm_80", True),
    ]  # fmt: skip
    with pytest.raises(RuntimeDiagnostic, match="'gfx942' is no GPU architecture"):
        fits(Image("gfx942", b"", True), (9, 0))


def test_machine_code_that_the_driver_does_not_take_gives_way_to_ptx() -> None:
    driver, device = emulated(capability=90)
    module = device.load([Image("sm_90", cubin("sm_100"), False), Image("sm_80", PTX, True)], "here")
    device.free_module(module)
    device.free_module(device.load([Image("sm_90", cubin("sm_90"), False)], "here"))
    with pytest.raises(NoDevice, match=r"NO_BINARY_FOR_GPU[\s\S]*build the artifact again"):
        device.load([Image("sm_90", cubin("sm_100"), False)], "here")
    with pytest.raises(NoDevice, match=r"no kernels for this GPU \(sm_90\); the artifact has them for sm_100"):
        device.load([Image("sm_100", b"", True)], "here")
    with pytest.raises(DeviceFault, match="cuModuleGetFunction gave CUDA_ERROR_NOT_FOUND"):
        device.function(device.load([Image("sm_80", PTX, True)], "here"), "other")
    assert driver.calls["cuModuleUnload"] == 2


def test_what_the_assembler_says_is_shown() -> None:
    _, device = emulated(
        jit_log="ptxas application ptx input, line 9; error : Unknown symbol 'x'\n\nptxas fatal : Ended"
    )
    with pytest.raises(RuntimeDiagnostic) as caught:
        device.load([Image("sm_80", PTX, True)], "model.stratum")
    assert caught.value.render() == (
        "model.stratum: error: the driver refused the PTX for sm_80: CUDA_ERROR_INVALID_PTX\n"
        "  ptxas application ptx input, line 9; error : Unknown symbol 'x'\n  ptxas fatal : Ended\n"
        "hint: build the artifact again"
    )


def test_ptx_for_a_newer_driver_and_a_driver_without_assembler() -> None:
    driver, device = emulated(version=12000)
    with pytest.raises(NoDevice, match=r"too old for the PTX \(sm_80\)[\s\S]*update the driver"):
        device.load([Image("sm_80", PTX.replace(b"7.8", b"8.4"), True)], "here")
    driver.plant("cuModuleLoadDataEx", Status.CUDA_ERROR_JIT_COMPILER_NOT_FOUND)
    with pytest.raises(NoDevice, match="assembles no PTX"):
        device.load([Image("sm_80", PTX, True)], "here")


def test_after_a_lost_context_everything_fails() -> None:
    driver, device = emulated()
    stream, module = device.new_stream(), device.load([Image("sm_80", PTX, True)], "here")
    a = device.allocate(16, "a")
    driver.plant("kernel", Status.CUDA_ERROR_LAUNCH_FAILED)
    device.launch(device.function(module, "scale"), 1, 32, 0, Arguments([a, a, 16, 3]), stream)
    assert not device.lost
    with pytest.raises(DeviceFault, match="the GPU failed: cuStreamSynchronize gave CUDA_ERROR_LAUNCH_FAILED"):
        device.synchronize(stream)
    assert device.lost
    with pytest.raises(DeviceFault):
        device.allocate(16, "b")


def test_arguments_are_laid_out_as_kernels_read_them() -> None:
    arguments = Arguments([1 << 40, -3, 1.5])
    assert arguments.values[:2].tolist() == [1 << 40, -3]
    assert arguments.values[2:].view(np.float32)[0] == 1.5
    assert np.diff(arguments.places.astype(np.int64)).tolist() == [8, 8]


def test_asking_for_too_much_shared_memory() -> None:
    _, device = emulated()
    module = device.load([Image("sm_80", PTX, True)], "here")
    with pytest.raises(DeviceFault, match="INVALID_VALUE"):
        device.function(module, "scale", 300 << 10)

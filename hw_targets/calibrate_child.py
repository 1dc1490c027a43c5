"""Runs the calibration's kernels in a process of its own, so that nothing they do can harm the caller's.

Argument: the folder that holds llvmlite. Standard input: one JSON object (ir, cpu, features, kernels with their
operations, threads, bytes, seconds, repeats; fewer: further numbers of threads to read with). Standard output: one JSON
object, kernel name -> rates of every repeat, in bytes/s, operations/s or barriers/s over all threads; `read@1` is the
rate of one thread, `fault` is pages/s of the first touch of memory, without the writing. Threads call the kernels
through ctypes, which drops the interpreter's lock.
"""

import ctypes
import json
import mmap
import os
import sys
import threading
import time

_HUGE_PAGE = 2 << 20
_MEMORY = None  # mapped as long as the process lives
_ENGINES = []  # code lives as long as its engine


def main() -> None:
    sys.path.append(sys.argv[1])
    request = json.load(sys.stdin)
    functions = load(request)
    address = reserve(request["bytes"])
    results = {}
    for name, operations in request["kernels"].items():
        if name == "read":
            results[name] = measure_read(functions[name], address, request)
            for threads in request.get("fewer", ()):
                results[f"{name}@{threads}"] = measure_read(functions[name], address, {**request, "threads": threads})
        elif name == "barrier":
            results[name] = measure_barrier(functions[name], address, request)
        else:
            results[name] = measure_peak(functions[name], address, operations, request)
    faults = measure_faults(min(request["bytes"], 4 << 20))
    if faults:
        results["fault"] = faults
    json.dump(results, sys.stdout)


def load(request):
    """Native functions (address, count) -> number, by kernel of the request; they stay until the process ends."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    functions = {}
    for name in request["kernels"]:
        # The engine takes the machine over, so each has one.
        machine = target.create_target_machine(cpu=request["cpu"], features=request["features"], opt=3, jit=True)
        module = llvm.parse_assembly(request["ir"][name])
        module.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        options.loop_unrolling = False
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        _ENGINES.append(engine)
        prototype = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        functions[name] = prototype(engine.get_function_address(name))
    return functions


def reserve(nbytes):
    """Anonymous memory on huge pages where the system allows; its aligned address. No page is touched yet."""
    global _MEMORY
    # Shared memory, the default, would not get huge pages.
    memory = _MEMORY = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages; the result says what this machine gives
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return -(-start // _HUGE_PAGE) * _HUGE_PAGE


def run_threads(function, arguments):
    """Calls function(*arguments[i]) on one thread each, started together; seconds from the start to the last end.

    Each thread keeps to one CPU: the scheduler would need longer than a run to spread them over a busy machine.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    barrier = threading.Barrier(len(arguments) + 1)
    ends = [0.0] * len(arguments)

    def work(index):
        if len(arguments) <= len(cpus):
            os.sched_setaffinity(0, {cpus[index]})  # of this thread only
        barrier.wait()
        function(*arguments[index])
        ends[index] = time.perf_counter()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(arguments))]
    for thread in threads:
        thread.start()
    start = time.perf_counter()
    barrier.wait()
    for thread in threads:
        thread.join()
    return max(ends) - start


def measure_read(function, address, request):
    """Bytes/s of all threads, each over its own part of the memory."""
    threads = request["threads"]
    share = request["bytes"] // threads // 4096 * 4096
    arguments = [(address + i * share, share) for i in range(threads)]
    # Written by the threads that will read it, so that every part comes to lie near one of them.
    run_threads(ctypes.memset, [(start, 1, size) for start, size in arguments])
    run_threads(function, arguments)
    return [share * threads / run_threads(function, arguments) for _ in range(request["repeats"])]


def measure_peak(function, address, operations, request):
    """Operations/s of all threads; rounds are chosen so that one run lasts about request["seconds"]."""
    threads = request["threads"]
    rounds = 1 << 12
    while True:
        seconds = run_threads(function, [(address, rounds)] * threads)
        if seconds > request["seconds"] / 4 or rounds > 1 << 40:
            break
        rounds *= 2
    rounds = max(1, int(rounds * request["seconds"] / seconds))
    arguments = [(address, rounds)] * threads
    return [operations * rounds * threads / run_threads(function, arguments) for _ in range(request["repeats"])]


def measure_barrier(function, address, request):
    """Barriers/s of all threads."""
    # The number of threads and two words on lines of their own; what lies there was written by measure_read.
    ctypes.memset(address, 0, 192)
    ctypes.c_int64.from_address(address).value = request["threads"]
    rounds = 2000
    arguments = [(address, rounds)] * request["threads"]
    return [rounds / run_threads(function, arguments) for _ in range(request["repeats"])]


def measure_faults(nbytes):
    """[pages of 4096 bytes a second] that the system hands out at the first touch; [] where noise hides it.

    Fresh memory is written twice; only the first time costs faults. Little of it and often: the shortest times are
    those that nothing interrupted.
    """
    first, second = [], []
    for _ in range(60):
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            try:
                memory.madvise(mmap.MADV_NOHUGEPAGE)
            except OSError:
                pass  # a kernel without huge pages has no others
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        times = [time.perf_counter()]
        for value in (1, 2):
            ctypes.memset(address, value, nbytes)
            times.append(time.perf_counter())
        first.append(times[1] - times[0])
        second.append(times[2] - times[1])
        del view
        memory.close()
    seconds = min(first) - min(second)
    return [nbytes / 4096 / seconds] if seconds > 0 else []


if __name__ == "__main__":
    main()

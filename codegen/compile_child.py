"""The process in which LLVM runs. Started by `codegen.compile_worker` as a plain script; imports llvmlite and little
else.

Arguments: the folder that holds llvmlite, and the address-space limit in bytes. Reads requests from standard input
and answers each on standard output until end of file:

    request:  u32 header bytes, u32 IR bytes, header (JSON: triple, cpu, features, opt_level, emit, ...), IR text
    answer:   u32 header bytes, u32 payload bytes, header (JSON: ok, message, stage), payload (the object)

What LLVM itself prints goes to standard error. LLVM may end this process at any time; the parent reports that.
"""

import json
import os
import resource
import signal
import struct
import sys


def main() -> None:
    site, limit = sys.argv[1], int(sys.argv[2])
    sys.path.append(site)
    # Answers keep their own descriptor: anything that C++ code prints to descriptor 1 must not mix with them.
    requests = os.fdopen(0, "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))  # standard error is a file
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    while True:
        lengths = requests.read(8)
        if len(lengths) < 8:
            return
        header_bytes, ir_bytes = struct.unpack("<II", lengths)
        header = json.loads(requests.read(header_bytes))
        ir_text = requests.read(ir_bytes).decode()
        # The parent has its own clock; the alarm ends this process even when the parent is gone.
        signal.alarm(int(header["timeout_seconds"]) + 5)
        answer, payload = run(llvm, header, ir_text)
        signal.alarm(0)
        data = json.dumps(answer).encode()
        answers.write(struct.pack("<II", len(data), len(payload)) + data + payload)
        answers.flush()


def run(llvm, header, ir_text):
    """(answer, payload) for one request."""
    try:
        module = llvm.parse_assembly(ir_text, llvm.create_context())
    except RuntimeError as error:
        return {"ok": False, "stage": "parsing", "message": str(error)}, b""
    try:
        target = llvm.Target.from_triple(header["triple"])
        machine = target.create_target_machine(
            cpu=header["cpu"], features=header["features"], opt=header["opt_level"], reloc="pic", codemodel="small"
        )
    except RuntimeError as error:
        return {"ok": False, "stage": "target", "message": str(error)}, b""
    module.triple = header["triple"]
    module.data_layout = str(machine.target_data)
    try:
        module.verify()
    except RuntimeError as error:
        return {"ok": False, "stage": "verification", "message": str(error)}, b""
    options = llvm.create_pipeline_tuning_options(speed_level=header["opt_level"])
    options.loop_vectorization = header["loop_vectorize"]
    options.slp_vectorization = header["slp_vectorize"]
    options.loop_unrolling = header["unroll"]
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    if header["emit"] == "object":
        return {"ok": True}, machine.emit_object(module)
    text = machine.emit_assembly(module) if header["emit"] == "assembly" else str(module)
    return {"ok": True}, text.encode()


if __name__ == "__main__":
    main()

"""The peers' own Python environment: llama.cpp compiled for this machine, OpenVINO with its converter.

    python = peers_python(work, say=print)      # made at the first call; about ten minutes, most of it llama.cpp

Nothing of it is needed by this project, and its packages ask for other versions than ours: hence an environment apart.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Say = Callable[[str], None]
CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF"
# (packages, pip's options, environment), in this order: the converter must find the torch that is there.
STEPS: tuple[tuple[tuple[str, ...], tuple[str, ...], dict[str, str]], ...] = (
    (("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "gguf==0.19.0", "torch==2.13.0"), (), {}),
    (("nncf==3.4.0", "optimum-intel==2.2.0"), (), {}),
    (("llama-cpp-python==0.3.36",), ("--no-binary", "llama-cpp-python"), {"CMAKE_ARGS": CMAKE_ARGS}),
)
UNWANTED = "torchvision"  # drawn in by the converter, for another build of torch: importing it fails


def peers_python(work: Path, say: Say) -> Path:
    """The interpreter of WORK/venv, which is made when it is missing. Raises SystemExit when it cannot be."""
    python = work / "venv" / "bin" / "python"
    if _works(python):
        return python
    say(f"installing the peers into {work / 'venv'}: llama.cpp is compiled, this takes about ten minutes")
    _run([sys.executable, "-m", "venv", str(work / "venv")], {})
    for packages, options, environment in STEPS:
        say("installing " + ", ".join(packages))
        _run([str(python), "-m", "pip", "install", "-q", *options, *packages], environment)
    _run([str(python), "-m", "pip", "uninstall", "-q", "-y", UNWANTED], {})
    if not _works(python):
        raise SystemExit(f"the peers in {work / 'venv'} cannot be imported; remove the directory and try again")
    return python


def _works(python: Path) -> bool:
    if not python.exists():
        return False
    code = "import llama_cpp, openvino, openvino_genai, optimum.intel, gguf"
    return subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")

"""Builds for tests that are not about machine code: LLVM leaves the code as it was written, a tenth of the time.

with plain_code():
    stratum.build(...)

What LLVM's optimizer makes of the kernels is compared with their meaning in tests/codegen and tests/test_goldens.py.
Builds in processes of their own stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import codegen.build
from codegen.compile_step import compile_lowered
from tests.codegen.harness import opt_level


@contextmanager
def plain_code() -> Iterator[None]:
    """Builds of this process are not optimized (in `make fuzz` they are)."""
    with patch.object(codegen.build, "compile_lowered", partial(compile_lowered, opt_level=opt_level(False))):
        yield

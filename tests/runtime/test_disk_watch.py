"""A disk that is slower than planned is told of once, and only when it is for a while."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.disk_watch import LEAST_BYTES, LEAST_S, SLOW, DiskWatch


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.floats(0.0, 4.0)), max_size=30), st.integers(0, 1 << 31))
def test_it_speaks_once_and_only_of_slow_disks(steps: list[tuple[int, float]], planned: int) -> None:
    watch, said = DiskWatch(planned), 0
    nbytes, busy_s, fastest = 0, 0.0, True
    for read, took_s in steps:
        nbytes, busy_s = nbytes + read, busy_s + took_s
        fastest = fastest and read >= SLOW * planned * took_s * 1.001 + 1
        message = watch.observe(nbytes, busy_s)
        if message is not None:
            said += 1
            assert f"{planned / 1e9:.2f}" in message and watch.slow
    assert said <= 1 and (not said or (planned and not fastest))


def test_a_slow_disk_is_noticed_after_a_fast_start() -> None:
    watch = DiskWatch(1 << 30)
    assert watch.observe(LEAST_BYTES * 4, LEAST_S) is None
    assert watch.observe(LEAST_BYTES * 4 + LEAST_BYTES - 1, 10 * LEAST_S) is None  # too little to tell
    message = watch.observe(LEAST_BYTES * 5, 11 * LEAST_S)
    assert message is not None and message.startswith("the disk gives 0.01 GB/s, the plan counts on 1.07")
    assert watch.observe(LEAST_BYTES * 6, 60 * LEAST_S) is None

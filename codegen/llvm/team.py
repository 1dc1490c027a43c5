"""The thread team as LLVM IR text: barrier, worker loop, run, shutdown. Emitted into every artifact.

A team is 4096 zeroed bytes, 64-byte aligned, with the number of threads at offset 0. All threads run the whole step
function; the caller of `stratum_run` is thread 0, workers sit in `stratum_worker`. Waiting is spinning first, then
sleeping in the kernel (futex). A barrier that does not complete within `BARRIER_SECONDS` marks the team as failed:
every later wait returns at once and `stratum_run` returns 1 instead of 0. While thread 0 is out of native code, reading
weights, no wait expires.

Words of a team, each on a cache line of its own:
    0 threads (i64) | 64 arrived (i32) | 128 barrier generation (i32) | 192 sleepers at the barrier (i32)
    256 job generation (i32) | 320 idle sleepers (i32) | 384 step function, 392 its arguments | 448 shutdown (i32)
    512 failed (i32) | 576 tickets taken since the last barrier (i64) | 640 thread 0 is reading (i32)
"""

from __future__ import annotations

BARRIER_SECONDS = 60
SPINS = 20000  # about 0.2 ms: longer than the pause between two decode steps
TICKETS_AT = 576
FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98}

_TEXT = """
@stratum_timeout = private constant [2 x i64] [i64 1, i64 0]

declare i64 @syscall(i64, ...)

define internal void @stratum_pause() alwaysinline {{
  {pause}
  ret void
}}

; Sleeps until the word differs from `seen`, is woken, or a second has passed.
define internal void @stratum_sleep(ptr %word, i32 %seen, ptr %sleepers) {{
  %1 = atomicrmw add ptr %sleepers, i32 1 seq_cst
  %now = load atomic i32, ptr %word seq_cst, align 4
  %same = icmp eq i32 %now, %seen
  br i1 %same, label %wait, label %done
wait:
  %2 = call i64 (i64, ...) @syscall(i64 {futex}, ptr %word, i32 128, i32 %seen, ptr @stratum_timeout, ptr null, i32 0)
  br label %done
done:
  %3 = atomicrmw sub ptr %sleepers, i32 1 seq_cst
  ret void
}}

define internal void @stratum_wake(ptr %word, ptr %sleepers) {{
  %count = load atomic i32, ptr %sleepers seq_cst, align 4
  %any = icmp ne i32 %count, 0
  br i1 %any, label %wake, label %done
wake:
  %1 = call i64 (i64, ...) @syscall(i64 {futex}, ptr %word, i32 129, i32 2147483647, ptr null, ptr null, i32 0)
  br label %done
done:
  ret void
}}

define internal void @stratum_barrier(ptr %team, i64 %threads) noinline {{
entry:
  %tickets = getelementptr i8, ptr %team, i64 576
  %alone = icmp eq i64 %threads, 1
  br i1 %alone, label %single, label %arrive
single:
  store atomic i64 0, ptr %tickets monotonic, align 8
  br label %done
arrive:
  %arrived = getelementptr i8, ptr %team, i64 64
  %generation = getelementptr i8, ptr %team, i64 128
  %sleepers = getelementptr i8, ptr %team, i64 192
  %failed = getelementptr i8, ptr %team, i64 512
  %reading = getelementptr i8, ptr %team, i64 640
  %seen = load atomic i32, ptr %generation acquire, align 4
  %before = atomicrmw add ptr %arrived, i32 1 acq_rel
  %before64 = zext i32 %before to i64
  %after = add i64 %before64, 1
  %last = icmp eq i64 %after, %threads
  br i1 %last, label %release, label %spin
release:
  store atomic i32 0, ptr %arrived monotonic, align 4
  store atomic i64 0, ptr %tickets monotonic, align 8
  %following = add i32 %seen, 1
  store atomic i32 %following, ptr %generation seq_cst, align 4
  call void @stratum_wake(ptr %generation, ptr %sleepers)
  br label %done
spin:
  %count = phi i32 [ 0, %arrive ], [ %kept, %again ]
  %now = load atomic i32, ptr %generation acquire, align 4
  %changed = icmp ne i32 %now, %seen
  br i1 %changed, label %done, label %pause
pause:
  call void @stratum_pause()
  %next = add i32 %count, 1
  %tired = icmp ugt i32 %next, {spins}
  br i1 %tired, label %sleep, label %again
sleep:
  %broken = load atomic i32, ptr %failed acquire, align 4
  %give_up = icmp ne i32 %broken, 0
  br i1 %give_up, label %done, label %doze
doze:
  call void @stratum_sleep(ptr %generation, i32 %seen, ptr %sleepers)
  %reads = load atomic i32, ptr %reading acquire, align 4
  %excused = icmp ne i32 %reads, 0
  %counted = select i1 %excused, i32 {spins}, i32 %next
  %slept = sub i32 %counted, {spins}
  %expired = icmp ugt i32 %slept, {limit}
  br i1 %expired, label %fail, label %again
fail:
  store atomic i32 1, ptr %failed release, align 4
  br label %done
again:
  %kept = phi i32 [ %next, %pause ], [ %counted, %doze ]
  br label %spin
done:
  ret void
}}

define void @stratum_worker(ptr %team, i64 %tid) {{
entry:
  %job = getelementptr i8, ptr %team, i64 256
  %sleepers = getelementptr i8, ptr %team, i64 320
  %function_at = getelementptr i8, ptr %team, i64 384
  %arguments_at = getelementptr i8, ptr %team, i64 392
  %shutdown_at = getelementptr i8, ptr %team, i64 448
  br label %idle
idle:
  %seen = phi i32 [ 0, %entry ], [ %now, %work ]
  br label %spin
spin:
  %count = phi i32 [ 0, %idle ], [ %next, %rest ], [ {spins}, %doze ]
  %now = load atomic i32, ptr %job acquire, align 4
  %changed = icmp ne i32 %now, %seen
  br i1 %changed, label %check, label %rest
rest:
  call void @stratum_pause()
  %next = add i32 %count, 1
  %tired = icmp ugt i32 %next, {spins}
  br i1 %tired, label %doze, label %spin
doze:
  call void @stratum_sleep(ptr %job, i32 %seen, ptr %sleepers)
  br label %spin
check:
  %stop = load atomic i32, ptr %shutdown_at acquire, align 4
  %stopping = icmp ne i32 %stop, 0
  br i1 %stopping, label %done, label %work
work:
  %function = load ptr, ptr %function_at, align 8
  %arguments = load ptr, ptr %arguments_at, align 8
  %1 = call i64 %function(ptr %arguments, i64 %tid)
  br label %idle
done:
  ret void
}}

define i64 @stratum_run(ptr %team, ptr %function, ptr %arguments) {{
  %job = getelementptr i8, ptr %team, i64 256
  %sleepers = getelementptr i8, ptr %team, i64 320
  %function_at = getelementptr i8, ptr %team, i64 384
  %arguments_at = getelementptr i8, ptr %team, i64 392
  %failed_at = getelementptr i8, ptr %team, i64 512
  store ptr %function, ptr %function_at, align 8
  store ptr %arguments, ptr %arguments_at, align 8
  %1 = atomicrmw add ptr %job, i32 1 seq_cst
  call void @stratum_wake(ptr %job, ptr %sleepers)
  %2 = call i64 %function(ptr %arguments, i64 0)
  %failed = load atomic i32, ptr %failed_at acquire, align 4
  %failed64 = zext i32 %failed to i64
  %result = or i64 %failed64, %2
  ret i64 %result
}}

define void @stratum_shutdown(ptr %team) {{
  %job = getelementptr i8, ptr %team, i64 256
  %sleepers = getelementptr i8, ptr %team, i64 320
  %shutdown_at = getelementptr i8, ptr %team, i64 448
  store atomic i32 1, ptr %shutdown_at release, align 4
  %1 = atomicrmw add ptr %job, i32 1 seq_cst
  call void @stratum_wake(ptr %job, ptr %sleepers)
  ret void
}}
"""


def team_text(triple: str) -> str:
    """The team functions for a target triple; `declare` and `define` lines only."""
    machine = triple.split("-")[0]
    if machine == "x86_64":
        pause = "call void @llvm.x86.sse2.pause()"
        extra = "declare void @llvm.x86.sse2.pause()\n"
    else:
        pause = "call void @llvm.aarch64.hint(i32 1)"  # YIELD
        extra = "declare void @llvm.aarch64.hint(i32)\n"
    futex = FUTEX_NUMBERS.get(machine)
    if futex is None:
        raise ValueError(f"no futex number for {machine}; have {', '.join(FUTEX_NUMBERS)}")
    return extra + _TEXT.format(pause=pause, futex=futex, spins=SPINS, limit=BARRIER_SECONDS)

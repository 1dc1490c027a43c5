"""The artifact writer: whole or absent, whatever happens; deterministic; careful with what it replaces."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from codegen import artifact, file_system
from codegen.artifact import ArtifactWriter, manifest_digest, remove_stale
from ir.diagnostics import DiagnosticError
from runtime.manifest_reader import manifest_digest as manifest_digest_of_loader

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = {"stratum_version": "0.1.0", "model": {"name": "tiny"}, "weights": {"bytes": 3}}


def build(out: Path, content: bytes = b"abc", **options) -> Path:
    with ArtifactWriter(out, **options) as writer:
        with writer.open("weights/weights.bin") as file:
            file.write(content)
        writer.add("graph.ir", "func\n")
        return writer.finish(dict(MANIFEST))


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_files_hashes_and_manifest(tmp_path):
    out = build(tmp_path / "deep" / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["format_version"] == 2 and manifest["model"] == {"name": "tiny"}
    assert sorted(manifest["files"]) == ["graph.ir", "weights/weights.bin"]
    for path, entry in manifest["files"].items():
        data = (out / path).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["manifest_sha256"] == manifest_digest(manifest) == manifest_digest_of_loader(manifest)
    assert leftovers(out.parent) == []


def test_hash_of_large_and_small_writes(tmp_path):
    pieces = [os.urandom(size) for size in (1, 70_000, 0, 300_000, 5)]
    with ArtifactWriter(tmp_path / "out") as writer:
        with writer.open("w") as file:
            for piece in pieces:
                buffer = bytearray(piece)
                file.write(buffer)
                buffer[:] = bytes(len(buffer))  # the writer may not look at it any more
        record = writer.files["w"]
        assert (writer.directory / "w").read_bytes() == b"".join(pieces)
    whole = b"".join(pieces)
    assert record.nbytes == len(whole)
    assert record.sha256 == hashlib.sha256(whole).hexdigest()


def test_the_system_gets_whole_huge_pages(tmp_path, monkeypatch):
    """Or the page cache holds small pages, and weights are read more slowly."""
    page, written, write = 2 << 20, [], os.write

    def record(descriptor, data):
        written.append(len(data))
        return write(descriptor, data)

    whole = os.urandom(3 * page + 1000)
    with ArtifactWriter(tmp_path / "out") as writer:
        monkeypatch.setattr(artifact.os, "write", record)
        with writer.open("w") as file:
            at = 0
            for size in (100_000, page, 17, len(whole)):
                at += file.write(whole[at : at + size])
        assert (writer.directory / "w").read_bytes() == whole
        assert writer.files["w"].nbytes == len(whole)
    assert written == [page, page, page, 1000]


def test_same_content_same_bytes(tmp_path):
    assert tree(build(tmp_path / "a")) == tree(build(tmp_path / "b"))


def test_copy_of_a_file(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"{}" * 100)
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.copy("tokenizer.json", tmp_path / "tokenizer.json")
        out = writer.finish(dict(MANIFEST))
    assert (out / "tokenizer.json").read_bytes() == b"{}" * 100


def test_copy_of_a_missing_file(tmp_path):
    message = r"nothing\.json: error: cannot copy into the artifact: No such file"
    with pytest.raises(DiagnosticError, match=message), ArtifactWriter(tmp_path / "out") as writer:
        writer.copy("tokenizer.json", tmp_path / "nothing.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_error_in_the_build_leaves_nothing(tmp_path, error):
    out = tmp_path / "out"
    with pytest.raises(error), ArtifactWriter(out) as writer, writer.open("weights/weights.bin") as file:
        file.write(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_build_without_finish_leaves_nothing(tmp_path):
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.add("graph.ir", "x")
    assert list(tmp_path.iterdir()) == []


def test_failed_rebuild_keeps_the_old_artifact(tmp_path):
    out = build(tmp_path / "out")
    before = tree(out)
    with pytest.raises(RuntimeError), ArtifactWriter(out) as writer:
        writer.add("graph.ir", "new")
        raise RuntimeError
    assert tree(out) == before and leftovers(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_rebuild_replaces_the_old_artifact(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(artifact, "exchange_directories", lambda a, b: False)
    out = build(tmp_path / "out", b"old")
    assert build(out, b"new") == out
    assert (out / "weights/weights.bin").read_bytes() == b"new"
    assert leftovers(tmp_path) == []


def test_exchange_swaps_two_directories(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    if not file_system.exchange_directories(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange")
    assert (tmp_path / "a" / "who").read_text() == "b"
    assert (tmp_path / "b" / "who").read_text() == "a"


def test_empty_directory_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    assert (build(tmp_path / "out") / "manifest.json").is_file()


def test_link_to_a_directory_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "artifact")
    assert build(tmp_path / "out") == tmp_path / "disk" / "artifact"
    assert (tmp_path / "out").is_symlink() and (tmp_path / "out" / "manifest.json").is_file()


def foreign_directory(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")


def other_manifest(out: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "a web extension"}')


def broken_manifest(out: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text("[" * 100_000)


@pytest.mark.parametrize("make", [foreign_directory, other_manifest, broken_manifest, lambda out: out.write_text("x")])
def test_anything_else_is_not_replaced(tmp_path, make):
    out = tmp_path / "out"
    make(out)
    with pytest.raises(DiagnosticError, match="refusing to replace a"):
        build(out)
    assert out.exists() and leftovers(tmp_path) == []


def test_artifact_with_the_users_own_file_is_not_replaced(tmp_path):
    out = build(tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DiagnosticError, match=r"holds other files too: notes\.txt"):
        build(out)
    assert (out / "notes.txt").read_text() == "mine"


def test_file_that_appears_during_the_build_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DiagnosticError, match="refusing to replace"), ArtifactWriter(out) as writer:
        foreign_directory(out)
        writer.finish(dict(MANIFEST))
    assert (out / "thesis.txt").exists() and leftovers(tmp_path) == []


def test_room_is_asked_for_before_the_first_byte(tmp_path):
    with pytest.raises(
        DiagnosticError, match=r"not enough room on the disk: the artifact needs [\d,.]+ MiB, [\d,.]+ are"
    ):
        build(tmp_path / "out", expected_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_meanwhile(tmp_path, monkeypatch, code):
    real_write, calls = os.write, []

    def failing_write(descriptor, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(code, os.strerror(code))
        return real_write(descriptor, data[:10])  # a short write first

    monkeypatch.setattr(artifact.os, "write", failing_write)
    with pytest.raises(DiagnosticError, match=r"not enough room on the disk \(.*\): the artifact needs"):
        build(tmp_path / "out", bytes(1 << 20))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit_is_a_diagnostic(tmp_path):
    """The kernel's own refusal, in a process of its own."""
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from codegen.artifact import ArtifactWriter
from ir.diagnostics import DiagnosticError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with ArtifactWriter({str(tmp_path / "out")!r}) as writer, writer.open("w") as file:
        for _ in range(10):
            file.write(bytes(65_536))
except DiagnosticError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "not enough room on the disk (File too large)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiagnosticError, match=r"cannot write the artifact: (Not a directory|File exists)"):
        build(tmp_path / "file" / "out")


KILLED_BUILD = """
import sys, time
sys.path.insert(0, {root!r})
from codegen.artifact import ArtifactWriter
with ArtifactWriter({out!r}) as writer:
    with writer.open("weights/weights.bin") as file:
        file.write(bytes(1 << 20))
        print("writing", flush=True)
        if {where!r} == "file":
            time.sleep(60)
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("where", ["file", "between"])
def test_killed_build_leaves_nothing_that_loads_and_is_cleaned_up(tmp_path, where):
    out = tmp_path / "out"
    script = KILLED_BUILD.format(root=str(ROOT), out=str(out), where=where)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for _ in range(1 if where == "file" else 2):
        process.stdout.readline()
    assert len(leftovers(tmp_path)) == 1
    assert remove_stale(out) == []  # the build is alive
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    assert len(leftovers(tmp_path)) == 1
    assert not (tmp_path / leftovers(tmp_path)[0] / "manifest.json").exists()
    build(out)
    assert leftovers(tmp_path) == []


def test_build_killed_at_any_moment(tmp_path):
    """SIGKILL at several moments of builds that replace an artifact: what is there is always a whole artifact."""
    out = build(tmp_path / "out", b"first")
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from codegen.artifact import ArtifactWriter
print("ready", flush=True)
for i in range(100000):
    with ArtifactWriter({str(out)!r}) as writer:
        with writer.open("weights/weights.bin") as file:
            file.write(b"%d" % i)
        writer.finish({{"stratum_version": "0.1.0"}})
"""
    for delay in (0.0, 0.013, 0.029, 0.05, 0.071):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["manifest_sha256"] == manifest_digest(manifest)
        for path, entry in manifest["files"].items():
            assert hashlib.sha256((out / path).read_bytes()).hexdigest() == entry["sha256"]
    build(out)
    assert leftovers(tmp_path) == []


def test_interrupt_while_writing(tmp_path):
    """Ctrl-C in the middle of a large write."""
    out = tmp_path / "out"
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(out) as writer, writer.open("w") as file:
        timer.start()
        for _ in range(200):
            file.write(bytes(1 << 16))
            time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/./b", "", "a\\b"])
def test_paths_stay_inside(tmp_path, path):
    with pytest.raises(ValueError, match="not a plain relative path"), ArtifactWriter(tmp_path / "out") as writer:
        writer.add(path, "x")


@pytest.mark.parametrize("path", ["a", "manifest.json"])
def test_files_are_written_once(tmp_path, path):
    with pytest.raises(ValueError, match="is written twice"), ArtifactWriter(tmp_path / "out") as writer:
        writer.add("a", "x")
        writer.add(path, "y")


def test_free_space_counts_what_this_user_may_use(tmp_path, monkeypatch):
    status = namedtuple("Status", "f_bavail f_frsize")
    monkeypatch.setattr(artifact.os, "statvfs", lambda path: status(3 * 256, 4096))  # 3 MiB
    build(tmp_path / "a", expected_bytes=2 << 20)
    with pytest.raises(DiagnosticError, match=r"needs 4\.0 MiB, 3\.0 are free"):
        build(tmp_path / "b", expected_bytes=3 << 20)

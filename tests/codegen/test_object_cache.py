"""The object cache: entries are verified, replaced, bounded, and never half-written."""

import os
import time

import pytest

from codegen.object_cache import ObjectCache, content_key


def age(cache: ObjectCache, key: str, seconds: float) -> None:
    when = time.time() - seconds
    os.utime(cache.path_of(key), (when, when))


def test_put_get(tmp_path):
    cache = ObjectCache(tmp_path)
    key = content_key([b"a", "b"])
    assert cache.get(key) is None
    assert cache.put(key, b"payload")
    assert cache.get(key) == b"payload"


def test_key_frames_its_parts():
    assert content_key([b"ab", b"c"]) != content_key([b"a", b"bc"])
    assert content_key(["ab"]) == content_key([b"ab"])


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "append"])
def test_damaged_entry_is_ignored_and_replaced(tmp_path, damage):
    cache = ObjectCache(tmp_path)
    key = content_key([b"x"])
    cache.put(key, b"payload" * 100)
    path = cache.path_of(key)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    elif damage == "truncate":
        data = data[:-1]
    elif damage == "empty":
        data = bytearray()
    else:
        data += b"!"
    path.write_bytes(data)
    assert cache.get(key) is None
    assert not path.exists()
    cache.put(key, b"new")
    assert cache.get(key) == b"new"


def test_entry_under_another_name_is_ignored(tmp_path):
    cache = ObjectCache(tmp_path)
    first, second = content_key([b"1"]), content_key([b"2"])
    cache.put(first, b"payload")
    cache.path_of(second).parent.mkdir(exist_ok=True)
    os.replace(cache.path_of(first), cache.path_of(second))
    assert cache.get(second) is None


def test_least_recently_used_goes_first(tmp_path):
    cache = ObjectCache(tmp_path, max_bytes=3500)
    keys = [content_key([str(i)]) for i in range(3)]
    for index, key in enumerate(keys):
        cache.put(key, bytes(1000))
        age(cache, key, 100 - index)
    assert cache.get(keys[0]) is not None  # now the most recently used
    cache.put(content_key([b"new"]), bytes(1000))
    assert cache.get(keys[1]) is None
    assert cache.get(keys[0]) is not None and cache.get(keys[2]) is not None


def test_new_entry_larger_than_the_limit_stays_until_the_next(tmp_path):
    cache = ObjectCache(tmp_path, max_bytes=100)
    first, second = content_key([b"1"]), content_key([b"2"])
    cache.put(first, bytes(1000))
    assert cache.get(first) is not None
    age(cache, first, 10)
    cache.put(second, bytes(1000))
    assert cache.get(first) is None and cache.get(second) is not None


def test_old_temporaries_go_and_new_ones_stay(tmp_path):
    cache = ObjectCache(tmp_path)
    key = content_key([b"x"])
    cache.put(key, b"p")
    old, new = cache.path_of(key).with_name(".a.tmp"), cache.path_of(key).with_name(".b.tmp")
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (1, 1))
    cache.prune()
    assert not old.exists() and new.exists() and cache.get(key) == b"p"


def test_unwritable_directory_only_costs_time(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_bytes(b"")
    cache = ObjectCache(blocker / "objects")
    key = content_key([b"x"])
    assert cache.put(key, b"p") is False
    assert cache.get(key) is None
    assert cache.prune() == 0


def test_default_directory_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("STRATUM_CACHE", str(tmp_path / "c"))
    assert ObjectCache().directory == tmp_path / "c" / "objects"
    monkeypatch.delenv("STRATUM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert ObjectCache().directory == tmp_path / "x" / "stratum" / "objects"

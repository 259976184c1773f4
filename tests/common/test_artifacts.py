"""The artifact store: whole or not at all, and never outside its root."""

import hashlib

import pytest
from alto_common.artifacts import CHUNK_BYTES, ArtifactStore


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    return ArtifactStore(str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}")


def test_a_written_file_is_read_back_with_its_digest(store):
    content = bytes(range(256)) * (CHUNK_BYTES // 100)
    stored = store.write("tenants/a/file.bin", [content[:1000], content[1000:]])
    assert stored.size_bytes == len(content)
    assert stored.sha256 == hashlib.sha256(content).hexdigest()
    assert b"".join(store.read("tenants/a/file.bin")) == content
    assert b"".join(store.read("tenants/a/file.bin", offset=777)) == content[777:]


def test_a_write_that_fails_leaves_nothing_under_the_name(tmp_path):
    store = ArtifactStore(str(tmp_path))

    def broken():
        yield b"half"
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        store.write("a/file.bin", broken())
    assert not store.exists("a/file.bin")


def test_a_failed_overwrite_keeps_the_old_content(tmp_path):
    store = ArtifactStore(str(tmp_path))
    store.write("a/file.bin", [b"old"])

    def broken():
        yield b"new"
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        store.write("a/file.bin", broken())
    assert b"".join(store.read("a/file.bin")) == b"old"


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a/../../up", "", "a/\0b"])
def test_a_path_cannot_leave_the_root(store, path):
    with pytest.raises(ValueError, match="not a path inside"):
        store.write(path, [b"x"])


def test_deleting_what_is_not_there_is_no_error(store):
    store.write("a/b", [b"x"])
    store.delete("a")
    assert not store.exists("a/b")
    store.delete("a")

from __future__ import annotations

import hashlib
import os
import sys
import threading
from pathlib import Path

import pytest

from dpo_ray.artifacts import object_store
from dpo_ray.artifacts.storage import Storage
from dpo_ray.errors import ArtifactError, ConfigError, InfrastructureError
from tests.unit.artifacts.conftest import BUCKET, S3Server, sent


def test_files_come_back_as_they_were_written(storage: Storage, tmp_path: Path) -> None:
    entry = storage.write("a/b.bin", b"first", rows=1)
    entry = storage.write("a/b.bin", b"second", rows=2)
    assert (entry.bytes, entry.rows, entry.sha256) == (6, 2, hashlib.sha256(b"second").hexdigest())
    assert storage.read_bytes("a/b.bin") == b"second"
    assert storage.size("a/b.bin") == 6
    assert storage.exists("a/b.bin")
    assert not storage.exists("a/c.bin")
    storage.write("a/d/e", b"")
    storage.write("f", b"1")
    assert storage.list_files() == ["a/b.bin", "a/d/e", "f"]
    assert storage.list_files("a") == ["a/b.bin", "a/d/e"]
    assert storage.child("a").list_files() == ["b.bin", "d/e"]
    assert storage.list_dirs() == ["a"]
    assert storage.list_dirs("a") == ["d"]
    storage.download("a/b.bin", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == b"second"
    storage.delete("f")
    storage.delete("f")
    storage.delete_tree("a")
    storage.delete_tree("a")
    assert storage.list_files() == []


def test_absent_places_are_empty_and_absent_files_are_missing(storage: Storage, tmp_path: Path) -> None:
    assert storage.list_files() == []
    assert storage.list_dirs("nowhere") == []
    assert not storage.exists("f")
    for act in (storage.read_bytes, storage.size, storage.open_input):
        with pytest.raises(FileNotFoundError):
            act("f")
    with pytest.raises(FileNotFoundError):
        storage.download("f", tmp_path / "f")
    assert not list(tmp_path.glob("*f*"))


def test_an_uploaded_file_is_hashed_on_its_way(storage: Storage, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "source").write_bytes(data)
    entry = storage.upload("x/big", tmp_path / "source", rows=5)
    assert (entry.bytes, entry.sha256, entry.rows) == (len(data), hashlib.sha256(data).hexdigest(), 5)
    with storage.open_input("x/big") as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]


def test_a_large_object_goes_in_parts_and_a_broken_upload_leaves_nothing(
    s3: Storage, tmp_path: Path, monkeypatch
) -> None:
    source = tmp_path / "source"
    with open(source, "wb") as file:
        file.truncate(110 * 2**20)  # two parts of 50 MB and a rest
    entry = s3.upload("big", source)
    assert s3.size("big") == entry.bytes == 110 * 2**20

    def breaks(read, write):
        write.write(bytes(60 * 2**20))
        raise OSError(5, "the source fails")

    monkeypatch.setattr(object_store, "copy_and_hash", breaks)
    with pytest.raises(InfrastructureError, match="the source fails"):
        s3.upload("broken", source)
    assert s3.list_files() == ["big"]


def test_of_many_concurrent_creations_exactly_one_wins(storage: Storage) -> None:
    for round_number in range(5):
        start, outcomes = threading.Barrier(6), []

        def create(me: int, name: str = f"lease-{round_number}", start=start, outcomes=outcomes) -> None:
            start.wait()
            try:
                storage.create(name, b"%d" % me)
                outcomes.append(me)
            except FileExistsError:
                outcomes.append(None)

        threads = [threading.Thread(target=create, args=(me,)) for me in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [me for me in outcomes if me is not None]
        assert len(outcomes) == 6
        assert len(winners) == 1
        assert storage.read_bytes(f"lease-{round_number}") == b"%d" % winners[0]


def test_a_creation_on_s3_sends_the_condition(s3: Storage, s3_server: S3Server) -> None:
    s3.create("lease", b"1")
    s3.write("plain", b"1")
    prefix = s3.uri.removeprefix("s3://")
    assert [path for path in s3_server.conditional_puts if prefix in path] == [f"/{prefix}/lease"]


def test_a_server_that_ignores_the_condition_is_found_out(s3: Storage, s3_server: S3Server, monkeypatch) -> None:
    import s3fs

    keep = s3fs.S3FileSystem._filter_kwargs

    def old_client(self, method, kwargs):
        return keep(self, method, {name: value for name, value in kwargs.items() if name != "IfNoneMatch"})

    s3.check_writable()
    monkeypatch.setattr(s3fs.S3FileSystem, "_filter_kwargs", old_client)
    with pytest.raises(InfrastructureError, match="If-None-Match"):
        s3.check_writable()
    assert s3.list_files() == []


def test_other_spellings_of_a_refused_condition_are_understood(s3: Storage, monkeypatch) -> None:
    calls = []

    def refuse(code: str, after: int):
        def call(method, path, *arguments, **options):
            calls.append(code)
            if len(calls) > after:
                return None
            error = OSError(22, "refused")
            error.__cause__ = type("ClientError", (Exception,), {"response": {"Error": {"Code": code}}})()
            raise error

        return call

    monkeypatch.setattr(object_store, "CONFLICT_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(s3._place, "_call", refuse("PreconditionFailed", 99))
    with pytest.raises(FileExistsError):
        s3.create("f", b"")
    calls.clear()
    monkeypatch.setattr(s3._place, "_call", refuse("ConditionalRequestConflict", 2))
    s3.create("f", b"")
    assert len(calls) == 3
    calls.clear()
    monkeypatch.setattr(s3._place, "_call", refuse("AccessDenied", 99))
    with pytest.raises(InfrastructureError):
        s3.create("f", b"")


def test_a_missing_bucket_and_missing_credentials_say_what_to_do(s3_server: S3Server, monkeypatch) -> None:
    absent = Storage("s3://no-such-bucket-here/x")
    for act in (absent.check_writable, lambda: absent.write("f", b"")):
        with pytest.raises(InfrastructureError) as caught:
            act()
        assert "create the bucket" in caught.value.fix
    assert absent.list_files() == []
    assert not absent.exists("f")


@pytest.mark.parametrize(("scheme", "extra", "module"), [("s3", "s3", "s3fs"), ("gs", "gs", "gcsfs")])
def test_a_missing_client_names_the_extra(scheme: str, extra: str, module: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(InfrastructureError) as caught:
        Storage(f"{scheme}://bucket/x").exists("f")
    assert caught.value.fix == f"pip install 'dpo-ray[{extra}]'"


def test_check_writable_says_who_may_not_write(tmp_path: Path, monkeypatch) -> None:
    storage = Storage(tmp_path / "root")
    storage.check_writable()
    assert storage.list_files() == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match="cannot create"):
        Storage(tmp_path / "file" / "below").check_writable()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ArtifactError, match="Permission denied") as caught:
        storage.check_writable()
    assert "permission" in caught.value.fix

    def no_links(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(ArtifactError, match="no hard links"):
        storage.check_writable()
    assert os.listdir(tmp_path / "root") == []


ESCAPES = [
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "/etc/passwd",
    "",
    "a//b",
    "a/",
    ".",
    "./a",
    "a\\..\\b",
    "..\\x",
    "a\x00b",
    "a\nb",
    "x*",
    "a?versionId=1",
    "[ab]",
    "a#1",
    ".tmp-1",
    "a/" + "x" * 256,
]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_lead_elsewhere_are_refused(disk: Storage, name: str) -> None:
    acts = [
        disk.child,
        disk.read_bytes,
        disk.size,
        disk.open_input,
        disk.delete,
        lambda n: disk.write(n, b""),
    ]
    acts += [lambda n: disk.create(n, b""), lambda n: disk.download(n, Path("/nonexistent/x"))]
    if name:  # an empty name means the storage itself here
        acts += [
            disk.local_path,
            disk.full_path,
            disk.exists,
            disk.list_files,
            disk.list_dirs,
            disk.delete_tree,
        ]
    for act in acts:
        with pytest.raises(ArtifactError, match="the name"):
            act(name)


def test_links_are_not_followed(disk: Storage, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    disk.write("f", b"")
    disk.local_path().joinpath("link").symlink_to(tmp_path / "outside")
    disk.local_path().joinpath("file-link").symlink_to(tmp_path / "outside" / "secret")
    for name in ("link", "link/secret", "link/new", "file-link"):
        acts = [disk.local_path, disk.read_bytes, disk.exists, disk.delete_tree, lambda n: disk.write(n, b"")]
        for act in acts:
            with pytest.raises(ArtifactError, match="symbolic link"):
                act(name)
    assert disk.list_files() == ["f", "file-link", "link"]
    disk.delete_tree()
    assert (tmp_path / "outside" / "secret").read_bytes() == b"secret"


def test_addresses_are_made_absolute_and_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs/x/")
    monkeypatch.chdir("/")
    assert storage.uri == str(tmp_path / "runs" / "x")
    assert Storage(f"file://{tmp_path}/a%20b").uri == f"{tmp_path}/a b"
    assert Storage(tmp_path) == Storage(str(tmp_path))
    assert Storage("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert Storage("gs://bucket").child("a", "b/c").full_path("d") == "gs://bucket/a/b/c/d"
    assert storage.child("a").full_path("b") == str(tmp_path / "runs/x/a/b")
    for each in (storage, Storage("s3://bucket/a")):
        assert sent(each) == each
    with pytest.raises(ArtifactError, match="no local paths"):
        Storage("s3://bucket/a").local_path()


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "a\x00b",
        "ftp://host/x",
        "s3://",
        "s3://bucket/../x",
        "s3://b/a?x",
        "file://host/x",
        Path("s3://b/x"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused(uri: str | Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Storage(uri)
    assert "s3://bucket/prefix" in caught.value.fix


def test_the_bucket_of_the_tests_is_real(s3_server: S3Server) -> None:
    assert Storage(f"s3://{BUCKET}").list_dirs("nowhere") == []

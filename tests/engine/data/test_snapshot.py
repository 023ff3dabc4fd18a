"""The snapshot store: what is whole is served, what is not is refused with its reason."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engine import __version__
from engine.core.channel import SnapshotSink
from engine.core.errors import BuildError, SnapshotError
from engine.core.writable import writable
from engine.data.snapshot import FORMAT, Release, Snapshot, SnapshotStore, reader, touch

ARRAYS = {
    "offsets": np.arange(5, dtype=np.int64),
    "rows": np.arange(100, dtype=np.int32),
    "scores.half": np.linspace(0, 1, 40, dtype=np.float16).reshape(10, 4),
    "none": np.empty(0, np.float32),
    "names": np.array(["a", "bc", "δ"]),
}


def build(
    store: SnapshotStore, component: str, catalogue: str = "", seed: int = 0, **arrays: np.ndarray
) -> str:
    with store.begin(component, parameters={"seed": seed}, dataset="d1", catalogue=catalogue) as writer:
        for name, array in (arrays or ARRAYS).items():
            writer.write(name, array)
    return writer.version


def publish(store: SnapshotStore, seed: int = 0) -> Release:
    catalogue = build(store, "catalogue", seed=seed)
    return store.publish({"catalogue": catalogue, "swing": build(store, "swing", catalogue, seed)})


def files_of(store: SnapshotStore, component: str, version: str) -> list[Path]:
    return sorted((store.root / component / version).iterdir())


def everything(root: Path) -> list[str]:
    return sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != ".lock"
    )


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots")


# --- writing and opening ------------------------------------------------------------------------------------


def test_what_was_written_is_what_is_read(store: SnapshotStore) -> None:
    with store.begin(
        "swing", parameters={"alpha": 0.1, "sizes": (1, 2)}, dataset="d1", catalogue="c1", log_offset="5-3"
    ) as writer:
        sink: SnapshotSink = writer
        for name, array in ARRAYS.items():
            sink.write(name, array)
        assert writer.version == ""
    snapshot = store.open("swing", writer.version, catalogue="c1")
    manifest = snapshot.manifest
    assert (manifest.format, manifest.component, manifest.version) == (FORMAT, "swing", writer.version)
    assert manifest.parameters == {"alpha": 0.1, "sizes": [1, 2]}
    assert (manifest.dataset, manifest.catalogue, manifest.log_offset) == ("d1", "c1", "5-3")
    assert manifest.code == __version__
    assert snapshot.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(snapshot.arrays[name], array)
        assert snapshot.arrays[name].dtype == array.dtype
        assert type(snapshot.arrays[name]) is np.ndarray
        assert not snapshot.arrays[name].flags.writeable
    assert store.versions("swing") == [writer.version]
    assert store.manifest("swing", writer.version) == manifest


def test_what_is_written_through_a_view_for_kernels_does_not_reach_the_file(tmp_path):
    store = SnapshotStore(tmp_path)
    version = build(store, "itemcf")
    view = writable(store.open("itemcf", version).arrays["rows"])
    view[3] = -1
    again = store.open("itemcf", version, verify=True)
    assert again.arrays["rows"].tolist() == ARRAYS["rows"].tolist()


def test_arrays_are_mapped_where_the_system_promises_no_memory_for_copies(tmp_path, monkeypatch):
    def refusing(path, dtype, mode, *rest):
        if mode == "c":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return mapped(path, dtype, mode, *rest)

    mapped = np.memmap
    store = SnapshotStore(tmp_path)
    version = build(store, "itemcf")
    monkeypatch.setattr(reader.np, "memmap", refusing)
    rows = store.open("itemcf", version).arrays["rows"]
    assert rows.tolist() == ARRAYS["rows"].tolist()
    assert not writable(rows).flags.writeable


DTYPES = st.one_of(
    hnp.integer_dtypes(endianness="="),
    hnp.unsigned_integer_dtypes(endianness="="),
    hnp.floating_dtypes(endianness="=", sizes=(16, 32, 64)),
    hnp.boolean_dtypes(),
    hnp.unicode_string_dtypes(endianness="=", min_len=1, max_len=4),
    hnp.datetime64_dtypes(endianness="="),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)),
    fortran=st.booleans(),
)
def test_arrays_of_any_dtype_and_shape_come_back(tmp_path: Path, array: np.ndarray, fortran: bool) -> None:
    store = SnapshotStore(tmp_path)
    given_array = np.asfortranarray(array) if fortran and array.ndim > 1 else array
    version = build(store, "any", array=given_array)
    read = store.open("any", version).arrays["array"]
    assert read.dtype == array.dtype
    assert read.shape == array.shape
    assert read.tobytes() == array.tobytes()
    # The file is an ordinary .npy: any tool can look into it.
    np.testing.assert_array_equal(np.load(tmp_path / "any" / version / "array.npy"), array)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=DTYPES)
def test_appender_writes_the_bytes_that_write_does(
    tmp_path: Path, data: st.DataObject, dtype: np.dtype
) -> None:
    store = SnapshotStore(tmp_path)
    parts = data.draw(st.lists(hnp.arrays(dtype, st.integers(0, 20)), max_size=5))
    whole = np.concatenate(parts) if parts else np.empty(0, dtype)
    with store.begin("any", parameters={}, dataset="") as writer:
        writer.write("whole", whole)
        with writer.appender("pieces", dtype) as appender:
            for part in parts:
                appender.append(part)
    files = store.open("any", writer.version).manifest.files
    assert files["pieces"].sha256 == files["whole"].sha256
    assert files["pieces"].shape == whole.shape


def test_two_appenders_may_be_open_at_once_and_parts_may_be_strided(store: SnapshotStore) -> None:
    with (
        store.begin("swing", parameters={}, dataset="") as writer,
        writer.appender("rows", np.int32) as rows,
        writer.appender("scores", "<f4") as scores,
    ):
        for _ in range(3):
            rows.append(np.arange(10, dtype=np.int32)[::3])
            scores.append(np.ones(2, np.float32))
    arrays = store.open("swing", writer.version).arrays
    assert arrays["rows"].tolist() == [0, 3, 6, 9] * 3
    assert arrays["scores"].tolist() == [1.0] * 6


def test_array_of_a_failed_appender_is_not_part_of_the_snapshot(store: SnapshotStore) -> None:
    with store.begin("swing", parameters={}, dataset="") as writer:
        with pytest.raises(BuildError), writer.appender("rows", np.int32) as rows:  # noqa: PT012
            rows.append(np.arange(3, dtype=np.int32))
            rows.append(np.ones(1))
        writer.write("scores", np.ones(3))
    assert list(store.open("swing", writer.version).arrays) == ["scores"]
    assert len(files_of(store, "swing", writer.version)) == 2


@pytest.mark.parametrize("part", [np.ones(3), np.ones(3, np.int64), np.ones((2, 2), np.int32)])
def test_appender_refuses_what_would_lose_something(store: SnapshotStore, part: np.ndarray) -> None:
    with (
        pytest.raises(BuildError, match="'rows': cannot append"),
        store.begin("swing", parameters={}, dataset="") as writer,
        writer.appender("rows", np.int32) as rows,
    ):
        rows.append(part)


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "../a", ".hidden", "a b", "a\n"])
def test_array_names_are_limited(store: SnapshotStore, name: str) -> None:
    with (
        pytest.raises(BuildError, match="array name"),
        store.begin("swing", parameters={}, dataset="") as writer,
    ):
        writer.write(name, np.ones(1))


def test_objects_and_repeated_names_are_refused(store: SnapshotStore) -> None:
    with store.begin("swing", parameters={}, dataset="") as writer:
        with pytest.raises(BuildError, match="cannot be mapped"):
            writer.write("a", np.array([None]))
        writer.write("a", np.ones(1))
        with pytest.raises(BuildError, match="written twice"):
            writer.write("a", np.zeros(1))
        with pytest.raises(BuildError, match="written twice"), writer.appender("a", np.int32):
            pass
    assert store.open("swing", writer.version).arrays["a"].tolist() == [1.0]


@pytest.mark.parametrize("component", ["", "releases", "current", "../x", "Swing", ".tmp-1"])
def test_component_names_are_limited(store: SnapshotStore, component: str) -> None:
    with pytest.raises(SnapshotError, match="name of a component"):
        build(store, component)


def test_equal_content_has_an_equal_digest(store: SnapshotStore) -> None:
    first, second, other = (build(store, "swing", seed=seed) for seed in (0, 0, 1))
    assert first < second < other
    assert first.split("-")[1] == second.split("-")[1] != other.split("-")[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_interrupted_build_leaves_nothing(store: SnapshotStore, error: type[BaseException]) -> None:
    with (  # noqa: PT012
        pytest.raises(error),
        store.begin("swing", parameters={}, dataset="") as writer,
        writer.appender("b", np.int32) as appender,
    ):
        writer.write("a", np.ones(1000))
        appender.append(np.ones(5, np.int32))
        raise error
    assert everything(store.root) == []
    assert list((store.root / "swing").iterdir()) == []
    assert writer.version == ""


def test_a_full_disk_is_told_and_changes_nothing(store: SnapshotStore) -> None:
    serving = publish(store)
    before = everything(store.root)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # as a full disk does, the limit makes a write an error
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(BuildError, match=r"swing: its snapshot cannot be written to .*swing"):
            build(store, "swing", large=np.ones(100_000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        with pytest.raises(SnapshotError, match="cannot be written: File too large"):
            store.publish(serving.snapshots)
        with pytest.raises(SnapshotError, match="current: cannot be written: File too large"):
            store.rollback(serving.name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert everything(store.root) == before
    assert store.current() == serving
    publish(store, seed=1)


def test_build_is_invisible_until_it_ends(store: SnapshotStore) -> None:
    with store.begin("swing", parameters={}, dataset="") as writer:
        writer.write("a", np.ones(1))
        assert store.versions("swing") == []
    assert store.versions("swing") == [writer.version]


def test_parameters_must_be_json(store: SnapshotStore) -> None:
    with pytest.raises(TypeError), store.begin("swing", parameters={"a": object()}, dataset=""):
        pass
    with (
        pytest.raises(ValueError, match="JSON"),
        store.begin("swing", parameters={"a": float("nan")}, dataset=""),
    ):
        pass
    assert everything(store.root) == []


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["zero", "half", "one less"])
def test_truncation_of_any_file_is_refused_and_the_previous_release_serves(
    store: SnapshotStore, length: str
) -> None:
    first, second = publish(store, 1), publish(store, 2)
    for path in files_of(store, "swing", second.snapshots["swing"]):
        whole = path.read_bytes()
        cut = {"zero": 0, "half": len(whole) // 2, "one less": len(whole) - 1}[length]
        path.write_bytes(whole[:cut])
        if path.name == "manifest.json" and whole[cut:] == b"\n":
            continue  # without its last newline it says the same
        # Sizes are compared whether or not checksums are.
        for verify in (True, False):
            with pytest.raises(SnapshotError, match="truncated") as caught:
                store.open("swing", second.snapshots["swing"], verify=verify)
            assert caught.value.file == str(path)
            if path.suffix == ".npy":
                assert f"expected {len(whole)} bytes, there are {cut}" in str(caught.value)
        release, snapshots, refused = store.newest_valid()
        assert release == first
        assert snapshots["swing"].manifest.parameters == {"seed": 1}
        assert [error.file for error in refused] == [str(path)]
        path.write_bytes(whole)
    assert store.newest_valid()[0] == second


def test_flipped_bit_in_any_file_is_refused_and_the_previous_release_serves(store: SnapshotStore) -> None:
    first, second = publish(store, 1), publish(store, 2)
    randomness = random.Random(0)
    for path in files_of(store, "swing", second.snapshots["swing"]):
        whole = path.read_bytes()
        # The manifest, where a flip could mean anything, everywhere; a .npy at its ends and at random places.
        places = (
            range(len(whole))
            if path.suffix == ".json"
            else [0, 9, len(whole) - 1, randomness.randrange(len(whole))]
        )
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << randomness.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(SnapshotError) as caught:
                store.open("swing", second.snapshots["swing"])
            if path.suffix == ".npy":
                assert "damaged: its SHA-256" in str(caught.value)
                assert caught.value.file == str(path)
        assert store.newest_valid()[0] == first
        path.write_bytes(whole)
    assert store.newest_valid()[0] == second


def test_flipped_bit_in_release_or_current_is_noticed(store: SnapshotStore) -> None:
    first, second = publish(store, 1), publish(store, 2)
    randomness = random.Random(0)
    file = store.root / "releases" / f"{second.name}.json"
    for path, fallback in ((file, first), (store.root / "current", second)):
        whole = path.read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << randomness.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(SnapshotError):
                store.current()
            release, _, refused = store.newest_valid()
            assert release == fallback
            assert len(refused) == 1
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["manifest.json", "rows.npy", "none.npy"])
def test_missing_file_is_named(store: SnapshotStore, name: str) -> None:
    version = build(store, "swing")
    path = store.root / "swing" / version / name
    path.unlink()
    with pytest.raises(SnapshotError, match="the file is missing") as caught:
        store.open("swing", version)
    assert caught.value.file == str(path)


def test_snapshot_that_vanishes_after_it_was_mapped_fails_verification(store: SnapshotStore) -> None:
    from engine.data.snapshot import reader

    version = build(store, "swing")
    snapshot = store.open("swing", version)
    (snapshot.path / "rows.npy").unlink()
    with pytest.raises(SnapshotError, match=r"rows\.npy: the file is missing"):
        reader.verify([snapshot])
    assert snapshot.arrays["rows"][-1] == 99  # what is mapped stays


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(format=FORMAT + 1, surprise=1), "written by a newer version: format 2"),
        (lambda m: m.update(format="1"), "format is '1'"),
        (lambda m: m.pop("format"), "format is None"),
        (lambda m: m.pop("files"), "key 'files': Field required"),
        (lambda m: m["files"]["rows"].pop("bytes"), r"key 'files\.rows\.bytes': Field required"),
        (lambda m: m["files"]["rows"].update(file="../../x.npy"), r"key 'files\.rows\.file'"),
        (lambda m: m.update(surprise=1), "key 'surprise'"),
        (lambda m: m.update(dataset="d2"), "differs from the digest in its name"),
        (lambda m: m.update(component="itemcf"), "wrong component|differs from the digest"),
        (lambda m: m.update(version=m["version"][:-1] + "x"), "key 'version'"),
    ],
)
def test_changed_manifest_is_refused(
    store: SnapshotStore, change: Callable[[dict[str, object]], object], expected: str
) -> None:
    version = build(store, "swing")
    path = store.root / "swing" / version / "manifest.json"
    edit(path, change)
    with pytest.raises(SnapshotError, match=expected) as caught:
        store.open("swing", version)
    assert caught.value.file == str(path)


def test_snapshot_under_another_name_or_component_is_refused(store: SnapshotStore) -> None:
    version = build(store, "swing")
    (store.root / "itemcf").mkdir()
    os.rename(store.root / "swing" / version, store.root / "itemcf" / version)
    with pytest.raises(SnapshotError, match="wrong component: of 'swing', not of 'itemcf'"):
        store.open("itemcf", version)
    other = build(store, "itemcf", seed=3)
    os.rename(
        store.root / "itemcf" / version,
        store.root / "itemcf" / (other[:-1] + ("0" if other[-1] != "0" else "1")),
    )
    with pytest.raises(SnapshotError, match="damaged or moved"):
        store.open("itemcf", store.versions("itemcf")[0 if store.versions("itemcf")[0] != other else 1])


# --- releases -----------------------------------------------------------------------------------------------


def test_empty_store_has_no_release(store: SnapshotStore) -> None:
    assert store.current() is None
    assert store.releases() == []
    assert not store.collect(keep=1).snapshots
    assert not store.root.exists()
    with pytest.raises(SnapshotError, match="no release has been published"):
        store.newest_valid()
    with pytest.raises(SnapshotError, match="no release before"):
        store.rollback()


def test_release_is_published_and_loaded_whole(store: SnapshotStore) -> None:
    first, second = publish(store, 1), publish(store, 2)
    assert store.current() == second
    assert store.releases() == [second, first]
    release, snapshots, refused = store.newest_valid()
    assert (release, refused) == (second, [])
    assert {name: snapshot.version for name, snapshot in snapshots.items()} == second.snapshots
    assert {name: snapshot.component for name, snapshot in snapshots.items()} == {
        "catalogue": "catalogue",
        "swing": "swing",
    }


def test_snapshot_of_another_catalogue_is_refused(store: SnapshotStore) -> None:
    old, new = build(store, "catalogue", seed=1), build(store, "catalogue", seed=2)
    swing = build(store, "swing", old)
    expected = f"built for catalogue {old}, the release has {new}"
    with pytest.raises(SnapshotError, match=expected):
        store.publish({"catalogue": new, "swing": swing})
    with pytest.raises(SnapshotError, match="the release has none"):
        store.publish({"swing": swing})
    assert store.current() is None
    with pytest.raises(SnapshotError, match=expected):
        store.open("swing", swing, catalogue=new)
    assert store.open("swing", swing).version == swing
    # One that got past `publish` (by hand, say) is refused at loading too.
    made = Release.make(created="2026-01-01T00:00:00.000000Z", snapshots={"catalogue": new, "swing": swing})
    with pytest.raises(SnapshotError, match=expected):
        store.load_release(made)


def test_publish_refuses_what_does_not_exist(store: SnapshotStore) -> None:
    version = build(store, "swing")
    with pytest.raises(SnapshotError, match="missing"):
        store.publish({"swing": version, "itemcf": version})
    assert store.releases() == []


def test_rollback_points_current_at_an_earlier_release(store: SnapshotStore) -> None:
    first, second, third = publish(store, 1), publish(store, 2), publish(store, 3)
    assert store.rollback() == second
    assert store.rollback() == first
    assert store.current() == first
    with pytest.raises(SnapshotError, match="no release before"):
        store.rollback()
    assert store.rollback(third.name) == third
    assert store.rollback(first.name) == first
    with pytest.raises(SnapshotError, match="missing"):
        store.rollback("20200101T000000.000000Z-000000000000")
    assert store.current() == first


def test_damaged_release_is_not_rolled_back_to(store: SnapshotStore) -> None:
    first, second = publish(store, 1), publish(store, 2)
    (store.root / "swing" / first.snapshots["swing"] / "rows.npy").write_bytes(b"")
    with pytest.raises(SnapshotError, match="truncated"):
        store.rollback()
    assert store.current() == second


def test_newest_valid_never_goes_forward_of_current(store: SnapshotStore) -> None:
    publish(store, 1)
    second = publish(store, 2)
    publish(store, 3)
    store.rollback(second.name)
    assert store.newest_valid()[0] == second
    for release in store.releases()[1:]:
        (store.root / "swing" / release.snapshots["swing"] / "rows.npy").unlink()
    with pytest.raises(SnapshotError, match="missing") as caught:
        store.newest_valid()
    assert second.snapshots["swing"] in caught.value.file


def test_current_that_names_no_release_is_reported_and_worked_around(store: SnapshotStore) -> None:
    release = publish(store)
    (store.root / "current").write_text("20300101T000000.000000Z-000000000000\n")
    with pytest.raises(SnapshotError, match="which does not exist"):
        store.current()
    assert store.newest_valid()[0] == release
    (store.root / "current").unlink()
    served, _, refused = store.newest_valid()
    assert served == release
    assert "the file is missing" in str(refused[0])


def test_reader_overtaken_by_publish_and_collect_opens_the_newer_release(store: SnapshotStore) -> None:
    class Overtaken(SnapshotStore):
        newer: Release | None = None

        def load_release(self, release: Release, verify: bool = True) -> dict[str, Snapshot]:
            if self.newer is None:
                self.newer = publish(store, 2)
                store.collect(keep=1, grace_seconds=0)
            return super().load_release(release, verify)

    publish(store, 1)
    reader = Overtaken(store.root)
    served, _, refused = reader.newest_valid()
    assert served == reader.newer
    assert refused == []


def test_release_order_survives_a_clock_that_is_set_back(store: SnapshotStore) -> None:
    first = publish(store)
    late = Release.make(created="2999-01-01T00:00:00.000000Z", snapshots=first.snapshots)
    (store.root / "releases" / f"{late.name}.json").write_bytes(late.encode())
    newest = store.publish(first.snapshots)
    assert store.releases() == [newest, late, first]
    assert newest.created == "2999-01-01T00:00:00.000001Z"


# --- tidying ------------------------------------------------------------------------------------------------


def test_collect_keeps_the_newest_releases_and_what_they_name(store: SnapshotStore) -> None:
    releases = [publish(store, seed) for seed in range(5)]
    collected = store.collect(keep=2, grace_seconds=0)
    assert sorted(collected.releases) == [release.name for release in releases[:3]]
    assert sorted(collected.snapshots) == sorted(
        pair for release in releases[:3] for pair in release.snapshots.items()
    )
    assert store.releases() == releases[:2:-1]
    for release in releases[3:]:
        store.load_release(release)
    assert store.versions("swing") == [release.snapshots["swing"] for release in releases[:2:-1]]
    again = store.collect(keep=2, grace_seconds=0)
    assert (again.releases, again.snapshots, again.unfinished, again.errors) == ([], [], [], [])


def test_collect_keeps_the_current_release_however_old(store: SnapshotStore) -> None:
    releases = [publish(store, seed) for seed in range(4)]
    store.rollback(releases[0].name)
    store.collect(keep=1, grace_seconds=0)
    assert store.releases() == [releases[3], releases[0]]
    assert store.newest_valid()[0] == releases[0]


def test_collect_keeps_shared_snapshots(store: SnapshotStore) -> None:
    first = publish(store, 1)
    second = store.publish(
        {**first.snapshots, "itemcf": build(store, "itemcf", first.snapshots["catalogue"])}
    )
    assert store.collect(keep=1, grace_seconds=0).snapshots == []
    store.load_release(second)


def test_collect_spares_snapshots_that_may_yet_be_published(store: SnapshotStore) -> None:
    publish(store)
    young, old = build(store, "swing", seed=7), build(store, "swing", seed=8)
    hours_ago = time.time() - 2 * 3600
    os.utime(store.root / "swing" / old, (hours_ago, hours_ago))
    assert store.collect(keep=1).snapshots == [("swing", old)]
    assert young in store.versions("swing")


def test_collect_spares_a_build_in_progress_and_removes_a_dead_one(store: SnapshotStore) -> None:
    script = (
        "import os, sys, numpy as np\n"
        "from engine.data.snapshot import SnapshotStore\n"
        "with SnapshotStore(sys.argv[1]).begin('swing', parameters={}, dataset='') as writer:\n"
        "    writer.write('a', np.ones(10))\n"
        "    os._exit(1)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(store.root)], check=False).returncode == 1
    with store.begin("swing", parameters={}, dataset="") as writer:
        writer.write("b", np.ones(10))
        assert len(list((store.root / "swing").iterdir())) == 2
        (dead,) = store.collect(keep=1, grace_seconds=0).unfinished
        assert dead.startswith("swing/.tmp-")
        assert f"-{os.getpid()}-" not in dead
    assert store.open("swing", writer.version).arrays["b"].size == 10


def test_collect_deletes_no_snapshot_while_a_release_is_unreadable(store: SnapshotStore) -> None:
    release = publish(store)
    build(store, "swing", seed=9)
    (store.root / "releases" / f"{release.name}.json").write_text("{")
    collected = store.collect(keep=1, grace_seconds=0)
    assert collected.snapshots == []
    assert len(collected.errors) == 1
    (store.root / "current").write_text("?")
    collected = store.collect(keep=1, grace_seconds=0)
    assert (collected.snapshots, collected.releases) == ([], [])


def test_collect_keeps_at_least_one(store: SnapshotStore) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        store.collect(keep=0)


def test_open_snapshot_outlives_its_files(store: SnapshotStore) -> None:
    release = publish(store, 1)
    snapshots = store.load_release(release)
    publish(store, 2)
    store.collect(keep=1, grace_seconds=0)
    assert not snapshots["swing"].path.exists()
    np.testing.assert_array_equal(snapshots["swing"].arrays["rows"], ARRAYS["rows"])


# --- sudden death -------------------------------------------------------------------------------------------

FACTORY = """
import sys
import numpy as np
from engine.data.snapshot import SnapshotStore

store = SnapshotStore(sys.argv[1])
print("ready", flush=True)
seed = 0
while True:
    seed += 1
    with store.begin("catalogue", parameters={"seed": seed}, dataset="") as catalogue:
        catalogue.write("ids", np.arange(2000) + seed)
    with store.begin("swing", parameters={"seed": seed}, dataset="", catalogue=catalogue.version) as swing:
        with swing.appender("rows", np.int64) as rows:
            for _ in range(20):
                rows.append(np.full(500, seed))
    store.publish({"catalogue": catalogue.version, "swing": swing.version})
    store.collect(keep=2, grace_seconds=0)
"""


def test_killed_at_any_moment_the_store_opens_to_a_whole_release(store: SnapshotStore) -> None:
    randomness = random.Random(11)
    publish(store)
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", FACTORY, str(store.root)], stdout=subprocess.PIPE
        ) as factory:
            assert factory.stdout is not None
            assert factory.stdout.readline() == b"ready\n"
            time.sleep(randomness.uniform(0.0, 0.15))
            factory.send_signal(signal.SIGKILL)
        release, snapshots, refused = store.newest_valid()
        assert refused == []
        assert store.current() == release
        seeds = {snapshot.manifest.parameters["seed"] for snapshot in snapshots.values()}
        assert len(seeds) == 1
    store.collect(keep=1, grace_seconds=0)
    names = everything(store.root)
    assert not [name for name in names if ".tmp-" in name]
    # A kill between writing a release and pointing at it leaves one that is newer than the one in service: both stay.
    retained = store.releases()
    assert len(retained) <= 2
    named = {f"{component}/{version}" for each in retained for component, version in each.snapshots.items()}
    assert {name.removesuffix("/manifest.json") for name in names if name.endswith("manifest.json")} == named


def mapped_kilobytes(file: str) -> int:
    """How much of a file this process has mapped and looked at."""
    size, mine = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split(" ", 1)[0]:
            mine = line.endswith(file)
        elif mine and line.startswith("Rss:"):
            size += int(line.split()[1])
    return size


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what is mapped")
def test_pages_that_were_touched_are_there_before_anybody_reads_them(tmp_path):
    store = SnapshotStore(tmp_path)
    version = build(store, "swing", rows=np.arange(1 << 20, dtype=np.int32))
    (file,) = (str(path) for path in files_of(store, "swing", version) if path.suffix == ".npy")
    snapshot = store.open("swing", version)
    assert mapped_kilobytes(file) < 1024
    assert touch([snapshot]) == 4 << 20
    assert mapped_kilobytes(file) >= 4096


def test_snapshots_that_do_not_fit_in_memory_are_not_read_ahead(tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path)
    snapshot = store.open("swing", build(store, "swing"))
    assert touch([snapshot]) == sum(array.nbytes for array in ARRAYS.values())
    monkeypatch.setattr(reader, "_TOUCHED_SHARE", 0.0)
    assert touch([snapshot]) == 0

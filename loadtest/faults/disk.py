"""A disk that is full: under the snapshots while a release is built, and under the embedded store while it is written to.

The disk is a small file system in memory that only this process and its children see: `unshare` (util-linux) makes a
name space of mounts for them, for which one need not be root where the system lets users make such. Linux only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.core.errors import ConfigError
from engine.data.sample import sample_path
from engine.data.snapshot import SnapshotStore
from loadtest.faults.load import RECOVERY_SECONDS, Load, Report
from loadtest.servers import ServerProcess, built, some_users, with_options
from loadtest.traffic import OK

_ENTERED = "RECALL_FAULTS_DISK"
"""In the environment of a process that has mounts of its own."""

_MEGABYTES = 256
_ENTER = ["unshare", "--user", "--map-root-user", "--mount"]
_LITTLE = 3 << 17
"""Bytes in which a build gets somewhere, and not to its end."""

_SETTLE_SECONDS = RECOVERY_SECONDS + 1.0


def possible() -> bool:
    """Whether this system lets this user have mounts of their own."""
    if shutil.which("unshare") is None:
        return False
    command = [*_ENTER, "mount", "-t", "tmpfs", "recall", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def enter() -> None:
    """Run this command again in a process that has mounts of its own; returns in that one alone.

    Raises:
        ConfigError: the system does not let this user.
    """
    if _ENTERED in os.environ:
        return
    if not possible():
        raise ConfigError("a full disk needs `unshare --user --mount`, which this system does not let you do")
    command = [*_ENTER, sys.executable, "-m", "loadtest.faults", *sys.argv[1:]]
    os.execvpe(command[0], command, {**os.environ, _ENTERED: "1"})


class SmallDisk:
    """A file system of its own, which can be filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, left: int = 0) -> None:
        """Leave no room, or so many bytes."""
        with self._filler.open("wb", buffering=0) as file:
            size = 1 << 20
            while size:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2
            file.truncate(max(0, file.tell() - left))

    def room(self) -> None:
        """Make room again."""
        self._filler.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """Mount a small file system for as long as the context lasts."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_MEGABYTES}m", "recall", str(folder)], check=True)
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def build(folder: Path) -> Report:
    """Fill the disk of the snapshots; build, publish and roll back, and see that nothing changes and all is told."""
    report = Report()
    with small_disk(folder / "disk") as disk:
        root = disk.folder / "store"
        built(root)
        config_file = folder / "other.toml"
        # Other options, so that the next build writes something.
        config_file.write_text(with_options(("channels.itemcf", "neighbours", 150), ("state", "url", "none")))
        store = SnapshotStore(root)
        first = _recall("build", sample_path(), "--config", config_file, "--store", root)
        report.promise(first.returncode == 0, f"the second release could not be built: {first.stderr}")
        serving, before = store.current_name(), store.release_names()[-1]
        config_file.write_text(with_options(("channels.swing", "neighbours", 150), ("state", "url", "none")))
        server = ServerProcess(root, config_file)
        try:
            server.start()
            rebuild = ("build", sample_path(), "--config", config_file, "--store", root)
            files = _files(root)
            for name, room, arguments in (
                ("build_with_little_room", _LITTLE, rebuild),
                ("build", 0, rebuild),
                ("publish", 0, ("publish", before, "--store", root)),
                ("rollback", 0, ("releases", "rollback", before, "--store", root)),
            ):
                disk.fill(room)
                done = _recall(*arguments)
                said = done.stderr.strip().splitlines()
                report.facts[name] = {"status": done.returncode, "said": said[-3:]}
                report.promise(done.returncode == 2, f"{name} ended with status {done.returncode}")
                report.promise(
                    sum("error" in line for line in said) == 1 and "Traceback" not in done.stderr,
                    f"{name} did not say in one sentence what is wrong: {said[-3:]}",
                )
                report.promise(store.current_name() == serving, f"{name} changed which release is in service")
            left = sorted(_files(root) - files)
            report.facts["files_left"] = [str(path.relative_to(root)) for path in left]
            report.promise(not left, f"what failed left {len(left)} files")
            with server.client() as client:
                release = client.recall(user_id=1, limit=10).release
            report.promise(release == serving, f"the server answers from {release}, not from {serving}")
            disk.room()
            again = _recall(*rebuild)
            report.facts["build_with_room_again"] = {"status": again.returncode}
            report.promise(again.returncode == 0, f"with room again the build fails: {again.stderr[-300:]}")
        finally:
            server.stop()
    return report


def state(folder: Path, durability: str, seconds: float, per_second: float) -> Report:
    """Fill the disk of the embedded store for some seconds under load, and look whether promises are kept.

    With `everysec` reads go on. With `always` the store's server ends when it cannot write its log, by its own design,
    and is started again and again: answers are flagged meanwhile, and come all the same.
    """
    report = Report()
    root = folder / "store"
    config = built(root)
    with small_disk(folder / "disk") as disk:
        (disk.folder / "state").mkdir(mode=0o700)
        (root / "state").symlink_to(disk.folder / "state")
        config_file = folder / "disk.toml"
        config_file.write_text(
            with_options(("server", "max_limit", 100_000), ("state", "durability", durability))
        )
        server = ServerProcess(root, config_file)
        try:
            server.start()
            with Load(server, some_users(config), per_second) as load:
                began = time.monotonic()
                disk.fill()
                full = time.monotonic()
                time.sleep(seconds)
                mending = time.monotonic()
                disk.room()
                mended = time.monotonic()
                time.sleep(_SETTLE_SECONDS + 5.0)
                ended = time.monotonic()
            recall_back, report_back = load.recovered_after(mended)
            # Until its next write the store does not know: what comes before is acknowledged, and kept in memory.
            recalls, reports = load.between(full + 1.0, mending)
            report.facts = {
                "durability": durability,
                "seconds": round(mending - full, 1),
                "before": load.phase(0.0, began),
                "meanwhile": load.phase(full, mending),
                "after": load.phase(mended, ended),
                "recalls_recovered_after_s": recall_back,
                "reports_recovered_after_s": report_back,
                "acknowledged_events": load.ledger.events,
                "lost": load.lost(server),
            }
        finally:
            server.stop()
    report.promise(not load.traffic.failed, f"recalls failed: {dict(load.traffic.failed)}")
    flagged = sum(call.flagged for call in recalls)
    if durability == "everysec":
        report.promise(2 * flagged <= len(recalls), f"{flagged} of {len(recalls)} answers were flagged")
    acknowledged = sum(call.status == OK for call in reports)
    # Started again it cuts off what it wrote in part: a small report may find that room, and is durable then.
    few = 0 if durability == "everysec" else (len(reports) - acknowledged) // 10
    report.promise(
        acknowledged <= few, f"{acknowledged} reports were acknowledged by a store that takes none"
    )
    other = {call.status for call in load.ledger.calls} - {OK, "UNAVAILABLE"}
    report.promise(not other, f"reports were refused with {', '.join(sorted(other))}")
    patience = RECOVERY_SECONDS if durability == "everysec" else RECOVERY_SECONDS + 5.0
    report.promise(report_back <= patience, f"reports were refused for {report_back} s after there was room")
    report.promise(recall_back <= patience, f"answers were flagged for {recall_back} s after there was room")
    report.promise(not report.facts["lost"], f"acknowledged and lost: {report.facts['lost'][:3]}")
    return report


def _recall(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}

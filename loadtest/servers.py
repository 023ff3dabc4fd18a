"""Servers as a load test needs them: built from data sets, configured, started, killed and started again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.client import RecallClient
from engine.config import Config, default_config_path, load_config, parse_config
from engine.core.channel import SilentProgress
from engine.data.dataset import Dataset
from engine.data.sample import sample_path
from engine.data.snapshot import SnapshotStore
from engine.offline.build import build_release
from engine.online.replica import Replica

START_SECONDS = 120.0
"""How long a server may take to come up: the first one on a machine compiles the kernels."""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def built(folder: Path, data: Path | None = None) -> Config:
    """Build a data set, the bundled sample by default, and return the configuration that serves it."""
    config = load_config()
    config = config.model_copy(update={"store": config.store.model_copy(update={"path": folder})})
    build_release(config, Dataset.open(data or sample_path()), SnapshotStore(folder), SilentProgress())
    return config


def own_folder(world: SnapshotStore, folder: Path) -> Path:
    """Return a new folder with the snapshots of a world: its own is a cache, and no server's data shall come into it."""
    folder.mkdir()
    for path in world.root.iterdir():
        if not path.name.startswith(".") and path.name != "state":
            (folder / path.name).symlink_to(path)
    return folder


def two_releases(folder: Path, data: Path) -> tuple[SnapshotStore, list[int]]:
    """Build two releases of a data set that share its catalogue, and return the store and some users."""
    store = SnapshotStore(folder)
    text = default_config_path().read_text("utf-8")
    for last_days in ("30.0", "20.0"):
        raw = tomllib.loads(text.replace("half_life_days = 30.0", f"half_life_days = {last_days}"))
        raw["interest"]["click"] = 1.0 if last_days == "30.0" else 1.5
        raw["store"]["path"] = str(folder)
        config = parse_config(raw)
        build_release(config, Dataset.open(data), store, SilentProgress())
    return store, some_users(config)


def some_users(config: Config, count: int = 64) -> list[int]:
    """Return the ids of some users of the release that a configuration serves, spread over all of them."""
    users = Replica.open(config, SnapshotStore(config.store.path)).catalogue.users
    return users.ids(np.linspace(0, len(users) - 1, min(count, len(users))).astype(np.int32)).tolist()


def with_options(*options: tuple[str, str, str | float]) -> str:
    """Return the text of the configuration that ships with options set: (table, key, value) each."""
    text = default_config_path().read_text("utf-8")
    for table, key, value in options:
        line = f"{key} = {json.dumps(value)}"
        begins = re.search(rf"(?m)^\[{re.escape(table)}\]$", text)
        if begins is None:
            text += f"\n[{table}]\n{line}\n"
            continue
        follows = re.search(r"(?m)^\[", text[begins.end() :])
        ends = len(text) if follows is None else begins.end() + follows.start()
        body, found = re.subn(rf"(?m)^{key} = .*$", lambda _, line=line: line, text[begins.end() : ends])
        text = text[: begins.end()] + (body if found else f"\n{line}{body}") + text[ends:]
    return text


def without_shedding(*options: tuple[str, str, str | float]) -> str:
    """Return `with_options` with such limits besides that a server refuses nothing for being busy.

    For servers whose failed requests are counted: what overload does is measured elsewhere.
    """
    return with_options(("overload", "target_ms", 60_000.0), *options)


class ServerProcess:
    """`recall serve` in a process of its own, on a port that stays the same when it is started again."""

    def __init__(
        self,
        folder: Path,
        config_file: Path,
        port: int | None = None,
        workers: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = {**os.environ, **(environment or {})}
        self.target = f"127.0.0.1:{port or free_port()}"
        self._folder, self._config, self._workers = folder, config_file, workers
        self.log = folder / f"server-{self.target.rpartition(':')[2]}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it and wait until it serves; returns the seconds that took."""
        began = time.monotonic()
        command = [sys.executable, "-m", "engine", "serve", "--config", str(self._config)]
        command += ["--store", str(self._folder), "--port", self.target.rpartition(":")[2]]
        if self._workers is not None:
            command += ["--workers", str(self._workers)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=self._environment
            )
        self.wait_until_serving()
        return time.monotonic() - began

    @property
    def pid(self) -> int:
        """The supervisor's process."""
        return 0 if self._process is None else self._process.pid

    def client(self, timeout: float = 10.0) -> RecallClient:
        """Return a client of it."""
        return RecallClient(self.target, timeout=timeout)

    def worker_pids(self) -> list[int]:
        """Return the processes of the workers that there are now."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.pid), "-f", "engine.online.worker"], capture_output=True, text=True
        )
        return [int(line) for line in found.stdout.split()]

    def log_text(self) -> str:
        """Return what supervisor and workers said."""
        return self.log.read_text(errors="replace")

    def wait_for_log(self, text: str, times: int = 1, patience: float = START_SECONDS) -> None:
        """Wait until a text stands in the log so many times.

        Raises:
            RuntimeError: it does not in time.
        """
        deadline = time.monotonic() + patience
        while self.log_text().count(text) < times:
            if time.monotonic() > deadline or (
                self._process is not None and self._process.poll() is not None
            ):
                raise RuntimeError(f"not in the log: {text!r}; its end: {self.log_text()[-1000:]}")
            time.sleep(0.05)

    def wait_until_serving(self) -> None:
        """Wait until its health says SERVING.

        Raises:
            RuntimeError: it ended, or did not come up in time.
        """
        deadline = time.monotonic() + START_SECONDS
        with RecallClient(self.target, timeout=1.0) as client:
            while time.monotonic() < deadline:
                if self._process is not None and self._process.poll() is not None:
                    last = self.log_text()[-500:]
                    raise RuntimeError(f"the server ended with status {self._process.returncode}: {last}")
                with contextlib.suppress(TimeoutError):
                    client.wait_ready(0.5)
                    return
        raise RuntimeError("the server did not come up")

    def kill(self) -> None:
        """SIGKILL, of the supervisor and of every worker."""
        if self._process is not None:
            workers = self.worker_pids()
            self._process.kill()
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and wait."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(30)


def kill_store(folder: Path) -> None:
    """SIGKILL the embedded store of a folder of snapshots, and wait until it is gone."""
    pid = int((folder / "state" / "store.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text():
            return  # dead, and its parent has not looked yet
        time.sleep(0.01)

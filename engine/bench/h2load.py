"""h2load (of nghttp2) as the client, where it is installed: compiled, so the cheapest there is.

One h2load sends one body, whatever its options: `-d` is one file, and a list of URLs shares it. So several run side by
side, each with the message of another user. Its log gives the time of every request, and the samples of all are put
together. It cannot tell a refused call from an answered one, because both are HTTP 200, so it serves where nothing is
refused.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engine.bench.http2 import Samples
from engine.core.errors import RecallError

PROCESSES = 16
_PATIENCE_SECONDS = 30.0
_CLOCK = 0.01
"""How far the clock on the wall may go astray, as a share of the measurement."""


def installed() -> bool:
    """Whether h2load is on the path."""
    return shutil.which("h2load") is not None


def version() -> str:
    """Return what h2load says of itself."""
    return subprocess.run(["h2load", "--version"], capture_output=True, text=True, check=True).stdout.strip()


def send(
    port: int,
    path: str,
    messages: Sequence[bytes],
    in_flight: int,
    seconds: float,
    warm_up: float,
    mark: Callable[[], None],
) -> Samples:
    """Send messages in a closed loop, a process and a connection for each of the first 16 or fewer.

    Args:
        port: on 127.0.0.1.
        path: the method's.
        messages: serialized requests.
        in_flight: requests that are unanswered at any time; at least 1 for each process.
        seconds: how long is measured.
        warm_up: seconds before that.
        mark: called when the measurement begins and when it ends.

    Raises:
        RecallError: h2load fails, or the machine's clock was set meanwhile.
    """
    processes = min(PROCESSES, in_flight, len(messages))
    shares = [in_flight // processes + (n < in_flight % processes) for n in range(processes)]
    with tempfile.TemporaryDirectory(prefix="recall-h2load-") as name:
        folder = Path(name)
        running = []
        for n, (message, streams) in enumerate(zip(messages, shares, strict=False)):
            (folder / f"{n}.body").write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
            # It ends a second late, so that all run while it is measured.
            command = [
                "h2load",
                "-D",
                str(int(warm_up + seconds + 2)),
                "-c",
                "1",
                "-m",
                str(streams),
                "-t",
                "1",
            ]
            command += ["-d", str(folder / f"{n}.body"), "--log-file", str(folder / f"{n}.log")]
            command += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
            command.append(f"http://127.0.0.1:{port}{path}")
            running.append(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
        start = time.time() + warm_up
        end = start + seconds
        steady = time.perf_counter() - time.time()
        for moment in (start, end):
            time.sleep(max(0.0, moment - time.time()))
            mark()
        if abs(time.perf_counter() - time.time() - steady) > _CLOCK * seconds:
            raise RecallError(
                "the machine's clock was set while h2load ran, whose log goes by it; run it again"
            )
        for process in running:
            _, said = process.communicate(timeout=warm_up + seconds + _PATIENCE_SECONDS)
            if process.returncode:
                raise RecallError(f"h2load failed: {said.strip()}")
        logs = [np.loadtxt(folder / f"{n}.log", np.int64, ndmin=2) for n in range(processes)]
    log = np.concatenate([each for each in logs if each.size])  # start in µs since the epoch, HTTP status, µs
    ended = (log[:, 0] + log[:, 2]) / 1e6
    log = log[(ended >= start) & (ended < end)]
    answered = log[:, 1] == 200
    sizes = np.zeros(answered.size, np.int64)
    return Samples(seconds, log[:, 2] / 1e6, answered, sizes, int(answered.sum()))

"""A worker as its supervisor has it: a process, started and ended, and the channel on which it is told what to do."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from engine.online.control import Control, WorkerError, connect


class WorkerProcess:
    """A worker's process and its control channel.

    Attributes:
        number: its place, from 0.
        serving: whether it was told to listen, and so takes part in reloads.
        listening: whether it has said that it does.
    """

    def __init__(self, number: int, process: asyncio.subprocess.Process, control: Control) -> None:
        self.number = number
        self.serving = self.listening = False
        self.control = control
        self._process = process

    @classmethod
    async def spawn(cls, number: int) -> WorkerProcess:
        """Start the process."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # -P: a folder called `engine` where the command was given must not stand in for ours.
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "engine.online.worker", str(theirs.fileno()), str(number),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    # Ctrl-C goes to the whole group, and it is the supervisor who tells workers to stop.
                    start_new_session=True,
                )  # fmt: skip
            except BaseException:
                ours.close()
                raise
        return cls(number, process, Control(*await connect(ours)))

    @property
    def name(self) -> str:
        """What logs call it."""
        return f"worker {self.number}"

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    async def prepare(self, release: str) -> None:
        """Have it load and warm a release beside the one it serves."""
        await self.control.ask("prepare", release=release)

    async def swap(self, release: str) -> None:
        """Have it answer from the release that it prepared; one that cannot is killed, and starts with it."""
        try:
            await self.control.ask("swap")
        except WorkerError:
            self.signal(signal.SIGKILL)
            raise

    async def abandon(self) -> None:
        """Have it drop the release that it prepared."""
        await self.control.ask("abandon")

    def tell_to_stop(self) -> None:
        """Have it drain and end, without waiting for either."""
        self.control.tell("stop")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it has not ended."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def kill(self) -> int:
        """End the process at once if it has not ended; return its exit status."""
        if self._process.returncode is None:
            with suppress(TimeoutError):  # one that has closed its channel is about to end
                await asyncio.wait_for(self._process.wait(), 1.0 if self.control.over else 0.001)
        if self._process.returncode is None:
            self.signal(signal.SIGKILL)
        status = await self._process.wait()
        await self.control.close()
        return status

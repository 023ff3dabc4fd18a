"""A worker: one server process of several on a port, told what to do by the supervisor over the control channel.

`python -m engine.online.worker DESCRIPTOR NUMBER` is that process; the descriptor is its end of the control channel,
which `engine.online.control` describes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
import tomllib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest

from engine.config import Config, parse_config
from engine.core.errors import RecallError
from engine.data.snapshot import SnapshotStore
from engine.online import kernels
from engine.online.control import connect, line_of
from engine.online.replica import Replica
from engine.online.server import Server
from engine.online.state import State, open_state

log = logging.getLogger("engine.online.worker")


class Worker:
    """Does what the supervisor says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take the control channel's end."""
        self._reader = reader
        self._writer = writer
        self._in_turn: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._stopped = asyncio.Event()
        self._stack = ExitStack()
        self._server: Server | None = None
        self._drain_seconds = 0.0
        self._store: SnapshotStore | None = None
        self._beside: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Do what is asked until told to stop, by the supervisor, its end or SIGTERM; then drain."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stopped.set)
        tasks = [asyncio.create_task(work) for work in (self._read(), self._work())]
        await self._stopped.wait()
        for task in tasks:
            task.cancel()
        log.info("draining for at most %g s", self._drain_seconds)
        if self._server is not None:
            await self._server.stop(self._drain_seconds)
        await asyncio.to_thread(self._stack.close)
        log.info("stopped")

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if message["do"] == "stop":
                    break
                if message["do"] in ("ping", "metrics"):
                    task = asyncio.create_task(self._answer(message))
                    self._beside.add(task)
                    task.add_done_callback(self._beside.discard)
                else:
                    self._in_turn.put_nowait(message)
            else:
                log.error("the supervisor is gone")
        except (OSError, ValueError) as error:
            log.error("the control channel broke: %s", error)
        finally:
            self._stopped.set()

    async def _work(self) -> None:
        while True:
            await self._answer(await self._in_turn.get())

    async def _answer(self, message: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"id": message["id"]}
        try:
            answer["ok"] = await getattr(self, f"_{message['do']}")(message)
        except RecallError as error:
            answer |= {"error": type(error).__name__, "text": str(error)}
        except Exception as error:
            log.exception("%s failed", message["do"])
            answer |= {"error": type(error).__name__, "text": f"{message['do']} failed: {error!r}"}
        self._writer.write(line_of(answer))

    async def _start(self, message: dict[str, Any]) -> dict[str, str]:
        config = _configured(message)
        self._drain_seconds = config.server.drain_seconds
        self._store = SnapshotStore(config.store.path)
        began = time.monotonic()
        state: State | None = await asyncio.to_thread(self._stack.enter_context, open_state(config))
        replica = await asyncio.to_thread(
            Replica.open_release, config, self._store, message["release"], state
        )
        loaded = time.monotonic()
        server = Server(config, replica, state, shared_port=True)
        await server.warm()
        # What is there now stays: a full collection that looked through it would hold up everybody for 0.1 s and more.
        gc.collect()
        gc.freeze()
        self._server = server
        log.info("loaded in %.1f s, warmed up in %.1f s", loaded - began, time.monotonic() - loaded)
        return {"release": server.release}

    async def _listen(self, message: dict[str, Any]) -> dict[str, int]:
        port = await self._serving().listen()
        kernels.watch()
        return {"port": port}

    async def _ping(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._server is not None:
            await self._server.alive()
        return {}

    async def _metrics(self, message: dict[str, Any]) -> dict[str, str]:
        server = self._serving()
        return {"text": (await asyncio.to_thread(generate_latest, server.metrics.registry)).decode()}

    async def _prepare(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._store is not None
        await self._serving().prepare(self._store, message["release"])
        return {}

    async def _swap(self, message: dict[str, Any]) -> dict[str, str]:
        await self._serving().swap()
        return {"release": self._serving().release}

    async def _abandon(self, message: dict[str, Any]) -> dict[str, Any]:
        self._serving().abandon()
        return {}

    def _serving(self) -> Server:
        if self._server is None:
            raise RecallError("the worker has not started")
        return self._server


def _configured(message: dict[str, Any]) -> Config:
    """Return the supervisor's configuration: its file as it was, and what the command line and the supervisor set."""
    config = parse_config(tomllib.loads(message["config"]))
    changes: dict[str, Any] = {
        "server": type(config.server).model_validate(message["server"]),
        "store": config.store.model_copy(update={"path": Path(message["store"])}),
    }
    if message["state_url"]:
        changes["state"] = config.state.model_copy(update={"url": message["state_url"]})
    return config.model_copy(update=changes)


async def _run(control: socket.socket) -> None:
    reader, writer = await connect(control)
    await Worker(reader, writer).run()
    # At once: a thread that hangs, or still loads a release, must not keep the process.
    logging.shutdown()
    os._exit(0)


def main() -> None:
    """Run a worker; its arguments are the descriptor of its control channel and its number."""
    descriptor, number = sys.argv[1:]
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s [worker {number}] %(name)s: %(message)s",
    )
    control = socket.socket(fileno=int(descriptor))
    control.set_inheritable(False)
    asyncio.run(_run(control))


if __name__ == "__main__":
    main()

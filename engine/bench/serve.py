"""`recall bench serve`: what one server worker on one core does under load, and where its time goes.

The worker is a process of its own on the first core; the client, and where there are only two cores the state store too,
run on the second. In each round the echo, the worker and, where asked for, the baseline take their turn under the same
client, so that what the machine does meanwhile meets all of them.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from recall.v1 import recall_pb2 as pb

from engine.bench import h2load
from engine.bench.echo import ECHO
from engine.bench.http2 import Load, Samples
from engine.bench.population import ACTIVE_SHARE, ASKING_SHARE, Active, draw_active, fill, messages
from engine.bench.processes import (
    RECALL,
    Running,
    baseline,
    cores,
    drive,
    echo,
    pinned,
    plain_redis,
    server,
)
from engine.bench.profile import flame_graph, places, read_stacks, record, switches, thread_seconds, weighed
from engine.bench.report import circumstances, spread
from engine.bench.sentinel import Sentinel
from engine.bench.world import World
from engine.config import DegradeStep, SceneConfig
from engine.core.channel import Progress
from engine.core.errors import ConfigError
from engine.data.catalogue import Catalogue
from engine.data.live import LiveCatalogue
from engine.online.state import open_state

IN_FLIGHT = 32
"""Two batches: what the limit on requests in flight does not fall below while nobody is refused, so that nobody is."""

CONNECTIONS = 8
STEPS = (1, 4, 16, 32, 64)
"""Requests in flight at which throughput is measured besides."""

OVERLOAD = 3.0
DEGRADING = "degrading"
"""The scene that is the default one with these steps:"""

DEGRADE_STEPS = (
    DegradeStep(at=0.9, limit=0.5, without=("similar_authors",)),
    DegradeStep(at=0.97, limit=0.25, without=("similar_authors", "interacted_authors", "usercf")),
)
"""Half of the candidates without the dearest channel, then a quarter without the three dearest."""

KERNEL_REQUESTS = 2000
_EXPORT_SECONDS = 300.0
GRPC_CORE = "gRPC's core"
"""What the threads that gRPC's C core starts are called together."""

_POOL = 20_000
"""Messages that the client chooses from."""


@dataclass(frozen=True)
class Settings:
    """How long and how much.

    Attributes:
        limit: candidates asked for.
        seconds: of each measurement.
        rounds: how often; medians and extremes are over these.
        with_baseline: whether the baseline takes part.
        in_flight: requests unanswered at any time at saturation.
        steps: other numbers of requests in flight to measure throughput at, once each.
        profile: a folder for the profile of the worker at saturation; None: there is none.
        compiled: whether h2load takes part, where it is installed.
    """

    limit: int = 500
    seconds: float = 10.0
    rounds: int = 5
    with_baseline: bool = False
    in_flight: int = IN_FLIGHT
    steps: Sequence[int] = STEPS
    profile: Path | None = None
    compiled: bool = True

    @property
    def warm_up(self) -> float:
        """Seconds before each measurement."""
        return min(1.0, self.seconds / 4)


def bench_serve(world: World, settings: Settings, folder: Path, progress: Progress) -> dict[str, Any]:
    """Serve a world and measure it; docs/performance.md says what each number of the report is.

    Args:
        world: what is served.
        settings: how long and how much.
        folder: empty; the embedded state store keeps its data there.
        progress: told of each measurement.

    Raises:
        ConfigError: this machine has one core alone, or the baseline cannot serve this world.
        RecallError: a process does not start or fails.
    """
    own = world.config.model_copy(
        update={
            "store": world.config.store.model_copy(update={"path": folder}),
            "state": world.config.state.model_copy(update={"url": ""}),
            "server": world.config.server.model_copy(
                update={"host": "127.0.0.1", "port": 0, "metrics_port": 0}
            ),
            "scenes": world.config.scenes | {DEGRADING: degrading(world.config.scenes["default"])},
        }
    )
    world = World(own, world.store, world.versions, world.now)
    server_core, client_core, store_core = cores()
    with ExitStack() as stack:
        stack.callback(_put_back, os.environ.pop("RECALL_STATE_URL", None))
        with pinned(
            store_core
        ):  # the store starts here, not in the worker, so that it is not on the worker's core
            state = stack.enter_context(open_state(own))
        assert state is not None
        snapshots = world.snapshots()
        catalogue = LiveCatalogue.of(Catalogue.load(snapshots["catalogue"].arrays))
        active = draw_active(catalogue)
        fill(state, catalogue, active, world.now, own.state.exposure.slice_seconds, progress)
        progress.start("starting the servers", 2 + settings.with_baseline)
        asked = messages(catalogue, active, settings.limit, world.now, _POOL, seed=7)
        worker = stack.enter_context(server(world, server_core))
        progress.advance()
        probe = drive(
            _load(worker, RECALL, asked, 4, settings.warm_up, settings.seconds / 4), client_core, _nothing
        )
        if not probe.answered.any():
            raise ConfigError("the server answers nothing; its log stands above")
        size = round(float(probe.sizes[probe.answered].mean())) - 5  # without gRPC's prefix
        echoing = stack.enter_context(echo(size, server_core))
        progress.advance()
        plain = None
        if settings.with_baseline:
            url = stack.enter_context(plain_redis(store_core))
            _export(world, active, url)
            plain = stack.enter_context(baseline(url, server_core))
            progress.advance()
        bench = _Bench(settings, client_core, asked, worker, echoing, plain, progress)
        report = circumstances() | {
            "items": len(catalogue.items),
            "users": len(catalogue.users),
            "active_share": ACTIVE_SHARE,
            "asking_share": ASKING_SHARE,
            "channels": list(own.scenes["default"].quotas),
            "limit": settings.limit,
            "answer_bytes": size,
            "seconds": settings.seconds,
            "rounds": settings.rounds,
            "in_flight": settings.in_flight,
            "connections": CONNECTIONS,
            "cores": {"server": server_core, "client": client_core, "store": store_core},
            "h2load": h2load.version() if h2load.installed() else "",
        }
        report |= bench.measure()
        measured: dict[str, Any] = _without_nan(report)
        return measured


class _Bench:
    """The measurements, one after the other, over servers that all run."""

    def __init__(
        self,
        settings: Settings,
        core: int,
        asked: list[bytes],
        worker: Running,
        echoing: Running,
        plain: Running | None,
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._core = core
        self._asked = asked
        self._worker = worker
        self._echo = echoing
        self._plain = plain
        self._progress = progress

    def measure(self) -> dict[str, Any]:
        settings = self._settings
        compiled = settings.compiled and h2load.installed()
        rounds: dict[str, list[float]] = {}
        per_round = 3 + 2 * compiled + (self._plain is not None)
        self._progress.start("rounds", settings.rounds * per_round)
        for number in range(settings.rounds):
            self._round(number, rounds, compiled)
        report: dict[str, Any] = {}
        for name, values in rounds.items():
            report |= spread(
                name, values, 3 if name.endswith("_ms") or "share" in name or "over" in name else 1
            )
        report["rss_mb"] = round(self._worker.resident_mb(), 1)
        report["concurrency"] = self._concurrency()
        report |= self._at_rates()
        report["kernels"] = self._kernels(report)
        if settings.profile is not None:
            report["profile"] = self._profile(settings.profile)
        return report

    def _profile(self, folder: Path) -> dict[str, Any]:
        """Saturate once more with py-spy at the worker; leaves `flame.svg` and `stacks.txt` in the folder.

        Returns:
            Microseconds of processor time per request: `threads` by name, those of gRPC's core together, and `places`,
            py-spy's samples of the Python threads scaled to the processor time of these.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._progress.start("profile", 1)
        stacks_file, used = folder / "stacks.txt", list[dict[int, tuple[str, float]]]()
        sampler = record(self._worker.pid, self._settings.warm_up + self._settings.seconds, stacks_file)
        load = _load(
            self._worker,
            RECALL,
            self._asked,
            self._settings.in_flight,
            self._settings.warm_up,
            self._settings.seconds,
        )
        left: list[int] = []

        def mark() -> None:
            used.append(thread_seconds(self._worker.pid))
            left.append(switches(self._worker.pid))

        samples = drive(load, self._core, mark)
        sampler.wait(60)
        self._progress.advance()
        names = self._worker.ask("threads")
        spent = {
            number: (after - used[0].get(number, ("", 0.0))[1]) / max(samples.completed, 1) * 1e6
            for number, (_, after) in used[1].items()
        }
        threads: dict[str, float] = {}
        for number, microseconds in spent.items():
            name = names.get(number, GRPC_CORE)
            threads[name] = threads.get(name, 0.0) + microseconds
        sampled = read_stacks(stacks_file)
        stacks = weighed(sampled, spent)
        (folder / "flame.svg").write_text(flame_graph(stacks), encoding="utf-8")
        return {
            "requests": samples.completed,
            "switches": round((left[1] - left[0]) / max(samples.completed, 1), 1),
            "samples": int(sum(sum(mine.values()) for mine in sampled.values())),
            "threads": {name: round(each, 1) for name, each in threads.items() if each >= 0.05},
            "places": {name: round(each, 1) for name, each in places(stacks).items()},
        }

    def _round(self, number: int, rounds: dict[str, list[float]], compiled: bool) -> None:
        def note(name: str, value: float) -> None:
            rounds.setdefault(name, []).append(value)

        echo_samples, echo_cpu = self._saturate(self._echo, ECHO, number)
        note("echo_requests_per_s", echo_samples.rate)
        note("echo_cpu_us", echo_cpu)
        before = self._worker.ask("counts")
        samples, cpu = self._saturate(self._worker, RECALL, number)
        after = self._worker.ask("counts")
        note("requests_per_s", samples.rate)
        note("server_cpu_us", cpu)
        note(
            "batch_mean", _ratio(after["requests"] - before["requests"], after["batches"] - before["batches"])
        )
        note("blind_share", _ratio(after["blind"] - before["blind"], after["batches"] - before["batches"]))
        for name, value in samples.percentiles().items():
            note(name, value)
        note("refused_share", 1 - float(samples.answered.mean()) if samples.answered.size else 1.0)
        kernels, clocked_cpu = self._clocked(number)
        note("kernels_us", kernels)
        note("glue_us", clocked_cpu - echo_cpu - kernels)
        ceiling, native_echo_cpu = echo_samples.rate, math.inf
        if compiled:
            native, native_echo_cpu = self._h2load(self._echo, ECHO, number)
            note("h2load_echo_requests_per_s", native.rate)
            note("h2load_echo_cpu_us", native_echo_cpu)
            # The ceiling is what the server can do: the client that gets more out of it says so.
            ceiling = max(ceiling, native.rate)
            native, native_cpu = self._h2load(self._worker, RECALL, number)
            note("h2load_requests_per_s", native.rate)
            note("h2load_server_cpu_us", native_cpu)
            for name, value in native.percentiles().items():
                note(f"h2load_{name}", value)
        note("share_of_echo", _ratio(samples.rate, ceiling))
        note("share_of_echo_by_cpu", _ratio(min(echo_cpu, native_echo_cpu), cpu))
        if self._plain is not None:
            plain, plain_cpu = self._saturate(self._plain, RECALL, number)
            note("baseline_requests_per_s", plain.rate)
            note("baseline_cpu_us", plain_cpu)
            note("baseline_p99_ms", plain.percentiles()["p99_ms"])
            note("over_baseline", _ratio(samples.rate, plain.rate))
            note("over_baseline_by_cpu", _ratio(plain_cpu, cpu))

    def _saturate(self, target: Running, path: str, number: int) -> tuple[Samples, float]:
        settings = self._settings
        load = _load(
            target, path, self._asked, settings.in_flight, settings.warm_up, settings.seconds, seed=number
        )
        return self._timed(target, lambda mark: drive(load, self._core, mark))

    def _clocked(self, number: int) -> tuple[float, float]:
        """Saturate the worker with a clock around every kernel; returns CPU time per request, us: kernels, and all.

        Kernels are timed where they work, between the threads of the server and beside the client: in a loop of their
        own they have the caches to themselves, and what a busy machine adds would be taken for glue.
        """
        marks: list[float] = []
        spent: dict[str, tuple[float, int]] = {}

        def mark() -> None:
            nonlocal spent
            spent = self._worker.ask("clocks", not marks)
            marks.append(self._worker.cpu())

        settings = self._settings
        load = _load(
            self._worker,
            RECALL,
            self._asked,
            settings.in_flight,
            settings.warm_up,
            settings.seconds,
            seed=number,
        )
        samples = drive(load, self._core, mark)
        self._progress.advance()
        kernels = sum(seconds for seconds, _ in spent.values())
        return (
            _ratio(kernels * 1e6, samples.completed),
            _ratio((marks[1] - marks[0]) * 1e6, samples.completed),
        )

    def _h2load(self, target: Running, path: str, number: int) -> tuple[Samples, float]:
        settings = self._settings
        first = number * h2load.PROCESSES
        few = self._asked[first : first + h2load.PROCESSES]

        def run(mark: Callable[[], None]) -> Samples:
            with pinned(self._core):
                return h2load.send(
                    target.port, path, few, settings.in_flight, settings.seconds, settings.warm_up, mark
                )

        return self._timed(target, run)

    def _timed(self, target: Running, run: Callable[[Callable[[], None]], Samples]) -> tuple[Samples, float]:
        """Run a load; returns the samples and the target's CPU time per answered request, in microseconds."""
        used: list[float] = []
        samples = run(lambda: used.append(target.cpu()))
        self._progress.advance()
        return samples, _ratio((used[1] - used[0]) * 1e6, samples.completed)

    def _concurrency(self) -> list[dict[str, float]]:
        """Throughput against requests in flight, a shorter measurement each."""
        settings, rows = self._settings, []
        self._progress.start("concurrency", len(settings.steps))
        for n in settings.steps:
            before = self._worker.ask("counts")
            load = _load(self._worker, RECALL, self._asked, n, settings.warm_up, settings.seconds / 2)
            samples, cpu = self._timed(self._worker, lambda mark, load=load: drive(load, self._core, mark))  # type: ignore[misc]
            after = self._worker.ask("counts")
            batch = _ratio(after["requests"] - before["requests"], after["batches"] - before["batches"])
            row = {"in_flight": n, "requests_per_s": samples.rate, "server_cpu_us": cpu, "batch_mean": batch}
            rows.append({name: round(value, 2) for name, value in (row | samples.percentiles()).items()})
        return rows

    def _at_rates(self) -> dict[str, Any]:
        """Half of saturation, three times of it, and that of a scene with steps of degrading; in open loops, in turns.

        Saturation is measured in each round anew: how fast the machine is changes from minute to minute.
        """
        # Messages written one behind the other are one message.
        scene = pb.RecallRequest(scene=DEGRADING).SerializeToString()
        loads = {
            "half": (0.5, self._asked),
            "overload": (OVERLOAD, self._asked),
            DEGRADING: (OVERLOAD, [each + scene for each in self._asked]),
        }
        self._progress.start("open loop", (1 + len(loads)) * self._settings.rounds)
        found: dict[str, list[float]] = {}
        for number in range(self._settings.rounds):
            saturation = self._saturate(self._worker, RECALL, number)[0].rate
            found.setdefault("saturation_per_s", []).append(saturation)
            for name, (times, asked) in loads.items():
                measured = self._at_rate(times * saturation, asked, number)
                measured["goodput_share"] = _ratio(measured["answered_per_s"], saturation)
                for key, value in measured.items():
                    found.setdefault(f"{name}_{key}", []).append(value)
        report: dict[str, Any] = {}
        for key, values in found.items():
            report |= spread(key, values, 4 if key.endswith("share") else 2)
        turns = zip(found["half_stolen_percent"], found["half_p99_ms"], strict=True)
        report["half_turns"] = [
            {"stolen_percent": stolen, "p99_ms": round(p99, 2)} for stolen, p99 in sorted(turns)
        ]
        return report

    def _at_rate(self, rate: float, asked: list[bytes], number: int) -> dict[str, float]:
        settings = self._settings
        load = _load(
            self._worker,
            RECALL,
            asked,
            0,
            settings.warm_up,
            settings.seconds,
            seed=number,
            rate=max(1.0, rate),
        )
        with Sentinel() as machine:
            samples, cpu = self._timed(self._worker, lambda mark: drive(load, self._core, mark))
        time.sleep(settings.warm_up)
        due = samples.waits.size
        sizes = samples.sizes[samples.answered]
        gap, stolen = (machine.findings[name] for name in ("largest_host_gap_ms", "cpu_stolen_percent"))
        return {
            "offered_per_s": due / samples.seconds,
            "answered_per_s": samples.rate,
            "answered_share": _ratio(float(samples.answered.sum()), due),
            "answer_bytes": float(sizes.mean()) - 5 if sizes.size else math.nan,
            "server_cpu_us": cpu,
            "p99_from_sent_ms": samples.p99_from_sent_ms(),
            "client_late_ms": samples.late * 1e3,
            "host_gap_ms": math.nan if gap is None else gap,
            "stolen_percent": math.nan if stolen is None else stolen,
        } | samples.percentiles()

    def _kernels(self, report: dict[str, Any]) -> dict[str, Any]:
        self._progress.start("kernels", 1)
        batch = max(1, round(report["batch_mean"]))
        count = min(KERNEL_REQUESTS, max(40, int(200 * self._settings.seconds)))
        count = -(-count // (5 * batch)) * 5 * batch
        chosen = [self._asked[n % len(self._asked)] for n in range(count)]
        measured: dict[str, Any] = self._worker.ask("kernels", chosen, batch)
        self._progress.advance()
        return measured


def degrading(scene: SceneConfig) -> SceneConfig:
    """Return a scene with `DEGRADE_STEPS`, as far as it has the channels that these leave out."""
    steps = [
        step.model_copy(update={"without": tuple(name for name in step.without if name in scene.quotas)})
        for step in DEGRADE_STEPS
    ]
    return scene.model_copy(update={"degrade": tuple(steps)})


def _load(
    target: Running,
    path: str,
    asked: list[bytes],
    in_flight: int,
    warm_up: float,
    seconds: float,
    seed: int = 0,
    rate: float = 0.0,
) -> Load:
    connections = CONNECTIONS if rate else min(CONNECTIONS, in_flight)
    return Load(target.port, path, asked, connections, in_flight, rate, seconds, warm_up, seed)


def _export(world: World, active: Active, url: str) -> None:
    try:
        module = importlib.import_module("loadtest.baseline")
    except ImportError as error:
        text = f"the baseline needs {error.name}: pip install 'recall-engine[pybloom]'"
        raise ConfigError(text, "--baseline") from error
    try:
        with redis.Redis.from_url(url, socket_timeout=_EXPORT_SECONDS) as connection:
            module.export(world, active, connection)
    except ValueError as error:
        raise ConfigError(f"the baseline: {error}", "--baseline") from error


def _without_nan(value: Any) -> Any:
    """Put None where nothing could be measured: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _nothing() -> None:
    pass


def _put_back(url: str | None) -> None:
    if url is not None:
        os.environ["RECALL_STATE_URL"] = url

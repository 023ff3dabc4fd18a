"""SASRec as this project trains it beside RecTools' SASRecModel: what each finds, and the CPU time of its training.

Leave-one-out: each user's newest item is looked for among all items, those the user has filtered out. Both have the
same width, blocks, heads, length, dropout, batch, step size, epochs and loss (softmax over the whole catalogue), the
same pairs in the same order, and one process with as many threads. RecTools is no part of the project's environment:
it runs in the interpreter that is named, which has `rectools[torch]`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.bench.report import circumstances
from engine.config import Config
from engine.core.channel import Progress
from engine.core.errors import BuildError
from engine.core.interactions import Interactions
from engine.core.types import Float32Array, Int32Array, RaggedRows
from engine.data.catalogue import Catalogue
from engine.data.dataset import Dataset
from engine.data.events import EventLog
from engine.models.encoded import Encoded, EncodedUsers
from engine.models.options import TrainingOptions
from engine.models.spec import ITEM_ID, Feature, ModelSpec, SequenceSpec
from engine.models.towers import UserTower
from engine.offline.metrics import ranking_metrics
from engine.offline.protocols import Split, cut

USERS = 256
"""Users who are ranked at once."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Settings:
    """What both are trained with.

    Attributes:
        width, blocks, heads, length: of the encoder.
        dropout, batch, learning_rate, epochs, seed: of the training; a batch is of users.
        k: length of the lists.
    """

    width: int = 64
    blocks: int = 2
    heads: int = 2
    length: int = 200
    dropout: float = 0.2
    batch: int = 128
    learning_rate: float = 0.001
    epochs: int = 5
    seed: int = 1
    k: int = 10


def bench_sasrec(
    config: Config,
    directory: Path,
    settings: Settings,
    rectools_python: str | None,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """Train both, rank everything, and return a report.

    Args:
        config: says which events mean interest.
        directory: a data set with times.
        settings: of both.
        rectools_python: an interpreter that has RecTools; None: ours alone.
        threads: of each training.
        progress: told of both.

    Raises:
        BuildError: PyTorch is not installed, or RecTools ends with an error.
        DatasetError: the data has no times.
    """
    dataset = Dataset.open(directory)
    catalogue = Catalogue.from_dataset(dataset)
    split = cut(config, EventLog.read(dataset, catalogue), "leave-one-out", "test")
    report: dict[str, Any] = {"settings": asdict(settings), "threads": threads, "users": split.users.size}
    report |= {"items": split.known.items, "statement": split.statement}
    lists, spent = ours(split.known, split.users, settings, threads, progress)
    report["recall_engine"] = _measured(lists, split, settings.k) | spent
    if rectools_python is not None:
        progress.start("RecTools", 1)
        lists, spent = rectools(split.known, split.users, settings, rectools_python, threads)
        progress.advance()
        report["rectools"] = _measured(lists, split, settings.k) | spent
        mine, theirs = report["recall_engine"], report["rectools"]
        report["times_as_fast"] = round(theirs["cpu_s"] / mine["cpu_s"], 2)
        for name in ("hr", "ndcg"):
            report[f"{name}_over_rectools"] = round(mine[name] / theirs[name], 3) if theirs[name] else None
    return report | circumstances()


def ours(
    known: Interactions, users: Int32Array, settings: Settings, threads: int, progress: Progress
) -> tuple[RaggedRows, dict[str, float]]:
    """Train on what is known; return the lists of some users, and the seconds of the training."""
    try:
        from engine.training.data import TrainingData
        from engine.training.trainer import train
    except ModuleNotFoundError as error:
        raise BuildError("training needs PyTorch: pip install 'recall-engine[train]'") from error
    spec = ModelSpec(
        item_features=(Feature(name=ITEM_ID, kind="id", dimension=settings.width, size=known.items + 1),),
        items=known.items,
        dimension=settings.width,
        metric="inner",
        sequence=SequenceSpec(
            kind="sasrec",
            length=settings.length,
            width=settings.width,
            blocks=settings.blocks,
            heads=settings.heads,
        ),
    )
    options = TrainingOptions(
        epochs=settings.epochs,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        loss="full_softmax",
        temperature=1.0,
        dropout=settings.dropout,
        seed=settings.seed,
    )
    nothing = np.empty((known.users, 0), np.int32)
    data = TrainingData(
        known,
        Encoded(nothing, (), nothing.astype(np.float32)),
        Encoded(
            np.arange(1, known.items + 1, dtype=np.int32)[:, None], (), np.empty((known.items, 0), np.float32)
        ),
    )
    cpu, wall = time.process_time(), time.monotonic()
    trained = train(spec, options, data, progress, threads=threads)
    spent = _spent(time.process_time() - cpu, time.monotonic() - wall, settings.epochs)
    tower = UserTower.load(spec, trained.arrays)
    vectors: Float32Array = trained.arrays["item_vectors"]
    return ranked(tower, vectors, known, users, settings.length, settings.k), spent


def ranked(
    tower: UserTower, vectors: Float32Array, known: Interactions, users: Int32Array, length: int, k: int
) -> RaggedRows:
    """Return each user's k best items by exact scores of all, those the user has left out."""
    lists = []
    for begin in range(0, users.size, USERS):
        rows = users[begin : begin + USERS]
        mine = [known.rows[known.indptr[u] : known.indptr[u + 1]] for u in rows.tolist()]
        codes = np.zeros((rows.size, length), np.int32)
        for r, each in enumerate(mine):
            newest = each[:length][::-1] + np.int32(1)
            codes[r, length - newest.size :] = newest
        lengths = np.minimum([each.size for each in mine], length).astype(np.int32)
        nothing = np.empty((rows.size, 0), np.int32)
        queries = EncodedUsers(nothing, (), nothing.astype(np.float32), codes, lengths)
        scores = tower.vectors(queries) @ vectors.T
        for r, each in enumerate(mine):
            scores[r, each] = -np.inf
        best = np.argpartition(-scores, k, 1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, best, 1), 1, kind="stable")
        lists += list(np.take_along_axis(best, order, 1).astype(np.int32))
    return RaggedRows.of(lists)


def rectools(
    known: Interactions, users: Int32Array, settings: Settings, python: str, threads: int
) -> tuple[RaggedRows, dict[str, float]]:
    """Train RecTools' SASRecModel on the same pairs in a process of its own; return as `ours`."""
    script = Path(__file__).with_name("rectools_sasrec.py")
    owners = np.repeat(np.arange(known.users), known.user_counts())
    # Newest first here; the same entries from behind are, within a user, oldest first.
    turned = np.arange(known.entries)[::-1]
    turned = turned[np.argsort(owners[turned], kind="stable")]
    with tempfile.TemporaryDirectory(prefix="recall-sasrec-") as folder:
        given, made = Path(folder) / "given.npz", Path(folder) / "made.npz"
        words = np.frombuffer(json.dumps(asdict(settings)).encode(), np.uint8)
        np.savez(given, users=owners[turned], items=known.rows[turned].astype(np.int64), settings=words)
        command = [python, "-I", "-W", "ignore", os.fspath(script), os.fspath(given), os.fspath(made)]
        environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise BuildError(f"RecTools ended with status {done.returncode}: {last}")
        with np.load(made) as arrays:
            owner, items = arrays["users"], arrays["items"]
            cpu, wall = float(arrays["cpu"]), float(arrays["wall"])
    at = np.searchsorted(owner, [users, users + 1])
    lists = [items[begin:end].astype(np.int32) for begin, end in at.T.tolist()]
    return RaggedRows.of(lists), _spent(cpu, wall, settings.epochs)


def _spent(cpu: float, wall: float, epochs: int) -> dict[str, float]:
    return {"cpu_s": round(cpu, 1), "wall_s": round(wall, 1), "cpu_s_per_epoch": round(cpu / epochs, 2)}


def _measured(lists: RaggedRows, split: Split, k: int) -> dict[str, float]:
    found = ranking_metrics(lists, split.truth, split.known.items, [k])
    return {"hr": round(found[f"hit@{k}"], 4), "ndcg": round(found[f"ndcg@{k}"], 4)}

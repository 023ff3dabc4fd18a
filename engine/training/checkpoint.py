"""A training's state on disk after each epoch, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.core.options import Options
from engine.core.types import AnyArray
from engine.models.options import Mode
from engine.models.spec import ModelSpec
from engine.training.data import TrainingData

FILE = "checkpoint.pt"


def identity(
    spec: ModelSpec,
    options: Options,
    data: TrainingData,
    start: Mapping[str, AnyArray] | None,
    mode: Mode,
) -> str:
    """Return a digest of what is trained: a checkpoint of anything else is not gone on with."""
    digest = hashlib.sha256()
    for text in (spec.model_dump_json(), options.model_dump_json(), mode, torch.__version__):
        digest.update(text.encode())
    matrices = [data.interactions] if data.rejects is None else [data.interactions, data.rejects]
    arrays: list[AnyArray] = []
    for each in matrices:
        arrays += [each.indptr, each.rows, each.timestamps]
    for encoded in (data.users, data.items):
        arrays += [encoded.codes, encoded.numbers]
        arrays += [array for many in encoded.multi for array in (many.codes, many.offsets)]
    arrays += [array for array in (data.weights, data.examples, data.clusters) if array is not None]
    arrays += [] if start is None else list(start.values())
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write the state whole or not at all: beside, synced, renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{FILE}"
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / FILE)


def load(folder: Path, wanted: str) -> dict[str, Any] | None:
    """Return the state of the same training, or None: there is none, it is of another, or it cannot be read."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ):  # whatever a damaged file makes torch raise: the run begins anew, which is right and costs time
        return None
    return state if state.get("identity") == wanted else None


def tensors(arrays: Mapping[str, AnyArray]) -> dict[str, torch.Tensor]:
    """Return arrays, which may be written to, in the form in which a state may hold them; the memory is shared."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def remove(folder: Path) -> None:
    """Forget the state: the training is done."""
    (folder / FILE).unlink(missing_ok=True)

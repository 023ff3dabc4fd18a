"""What a training learnt, beside the data that it learnt from: `CHANNEL.model.npz` in the folder of a data set.

A build of the same data with the same options takes it instead of training anew, which needs no PyTorch and no minutes.
The bundled sample has one. In the file are the arrays that the channel names, and `made_of`: uint8, a JSON object that
says what they were learnt from and how.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.errors import DatasetError
from engine.core.types import AnyArray

SUFFIX = ".model.npz"
MADE_OF = "made_of"


def write_learnt(
    folder: Path, channel: str, made_of: Mapping[str, Any], arrays: Mapping[str, AnyArray]
) -> Path:
    """Write what a channel learnt into a data set's folder, whole or not at all; the same bytes for the same arrays.

    Args:
        folder: the data set's.
        channel: its name.
        made_of: names data and options; JSON values.
        arrays: by name.

    Raises:
        DatasetError: it cannot be written.
    """
    path = folder / f"{channel}{SUFFIX}"
    text = np.frombuffer(json.dumps(made_of, sort_keys=True).encode(), np.uint8)
    beside = path.with_name(f".{path.name}")
    try:
        with beside.open("wb") as file:
            whole: dict[str, Any] = {**{name: arrays[name] for name in sorted(arrays)}, MADE_OF: text}
            np.savez_compressed(file, **whole)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DatasetError(f"cannot be written: {error.strerror}", str(path)) from error
    return path


def read_learnt(folder: Path, channel: str) -> tuple[dict[str, Any], dict[str, AnyArray]] | None:
    """Return what a channel learnt: of what, and the arrays; None where there is nothing.

    Raises:
        DatasetError: the file is damaged.
    """
    path = folder / f"{channel}{SUFFIX}"
    if not path.is_file():
        return None
    found = _read(path)
    return json.loads(bytes(found.pop(MADE_OF))), found


def learnt_channels(folder: Path) -> dict[str, dict[str, Any]]:
    """Return for each channel that something was learnt for what it was made of.

    Raises:
        DatasetError: a file is damaged.
    """
    return {
        path.name.removesuffix(SUFFIX): json.loads(bytes(_read(path)[MADE_OF]))
        for path in sorted(folder.glob(f"[!.]*{SUFFIX}"))
    }


def _read(path: Path) -> dict[str, AnyArray]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = dict(file)
        json.loads(bytes(arrays[MADE_OF]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(f"does not hold what a channel learnt: {error}", path.name) from error
    return arrays

"""What a training learnt, beside its data: written, found again, and refused where it is of something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.core.errors import DatasetError
from engine.data.learnt import learnt_channels, read_learnt, write_learnt

ARRAYS = {"user.a": np.arange(6, dtype=np.float32).reshape(2, 3), "item.b": np.arange(3)}
MADE_OF = {"dataset": "abc", "options": {"dimension": 3, "names": ["x"]}}


def test_what_is_written_is_found_again_bit_for_bit(tmp_path: Path) -> None:
    first = write_learnt(tmp_path, "two_tower", MADE_OF, ARRAYS).read_bytes()
    assert write_learnt(tmp_path, "two_tower", MADE_OF, dict(reversed(ARRAYS.items()))).read_bytes() == first
    # Tuples are lists in JSON: options are equal all the same.
    found = read_learnt(tmp_path, "two_tower", {**MADE_OF, "options": {"dimension": 3, "names": ("x",)}})
    assert found is not None
    assert {name: (array.dtype, array.tobytes()) for name, array in found.items()} == {
        name: (array.dtype, array.tobytes()) for name, array in ARRAYS.items()
    }
    assert learnt_channels(tmp_path) == {"two_tower": MADE_OF}
    assert [path.name for path in tmp_path.iterdir()] == ["two_tower.model.npz"]


def test_of_other_data_or_options_there_is_nothing(tmp_path: Path) -> None:
    assert read_learnt(tmp_path, "two_tower", MADE_OF) is None
    assert learnt_channels(tmp_path) == {}
    write_learnt(tmp_path, "two_tower", MADE_OF, ARRAYS)
    assert read_learnt(tmp_path, "two_tower", {**MADE_OF, "dataset": "abd"}) is None
    assert read_learnt(tmp_path, "other", MADE_OF) is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"\x93NUMPY"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "two_tower.model.npz").write_bytes(content)
    for read in (lambda: read_learnt(tmp_path, "two_tower", MADE_OF), lambda: learnt_channels(tmp_path)):
        with pytest.raises(DatasetError, match=r"two_tower\.model\.npz"):
            read()


def test_a_file_without_its_description_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "two_tower.model.npz", a=np.zeros(1))
    with pytest.raises(DatasetError, match="does not hold what a channel learnt"):
        learnt_channels(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be written"):
        write_learnt(tmp_path / "absent", "two_tower", MADE_OF, ARRAYS)

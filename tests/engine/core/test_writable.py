"""Views for kernels: the same memory, which may be written where it can be."""

import numpy as np

from engine.core.writable import writable


def sealed(array):
    array.flags.writeable = False
    return array


def test_of_memory_that_can_be_written_it_is_a_view_that_may_be():
    array = np.arange(5)
    view = writable(sealed(array.view())[1:])
    assert view.flags.writeable
    assert np.shares_memory(view, array)
    assert view.tolist() == [1, 2, 3, 4]


def test_of_memory_that_cannot_it_is_a_view_all_the_same():
    view = writable(np.frombuffer(b"abc", np.uint8))
    assert not view.flags.writeable
    assert bytes(view) == b"abc"


def test_it_is_of_the_plain_class(tmp_path):
    mapped = np.memmap(tmp_path / "rows", np.int32, "w+", shape=3)
    assert type(writable(mapped)) is np.ndarray

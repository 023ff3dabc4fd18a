"""Arrays as kernels are given them: of a kernel numba compiles one form for those that may be written, one for others."""

from __future__ import annotations

from engine.core.types import AnyArray


def sealed(array: AnyArray) -> AnyArray:
    """Return a read-only view, so that of a kernel one form is compiled."""
    view = array.view()
    view.flags.writeable = False
    return view

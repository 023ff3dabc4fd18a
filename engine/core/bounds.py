"""Which of many numbers reach a bound, and what bound so many reach: by comparisons side by side, without a branch."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.core.types import Float32Array, Int32Array

_WIDE = 16
"""Numbers that are compared at once."""

_HALVINGS = 24
"""After so many a span is as narrow as a float32 can tell."""

_tools: Any = cgutils


@intrinsic
def _sixteens(typingctx: Any, values: Any, begin: Any, end: Any, least: Any, out: Any) -> Any:
    """Write where values[begin:end], a multiple of 16, reach `least`; return how many do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, whole, half = ir.IntType(64), ir.IntType(32), ir.IntType(16)
        numbers, places = ir.VectorType(ir.FloatType(), _WIDE), ir.VectorType(whole, _WIDE)
        marks = ir.VectorType(ir.IntType(1), _WIDE)

        def everywhere(number: Any, of: Any) -> Any:
            nothing = ir.Constant(of, ir.Undefined)
            one = builder.insert_element(nothing, number, whole(0))
            return builder.shuffle_vector(one, nothing, ir.Constant(places, [0] * _WIDE))

        def function(result: Any, parts: list[Any], name: str) -> Any:
            return _tools.get_or_insert_function(builder.module, ir.FunctionType(result, parts), name)

        store = function(
            ir.VoidType(), [places, whole.as_pointer(), marks], f"llvm.masked.compressstore.v{_WIDE}i32"
        )
        bits_set = function(half, [half], "llvm.ctpop.i16")
        read = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        write = context.make_array(signature.args[4])(context, builder, arguments[4]).data
        bound = everywhere(arguments[3], numbers)
        steps = ir.Constant(places, list(range(_WIDE)))
        found = _tools.alloca_once_value(builder, word(0))
        with _tools.for_range_slice(builder, arguments[1], arguments[2], word(_WIDE), word) as (at, _):
            mine = builder.load(builder.bitcast(builder.gep(read, [at]), numbers.as_pointer()), align=4)
            reached = builder.fcmp_ordered(">=", mine, bound)
            here = builder.add(steps, everywhere(builder.trunc(at, whole), places))
            count = builder.load(found)
            builder.call(store, [here, builder.gep(write, [count]), reached])
            more = builder.call(bits_set, [builder.bitcast(reached, half)])
            builder.store(builder.add(count, builder.zext(more, word)), found)
        return builder.load(found)

    return types.intp(values, types.intp, types.intp, types.float32, out), generate


# To a type checker a call of an intrinsic never returns.
_places: Any = _sixteens


@njit(nogil=True, cache=True)
def reaching(values, begin, end, least, out):  # type: ignore[no-untyped-def]
    """Write the places of the numbers that reach a bound, rising.

    Args:
        values: float32[end or more], C-contiguous, without NaN.
        begin, end: which of them are looked at.
        least: float32, the bound.
        out: int32[as many as are looked at, or more], C-contiguous; filled.

    Returns:
        How many places are written.
    """
    whole = end - (end - begin) % _WIDE
    found = _places(values, begin, whole, least, out)
    for at in range(whole, end):
        if values[at] >= least:
            out[found] = at
            found += 1
    return found


def reaching_reference(values: Float32Array, begin: int, end: int, least: float) -> Int32Array:
    """The plain twin of `reaching`: int32[...]."""
    return (begin + np.flatnonzero(values[begin:end] >= least)).astype(np.int32)


@njit(nogil=True, cache=True)
def bound_of(values, count, wanted):  # type: ignore[no-untyped-def]
    """Return a number that at least `wanted` of float32[count or more] reach, and of others at most an eighth as many.

    More than these reach it where many are equal, or closer together than 2^-24 of the span of all. The span is halved
    until few do: a pass is a fraction of what selecting costs, which has to guess where each number goes.

    Args:
        values: finite, C-contiguous.
        count: how many there are.
        wanted: 1 to `count`.
    """
    bits = values.view(np.int32)
    # As whole numbers in the same order, of which the compiler compares many at a time.
    least = most = _ordered(bits[0])
    for at in range(count):
        mine = _ordered(bits[at])
        least = min(least, mine)
        most = max(most, mine)
    span = np.empty(2, np.int32)
    span[0], span[1] = _ordered(least), _ordered(most)
    low, high = span.view(np.float32)
    for _ in range(_HALVINGS):
        middle = low + (high - low) * np.float32(0.5)
        reached = np.int32(0)
        for at in range(count):
            reached = np.int32(reached + (values[at] >= middle))
        if reached < wanted:
            high = middle
        else:
            low = middle
            if reached <= wanted + wanted // 8:
                break
    return low


@njit(nogil=True, cache=True, inline="always")
def _ordered(bits):  # type: ignore[no-untyped-def]
    """Return the bits of a float32 as an int32 in the order of the numbers, and the other way round."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))

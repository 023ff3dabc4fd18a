"""Products of a few rows with matrices of numbers or bytes, compiled: a block of the result stays in registers.

What the compiler makes of a loop over columns writes every partial sum to memory and reads it again. Here as many sums as
there are registers for are kept in them, 16 side by side, from the first term to the last. Each is one chain of fused
products in the order of the terms, whatever block it is in: no row's result depends on the other rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.ann.lists import in_bytes
from engine.core.types import AnyArray, Float32Array, Int8Array, Int32Array

WIDE = 16
"""Sums side by side: matrices have a multiple of so many columns."""

_SLICE = 65_536
"""Rows that are turned into bytes at once."""


def widened(columns: int) -> int:
    """Return a number of columns, rounded up to what the kernels take."""
    return -(-columns // WIDE) * WIDE


def wide(matrix: AnyArray, fill: float = 0) -> AnyArray:
    """Return a matrix, or a vector, with columns of `fill` behind its own up to a multiple of `WIDE`: a copy."""
    made = np.full((*matrix.shape[:-1], widened(matrix.shape[-1])), fill, matrix.dtype)
    made[..., : matrix.shape[-1]] = matrix
    return made


def in_wide_bytes(vectors: Float32Array, rows: Int32Array) -> tuple[Int8Array, Float32Array]:
    """Return some rows of float32[n, e] as int8[m, e rounded up to 16], zeros behind, and float32[m], their scales."""
    codes = np.zeros((rows.size, widened(vectors.shape[1])), np.int8)
    scales = np.empty(rows.size, np.float32)
    for start in range(0, rows.size, _SLICE):
        part = slice(start, start + _SLICE)
        codes[part, : vectors.shape[1]], scales[part] = in_bytes(vectors[rows[part]])
    return codes, scales


_tools: Any = cgutils
_SUMS = ir.VectorType(ir.FloatType(), WIDE)
_WORD = ir.IntType(64)


def _data(context: Any, builder: Any, kind: Any, array: Any) -> tuple[Any, list[Any]]:
    made = context.make_array(kind)(context, builder, array)
    return made.data, _tools.unpack_tuple(builder, made.shape)


def _numbers(builder: Any, data: Any, at: Any) -> Any:
    """Load 16 numbers from a place on, bytes turned into floats."""
    of = data.type.pointee
    here = builder.bitcast(builder.gep(data, [at]), ir.VectorType(of, WIDE).as_pointer())
    loaded = builder.load(here, align=1 if isinstance(of, ir.IntType) else 4)
    if isinstance(of, ir.IntType):
        loaded = builder.sitofp(builder.sext(loaded, ir.VectorType(ir.IntType(32), WIDE)), _SUMS)
    return loaded


def _everywhere(builder: Any, number: Any) -> Any:
    """Return 16 times a number."""
    one = builder.insert_element(ir.Constant(_SUMS, ir.Undefined), number, ir.IntType(32)(0))
    same = ir.Constant(ir.VectorType(ir.IntType(32), WIDE), [0] * WIDE)
    return builder.shuffle_vector(one, ir.Constant(_SUMS, ir.Undefined), same)


def _fused(builder: Any) -> Any:
    """Return what multiplies and adds 16 numbers at once, fused where the machine can."""
    of = ir.FunctionType(_SUMS, [_SUMS] * 3)
    return _tools.get_or_insert_function(builder.module, of, f"llvm.fmuladd.v{WIDE}f32")


def _joined(builder: Any, numbers: Any, join: Any) -> Any:
    """Return one number of 16: their halves are joined until it is left."""
    size = WIDE
    while size > 1:
        size //= 2
        low, high = (
            builder.shuffle_vector(
                numbers, numbers, ir.Constant(ir.VectorType(ir.IntType(32), size), list(range(s, s + size)))
            )
            for s in (0, size)
        )
        numbers = join(low, high)
    return builder.extract_element(numbers, ir.IntType(32)(0))


@intrinsic(prefer_literal=True)
def _sums(
    typingctx: Any, x: Any, row: Any, weight: Any, column: Any, start: Any, out: Any, rows: Any, vectors: Any
) -> Any:
    """Set a block of `rows` rows and 16 x `vectors` columns of out = start + x weight; both sizes are constants."""
    high, many = rows.literal_value, vectors.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        left, (_, terms) = _data(context, builder, kinds[0], arguments[0])
        right, (_, columns) = _data(context, builder, kinds[2], arguments[2])
        begin, _ = _data(context, builder, kinds[4], arguments[4])
        to, (_, wide_out) = _data(context, builder, kinds[5], arguments[5])
        first, across = arguments[1], arguments[3]
        fused = _fused(builder)
        sums = [[_tools.alloca_once(builder, _SUMS) for _ in range(many)] for _ in range(high)]
        places = [builder.add(across, _WORD(WIDE * v)) for v in range(many)]
        for v in range(many):
            value = _numbers(builder, begin, places[v])
            for r in range(high):
                builder.store(value, sums[r][v])
        lines = [builder.mul(builder.add(first, _WORD(r)), terms) for r in range(high)]
        with _tools.for_range(builder, terms) as loop:
            term = loop.index
            down = builder.mul(term, columns)
            weights = [_numbers(builder, right, builder.add(down, place)) for place in places]
            for r in range(high):
                number = _everywhere(builder, builder.load(builder.gep(left, [builder.add(lines[r], term)])))
                for v in range(many):
                    total = builder.call(fused, [number, weights[v], builder.load(sums[r][v])])
                    builder.store(total, sums[r][v])
        for r in range(high):
            line = builder.mul(builder.add(first, _WORD(r)), wide_out)
            for v in range(many):
                at = builder.gep(to, [builder.add(line, places[v])])
                builder.store(builder.load(sums[r][v]), builder.bitcast(at, _SUMS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp, weight, types.intp, start, out, rows, vectors), generate


_block: Any = _sums


@njit(nogil=True, cache=True)
def multiply(x, weight, start, out):  # type: ignore[no-untyped-def]
    """Set out = start + x weight.

    Args:
        x: float32[n, k]; weight: float32 or int8 [k, m], m a multiple of `WIDE`; start: float32[m]; out: float32[n, m].
            All C-contiguous.
    """
    n, columns = out.shape
    row = 0
    while n - row >= 8:
        at = 0
        while columns - at >= 2 * WIDE:
            _block(x, row, weight, at, start, out, 8, 2)
            at += 2 * WIDE
        if at < columns:
            _block(x, row, weight, at, start, out, 8, 1)
        row += 8
    while n - row >= 4:
        at = 0
        while columns - at >= 2 * WIDE:
            _block(x, row, weight, at, start, out, 4, 2)
            at += 2 * WIDE
        if at < columns:
            _block(x, row, weight, at, start, out, 4, 1)
        row += 4
    while row < n:
        at = 0
        while columns - at >= 4 * WIDE:
            _block(x, row, weight, at, start, out, 1, 4)
            at += 4 * WIDE
        while at < columns:
            _block(x, row, weight, at, start, out, 1, 1)
            at += WIDE
        row += 1


def multiply_reference(x: Float32Array, weight: AnyArray, start: Float32Array) -> AnyArray:
    """The plain twin of `multiply`, in float64."""
    return start + x.astype(np.float64) @ weight.astype(np.float64)


@intrinsic
def _product(typingctx: Any, numbers: Any, table: Any, row: Any) -> Any:
    """Return the inner product of float32[e] and a row of int8 or float32 [n, e], e a multiple of `WIDE`.

    It is summed in one order for all rows. Both are C-contiguous.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, (terms,) = _data(context, builder, signature.args[0], arguments[0])
        right, _ = _data(context, builder, signature.args[1], arguments[1])
        fused = _fused(builder)
        begin = builder.mul(arguments[2], terms)
        total = _tools.alloca_once_value(builder, ir.Constant(_SUMS, [0.0] * WIDE))
        with _tools.for_range_slice(builder, _WORD(0), terms, _WORD(WIDE), _WORD) as (at, _):
            mine = _numbers(builder, left, at)
            other = _numbers(builder, right, builder.add(begin, at))
            builder.store(builder.call(fused, [mine, other, builder.load(total)]), total)
        return _joined(builder, builder.load(total), builder.fadd)

    return types.float32(numbers, table, types.intp), generate


# To a type checker a call of an intrinsic never returns.
product: Any = _product


@intrinsic
def _soften(typingctx: Any, x: Any, row: Any) -> Any:
    """See `soften`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, (_, columns) = _data(context, builder, signature.args[0], arguments[0])
        begin = builder.mul(arguments[1], columns)
        whole = ir.VectorType(ir.IntType(32), WIDE)
        fused = _fused(builder)
        rounded = _tools.get_or_insert_function(
            builder.module, ir.FunctionType(_SUMS, [_SUMS]), f"llvm.rint.v{WIDE}f32"
        )

        def same(number: float) -> Any:
            return ir.Constant(_SUMS, [float(np.float32(number))] * WIDE)

        def larger(one: Any, other: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", one, other), one, other)

        steps = _WORD(0), columns, _WORD(WIDE), _WORD
        top = _tools.alloca_once_value(builder, same(-np.inf))
        with _tools.for_range_slice(builder, *steps) as (at, _):
            mine = _numbers(builder, data, builder.add(begin, at))
            builder.store(larger(mine, builder.load(top)), top)
        largest = _everywhere(builder, _joined(builder, builder.load(top), larger))
        total = _tools.alloca_once_value(builder, same(0))
        with _tools.for_range_slice(builder, *steps) as (at, _):
            here = builder.bitcast(builder.gep(data, [builder.add(begin, at)]), _SUMS.as_pointer())
            y = builder.fsub(builder.load(here, align=4), largest)
            builder.store(y, here, align=4)
            # exp y = 2^power exp(what is left), which is at most log(2) / 2; log(2) in two parts, the first of few bits.
            y = larger(y, same(-87))
            power = builder.call(rounded, [builder.fmul(y, same(1.44269504))])
            y = builder.call(fused, [power, same(-0.693359375), y])
            y = builder.call(fused, [power, same(2.12194440e-4), y])
            z = same(1 / 720)
            for factor in (1 / 120, 1 / 24, 1 / 6, 0.5, 1, 1):
                z = builder.call(fused, [z, y, same(factor)])
            exponent = builder.add(builder.fptosi(power, whole), ir.Constant(whole, [127] * WIDE))
            scale = builder.bitcast(builder.shl(exponent, ir.Constant(whole, [23] * WIDE)), _SUMS)
            builder.store(builder.call(fused, [z, scale, builder.load(total)]), total)
        return _joined(builder, builder.load(total), builder.fadd)

    return types.float32(x, types.intp), generate


soften: Any = _soften
"""soften(x, row): take the largest of a row of float32[n, m] from all of the row, in place, and return the sum of their
exponentials then, float32, whose log is what a log-softmax still takes away. x is C-contiguous, m a multiple of `WIDE`;
columns that do not count are -inf.

An exponential is a polynomial of degree 6 in what is left beside a power of 2, relative error below 3e-7, and never less
than exp(-87). A call of the library's per number takes several times as long.
"""

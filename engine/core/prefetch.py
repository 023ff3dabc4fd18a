"""Telling the processor what will be read soon, from compiled code."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_TO_READ, _TO_STAY, _DATA = 0, 3, 1


def _prefetch(typing_context: Any, array: Any, at: Any) -> Any:
    """Return the type of a call, and what writes LLVM's `llvm.prefetch` for it."""
    del typing_context, at

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        place = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function: Any = cgutils.get_or_insert_function
        how = [number(value) for value in (_TO_READ, _TO_STAY, _DATA)]
        builder.call(function(builder.module, kind, "llvm.prefetch.p0i8"), [place, *how])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


prefetch: Any = intrinsic(_prefetch)
"""`prefetch(array, at)`: have the cache line of `array[at]` fetched. Nothing waits for it, and `at` may lie outside."""

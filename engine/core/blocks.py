"""Row blocks over threads: how builders use all cores, stay within memory, show progress and can be interrupted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from engine.core.channel import Progress

T = TypeVar("T")


def over_blocks(
    work: Callable[[int, int], T], bounds: list[tuple[int, int]], threads: int, progress: Progress, task: str
) -> Iterator[T]:
    """Run work(begin, end) for each block and yield the results in order.

    The kernels release the interpreter lock, so threads use all cores. At most 2 x threads blocks are under way or
    waiting to be taken, which bounds the memory their results hold. An exception in the consumer, Ctrl-C among them,
    cancels what has not begun.

    Args:
        work: a function of a row range.
        bounds: the ranges, in order.
        threads: how many run at once.
        progress: told of each finished block, in rows.
        task: the name shown.
    """
    progress.start(task, bounds[-1][1] if bounds else 0)
    waiting: deque[tuple[Future[T], int]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="build") as pool:
        try:
            for begin, end in bounds:
                if len(waiting) >= 2 * threads:
                    future, rows = waiting.popleft()
                    yield future.result()
                    progress.advance(rows)
                waiting.append((pool.submit(work, begin, end), end - begin))
            while waiting:
                future, rows = waiting.popleft()
                yield future.result()
                progress.advance(rows)
        finally:
            for future, _ in waiting:
                future.cancel()

"""Work that threads do ahead of whoever takes its results, in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def ahead(function: Callable[[A], B], items: Iterable[A], threads: int, depth: int) -> Generator[B, None, None]:
    """`map` in so many threads, `depth` items ahead of what was taken; the threads end with the iterator."""
    pool, started = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            started.append(pool.submit(function, item))
            if len(started) > depth:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

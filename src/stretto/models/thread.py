"""The one thread of this process in which models compute.

OpenMP keeps a team of helpers for every thread that ever computed something, and libgomp stops spinning at
barriers as soon as it manages more threads than there are cores: a second computing thread makes every pass of
a small model take 1.8 times as long (seen: 3.6 s instead of 2.0 s for 96 steps). So loading, calibrating and
serving all happen here, whoever asks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_NAME = "stretto-model"


@cache
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=_NAME)


def submit(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Queue `work(...)` on the model thread."""
    return _executor().submit(work, *args, **kwargs)


def compute(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do `work(...)` on the model thread and wait for its result; on that thread itself, do it at once."""
    if threading.current_thread().name.startswith(_NAME):
        return work(*args, **kwargs)
    return submit(work, *args, **kwargs).result()

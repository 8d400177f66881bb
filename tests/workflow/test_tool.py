"""Tools: signatures from annotations, arguments checked against them, threads and processes."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, Literal

import pytest

from stretto import workflow as wf
from stretto.core.clock import RealClock, VirtualClock, simulate_async
from stretto.core.errors import FieldError
from stretto.workflow.literals import Reference
from stretto.workflow.tasks import _name
from stretto.workflow.tool import accepts, tools_by_name

_PROCESSES = ProcessPoolExecutor(1)


@pytest.fixture(scope="module", autouse=True)
def _pool() -> Iterator[None]:
    yield
    _PROCESSES.shutdown()


@wf.tool(executor=_PROCESSES)
def process_of(name: str) -> list[Any]:
    """Says where it runs."""
    return [name, os.getpid()]


@wf.tool
def square(x: int, *, note: str = "none") -> int:
    """Multiply a number
    by itself.

    Not for the planner.
    """
    return x * x


@wf.tool(price=0.5, limit=2, name="look_up")
async def look(
    query: str, most: int | None = None, kind: Literal["web", "news"] = "web", *more: float
) -> dict[str, Any]:
    """Look it up."""
    return {"query": query, "most": most, "kind": kind, "more": more}


def test_names_descriptions_and_signatures_come_from_the_function() -> None:
    assert (square.name, square.description) == ("square", "Multiply a number by itself.")
    assert square.signature == "square(x: int, note: str = 'none') -> int"
    assert look.signature == (
        "look_up(query: str, most: int | None = None, kind: Literal['web', 'news'] = 'web', *more: float)"
        " -> dict[str, Any]"
    )
    assert (look.terms.kind, look.terms.bound, look.terms.pools) == ("look_up", 0.5, ("tools",))


def test_a_decorated_function_can_still_be_called() -> None:
    assert square(4) == 16
    assert asyncio.run(look("x"))["query"] == "x"


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "look_up needs query"),
        ((1,), {}, "query is 1; it must be str"),
        (("a", "b"), {}, r"most is 'b'; it must be int \| None"),
        (("a",), {"kind": "maps"}, "kind is 'maps'; it must be Literal"),
        (("a",), {"size": 1}, "look_up has no parameter size; it takes query, most, kind"),
        (("a",), {"query": "b"}, "look_up is given query twice"),
        (("a", 1, "web", 2.0, "x"), {}, "more is 'x'; it must be float"),
    ],
)
def test_arguments_are_checked(args: Sequence[Any], kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        look.bind(args, kwargs, {})


def test_too_many_arguments() -> None:
    with pytest.raises(TypeError, match="square takes 2 arguments, 3 are given"):
        square.bind((1, "a", 3), {}, {})


def test_arguments_as_they_arrive() -> None:
    assert look.bind(("a", 1, "news", 2, 3.5), {}, {}) == (["a", 1, "news", 2, 3.5], {})
    assert look.bind((Reference(1),), {"most": Reference(2)}, {1: [1], 2: 3}) == (["[1]"], {"most": 3})


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int, 1, True),
        (float, 1, "1"),
        (bool, True, 1),
        (list[int], [1, 2], [1, "2"]),
        (dict[str, int], {"a": 1}, {"a": "b"}),
        (list, (1,), "1"),
        (int | str, "a", 1.5),
        (None, None, 0),
        (tuple[int, ...], (1,), None),
    ],
)
def test_annotations(annotation: Any, good: Any, bad: Any) -> None:
    assert accepts(annotation, good)
    assert not accepts(annotation, bad) or annotation == tuple[int, ...], "what is not understood accepts everything"


def test_plain_functions_run_on_a_thread_or_in_place_on_virtual_time() -> None:
    @wf.tool
    def thread_of(x: int) -> str:
        """The thread it runs on."""
        return threading.current_thread().name

    async def real() -> Any:
        return await thread_of.call(RealClock(), [1], {})

    async def virtual(clock: VirtualClock) -> Any:
        return await thread_of.call(clock, [1], {})

    assert asyncio.run(real()) != threading.current_thread().name
    assert simulate_async(virtual) == threading.current_thread().name


def test_processes_find_a_decorated_function_by_its_name() -> None:
    async def main() -> Any:
        return await process_of.call(RealClock(), ["a"], {})

    name, process = asyncio.run(main())
    assert name == "a"
    assert process != os.getpid()


def test_threads_run_functions_without_a_name() -> None:
    with ThreadPoolExecutor(1) as pool:
        made = wf.Tool(name="double", description="", function=lambda x: 2 * x, parameters=(), executor=pool)

        async def main() -> Any:
            return await made.call(RealClock(), [21], {})

        assert asyncio.run(main()) == 42


def test_a_keyed_tool_hides_its_key() -> None:
    keys: list[str] = []

    @wf.tool(keyed=True, price=1.0, attempts=2, backoff_s=0.0)
    async def pay(key: str, amount: float) -> wf.Paid:
        """Pay."""
        keys.append(key)
        if len(keys) == 1:
            raise ConnectionError("lost")
        return wf.Paid("paid", amount)

    assert pay.signature == "pay(amount: float) -> Paid"

    async def main(clock: VirtualClock) -> Any:
        (done,) = await wf.execute(wf.parse_plan("1. pay(0.25)\n2. join()", ["pay"]), [pay], clock=clock, budget=1.0)
        return done.outcome

    assert simulate_async(main) == "paid"
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_what_is_no_tool() -> None:
    with pytest.raises(FieldError, match="a Python name other than join"):
        wf.tool(name="join")(lambda: None)
    with pytest.raises(FieldError, match="without \\*\\*"):

        @wf.tool
        def anything(**values: Any) -> None:
            """Takes anything."""

    with pytest.raises(FieldError, match="put @tool above"):
        tools_by_name([print])  # type: ignore[list-item]


def test_an_async_function_behind_a_plain_decorator_is_awaited() -> None:
    def logged(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @wf.tool
    @logged
    async def fetch(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    assert asyncio.run(fetch.call(RealClock(), [1], {})) == 2
    assert simulate_async(lambda clock: fetch.call(clock, [1], {})) == 2


def test_calls_are_the_same_where_their_arguments_are() -> None:
    @wf.tool
    def show(value: Any, other: Any = None) -> str:
        return repr((value, other))

    def name(*args: Any, **kwargs: Any) -> str | None:
        return _name(show, list(args), kwargs)

    assert name({1: "a"}) != name({"1": "a"})
    assert name([1]) != name((1,))
    assert len({name(1), name(True), name(1.0), name("1"), name(b"1"), name(None)}) == 6
    assert name(1, 2) == name(1, other=2) == name(other=2, value=1)
    assert name(object()) is name([{"x": object()}]) is None
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert name(deep) is None

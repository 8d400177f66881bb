"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
_LONGEST_MESSAGE = 500
_MARKS = frozenset({"body", "str", "int", "float", "bool", "dict"})


class ApiError(HTTPException):
    """An answer that says no.

    Args:
        status: of HTTP.
        message: one sentence: what is wrong and what would be right.
        param: the field of the request that is at fault, dotted.
        code: a word for programs.
        retry_after_s: when to try again, in whole seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, self.detail, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error answer."""
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message[:_LONGEST_MESSAGE], "type": kind, "param": param, "code": code}}


def error_response(error: HTTPException) -> JSONResponse:
    """The answer to a request that cannot be served."""
    if isinstance(error, ApiError):
        return JSONResponse(error.body, error.status_code, headers=error.headers)
    message = {404: "there is no such path", 405: "this path does not take this method"}.get(error.status_code)
    body = error_body(error.status_code, message or str(error.detail))
    return JSONResponse(body, error.status_code, headers=error.headers)


def invalid(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The 400 for what pydantic found, which names the field at fault, the deepest one of several."""
    deepest = max(problems, key=lambda problem: len(problem["loc"]))
    param = field_name(deepest["loc"])
    same = [str(problem["msg"]) for problem in problems if field_name(problem["loc"]) == param]
    message = ", or ".join(dict.fromkeys(text.removeprefix("Value error, ") for text in same))
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


def field_name(place: Sequence[str | int]) -> str | None:
    """The dotted field of a place in a body, without pydantic's marks for members of a union.

    >>> field_name(("body", "messages", 0, "content", "list[TextPart]", 1, "text"))
    'messages.0.content.1.text'
    """
    parts = [str(part) for part in place if isinstance(part, int) or (part.isidentifier() and part not in _MARKS)]
    return ".".join(parts) or None

"""Errors that are part of the product: what a user did wrong, where, and what would be right.

Rooms raise `ValueError` from the constructors of their values (naming the field, the value and the allowed range) and
`UserError` for everything else that a user can mend. The front door prints either as one line and exits with 2.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend, told in one line.

    Args:
        problem: what is wrong, without a full stop.
        file: the file that holds the mistake, as the user named it.
        line: the line in that file, counted from 1.
        field: the dotted path of the field, e.g. ``sampling.temperature``.
        right: what would be right: a range, a list of choices, a command.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        line: int | None = None,
        field: str | None = None,
        right: str | None = None,
    ) -> None:
        self.problem = " ".join(problem.split())
        self.file = file
        self.line = line
        self.field = field
        self.right = " ".join(right.split()) if right else None
        super().__init__(str(self))

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file and self.line else (self.file or "")
        parts = [part for part in (where, self.field) if part]
        text = ": ".join([*parts, self.problem])
        return f"{text}; {self.right}" if self.right else text

    def at(self, *, file: str | None = None, line: int | None = None, field: str | None = None) -> UserError:
        """The same mistake with its place filled in where it was not known."""
        return UserError(
            self.problem,
            file=self.file or file,
            line=self.line or line,
            field=self.field or field,
            right=self.right,
        )


class FieldError(ValueError):
    """A value that its type does not allow, raised where the value is built.

    Args:
        field: the field's name, dotted from the value that raises.
        value: what was given.
        right: what would be right.
    """

    def __init__(self, field: str, value: object, right: str) -> None:
        self.field = field
        self.value = value
        self.right = right
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(f"{field} is {shown}; it must be {right}")


def require(condition: bool, field: str, value: object, right: str) -> None:
    """Raise `FieldError` unless `condition` holds."""
    if not condition:
        raise FieldError(field, value, right)

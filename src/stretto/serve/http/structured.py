"""How a request says what its answer must look like: OpenAI's formats, vLLM's `guided_*` and `structured_outputs`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stretto.serve.grammar import JSON_OBJECT, GrammarSource
from stretto.serve.http.errors import ApiError

Schema = dict[str, Any]
Wanted = tuple[str, GrammarSource]
"""The field that asks, and what it asks for."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000, fail_fast=True)]


class NamedSchema(BaseModel):
    """A JSON schema with a name. `strict` changes nothing: a schema is always kept to."""

    model_config = ConfigDict(strict=True)

    name: Name
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of a chat answer or a completion."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise _wrong("response_format.json_schema", "send the schema with its name")
        return self

    def wanted(self) -> Wanted | None:
        """What it asks for."""
        if self.type == "json_object":
            return "response_format", JSON_OBJECT
        if self.json_schema is None or self.type == "text":
            return None
        return "response_format.json_schema.schema", GrammarSource.json_schema(self.json_schema.schema_)


class TextFormat(BaseModel):
    """The form of an answer of the Responses API."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if self.type == "json_schema":
            for name, value in (("schema", self.schema_), ("name", self.name)):
                if value is None:
                    raise _wrong(f"text.format.{name}", "send it with a json_schema")
        return self


class TextOptions(BaseModel):
    """The `text` of a request to the Responses API."""

    model_config = ConfigDict(strict=True)

    format: TextFormat | None = None

    def wanted(self) -> Wanted | None:
        """What it asks for."""
        if self.format is None or self.format.type == "text":
            return None
        if self.format.type == "json_object":
            return "text.format", JSON_OBJECT
        return "text.format.schema", GrammarSource.json_schema(self.format.schema_ or {})


class StructuredOutputs(BaseModel):
    """vLLM's field for all kinds of grammar."""

    model_config = ConfigDict(strict=True)

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def wanted(self) -> list[Wanted]:
        """What it asks for."""
        found = sources("structured_outputs.", self.json_, self.regex, self.choice, self.grammar)
        return found + [("structured_outputs.json_object", JSON_OBJECT)] * bool(self.json_object)


def sources(
    prefix: str, schema: Schema | str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> list[Wanted]:
    """What vLLM's four fields ask for, each with the name of its field."""
    found: list[Wanted] = []
    if schema is not None:
        found.append((f"{prefix}json", GrammarSource.json_schema(schema)))
    if regex is not None:
        found.append((f"{prefix}regex", GrammarSource(kind="regex", text=regex)))
    if choice is not None:
        found.append((f"{prefix}choice", GrammarSource.choice(choice)))
    if grammar is not None:
        found.append((f"{prefix}grammar", GrammarSource(kind="grammar", text=grammar)))
    return found


def the_only(wanted: list[Wanted]) -> Wanted | None:
    """The one that is asked for.

    Raises:
        ApiError: there are two.
    """
    if len(wanted) > 1:
        raise _wrong(wanted[1][0], f"an answer has one form, and {wanted[0][0]} asks for another")
    return wanted[0] if wanted else None


def _wrong(field: str, what: str) -> ApiError:
    return ApiError(400, f"{field}: {what}", param=field, code="invalid_value")

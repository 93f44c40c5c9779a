"""How commands end on a bad setting: one line on standard error, exit code 2."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pydantic
import typer

from serving.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_BAD_SETTING = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a `ConfigError`, or a value that pydantic refuses, into one line."""
    try:
        yield
    except ConfigError as error:
        sys.stderr.write(f"headrace: {error}\n")
        raise typer.Exit(EXIT_BAD_SETTING) from None
    except pydantic.ValidationError as error:
        for problem in error.errors():
            place = ".".join(map(str, problem["loc"]))
            sys.stderr.write(f"headrace: {place}: {problem['msg']}\n")
        raise typer.Exit(EXIT_BAD_SETTING) from None

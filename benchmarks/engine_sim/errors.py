"""Errors of the simulated engine, in vLLM's words (vllm/entrypoints/serve/exception_handling)."""

from __future__ import annotations


class SimError(Exception):
    """A request ends with an error; picklable like any exception with plain arguments.

    Attributes:
        status: HTTP status.
        kind: vLLM's `type`.
        message: What is wrong.
        param: Which field.
    """

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(status, kind, message, param)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param


class UnknownModel(SimError):
    """No such model or adapter."""

    def __init__(self, model: str, served: str) -> None:
        message = f"The model `{model}` does not exist. Valid aliases: {served}."
        super().__init__(404, "NotFoundError", message, "model")


class Invalid(SimError):
    """A value that is not allowed, told as vLLM's validation does."""

    def __init__(self, message: str, param: str, value: object = None) -> None:
        told = f"parameter={param}" + (f", value={value}" if value is not None else "")
        super().__init__(400, "BadRequestError", f"{message} ({told})", param)


class QueueFull(SimError):
    """Too many unfinished requests."""

    def __init__(self) -> None:
        message = (
            "The engine is currently busy and cannot accept new requests. "
            "Please try again later or on a different instance."
        )
        super().__init__(503, "Service Unavailable", message)

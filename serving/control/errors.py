"""Errors that callers of the control plane see, each with its HTTP status and OpenAI `type` and `code`.

```
ServingError (serving/errors.py)
└── ControlError
    ├── InvalidRequest 400      Unauthorised 401
    ├── NotFound 404            NoSuchRoute 404, WrongMethod 405
    ├── Conflict 409            StaleRevision 409, InUse 409
    ├── PreconditionFailed 412
    ├── TooLarge 413            WrongMediaType 415
    ├── Unprocessable 422       Unloadable 422
    └── DatabaseUnavailable 503, StoreUnavailable 503, NotLeading 503, TooBusy 503
```

Never formats HTTP: `error_answers.py` does.
"""

from __future__ import annotations

from serving.errors import ServingError


class ControlError(ServingError):
    """Root of what the control plane refuses."""

    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        if code is not None:
            self.code = code


class InvalidRequest(ControlError):
    """The request cannot be read, or a value in it is out of bounds."""

    status = 400
    code: str | None = "invalid_request"


class Unauthorised(ControlError):
    """No token, or a wrong one."""

    status = 401
    code: str | None = "invalid_token"


class NotFound(ControlError):
    """What the request names does not exist."""

    status = 404
    code: str | None = "not_found"


class Conflict(ControlError):
    """The request contradicts the state as it is."""

    status = 409
    code: str | None = "conflict"


class StaleRevision(Conflict):
    """Somebody changed it since the caller read it."""

    code: str | None = "stale_revision"


class InUse(Conflict):
    """It cannot be deleted because something points at it."""

    code: str | None = "in_use"


class PreconditionFailed(ControlError):
    """`If-Match` or `If-None-Match` does not hold."""

    status = 412
    code: str | None = "precondition_failed"


class TooLarge(ControlError):
    """A body or an upload exceeds its limit."""

    status = 413
    code: str | None = "request_too_large"


class WrongMediaType(ControlError):
    """The body's type is not one that the route takes."""

    status = 415
    code: str | None = "unsupported_media_type"


class Unprocessable(ControlError):
    """The request is well-formed but cannot be done."""

    status = 422
    code: str | None = "unprocessable"


class ServiceUnavailable(ControlError):
    """Something that the control plane needs is away; the same request may succeed later."""

    status = 503
    type = "server_error"
    retryable = True
    retry_after_s: int | None = 2


class DatabaseUnavailable(ServiceUnavailable):
    """The database does not answer."""

    code: str | None = "database_unavailable"

    def __init__(self, message: str = "The control plane's database does not answer.") -> None:
        super().__init__(message)


class StoreUnavailable(ServiceUnavailable):
    """The store of adapter files does not answer."""

    code: str | None = "store_unavailable"


class NotLeading(ServiceUnavailable):
    """Another process on the same database acts; gateways belong to that one."""

    code: str | None = "not_leading"
    retry_after_s: int | None = 1


class TooBusy(ServiceUnavailable):
    """A bound on concurrent work is reached."""

    code: str | None = "overloaded"
    retry_after_s: int | None = 1

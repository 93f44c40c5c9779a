"""Errors that a client of the gateway can see, each with its HTTP status and OpenAI `type` and `code`.

```
ServingError
├── BadRequest 400
│   ├── MalformedHttp 400        ├── ContextTooLong 400
│   └── (404, 405, 408, 413, 414, 431 are their own leaves, for their status)
├── Unauthenticated 401
├── PermissionDenied 403
├── UnknownModel 404   UnknownPath 404   NotOffered 404   UnknownResponse 404
├── NoControlPlane 404
├── MethodNotAllowed 405
├── RequestTimeout 408   BodyTooLarge 413   UriTooLong 414   HeadTooLarge 431
├── EngineRefused 4xx   what the engine said of the request, in our shape
├── NoReplica 503   AdapterLoading 503   AdapterMissing 503   AdapterUnavailable 503
├── Overloaded 503   ControlPlaneUnavailable 503
├── InternalError 500
├── UpstreamBroken 502
│   └── UpstreamLost 502
└── DeadlineExceeded 504
```

This file never formats HTTP: `serving/gateway/answers.py` writes these as bytes. A configuration
error is a `ConfigError`, which is not a `ServingError`: no client ever causes one.
"""

from __future__ import annotations


class ConfigError(Exception):
    """A setting that cannot work; the message is one line that says what to do."""


class ServingError(Exception):
    """Root of everything the gateway answers with instead of an engine's response.

    Attributes:
        message: One sentence for the client, free of paths and of engine jargon.
        status: HTTP status.
        type: OpenAI's `error.type`.
        code: OpenAI's `error.code`, or None.
        param: The request field at fault, or None.
        retryable: Whether the same request may succeed later or elsewhere.
        retry_after_s: Value of `Retry-After`, or None.
    """

    status = 500
    type = "server_error"
    code: str | None = None
    retryable = False
    retry_after_s: int | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(ServingError):
    """The request cannot be read or misses a field."""

    status = 400
    type = "invalid_request_error"


class MalformedHttp(BadRequest):
    """The bytes are not an HTTP/1.1 request that we accept."""

    code: str | None = "malformed_http"


class ContextTooLong(BadRequest):
    """Prompt, or prompt with `max_tokens`, exceeds the model's context."""

    code: str | None = "context_length_exceeded"


class Unauthenticated(ServingError):
    """No API key, or one that is not known."""

    status = 401
    type = "invalid_request_error"
    code: str | None = "invalid_api_key"


class PermissionDenied(ServingError):
    """A known key, or a caller without one, may not do this."""

    status = 403
    type = "invalid_request_error"
    code: str | None = "permission_denied"


class UnknownModel(ServingError):
    """No replica serves a model or alias of this name."""

    status = 404
    type = "invalid_request_error"
    code: str | None = "model_not_found"


class UnknownPath(ServingError):
    """No such route on this gateway."""

    status = 404
    type = "invalid_request_error"
    code: str | None = "unknown_url"


class NoControlPlane(ServingError):
    """The route is the control plane's, and this gateway has none."""

    status = 404
    type = "invalid_request_error"
    code: str | None = "no_control_plane"


class UnknownResponse(ServingError):
    """No stored response has this id, or the replica that kept it is gone."""

    status = 404
    type = "invalid_request_error"
    code: str | None = "response_not_found"


class NotOffered(ServingError):
    """The route exists, but the engine that runs this model does not offer it."""

    status = 404
    type = "invalid_request_error"
    code: str | None = "endpoint_not_offered"


class MethodNotAllowed(ServingError):
    """The route exists with another method; `allow` lists the ones that it takes."""

    status = 405
    type = "invalid_request_error"
    code: str | None = "method_not_supported"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class RequestTimeout(ServingError):
    """The client did not send its request in time."""

    status = 408
    type = "invalid_request_error"
    code: str | None = "request_timeout"


class BodyTooLarge(ServingError):
    """The request body exceeds the configured limit."""

    status = 413
    type = "invalid_request_error"
    code: str | None = "request_too_large"


class UriTooLong(ServingError):
    """The request target exceeds the configured limit."""

    status = 414
    type = "invalid_request_error"
    code: str | None = "uri_too_long"


class HeadTooLarge(ServingError):
    """Request line and headers exceed the configured limit."""

    status = 431
    type = "invalid_request_error"
    code: str | None = "headers_too_large"


class EngineRefused(ServingError):
    """The engine refused the request; the status is the engine's, the shape ours."""

    type = "invalid_request_error"

    def __init__(
        self, message: str, *, status: int, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code


class InternalError(ServingError):
    """A fault of the gateway's own; its log has the details."""

    code: str | None = "internal_error"


class NoReplica(ServingError):
    """The model is known, but no replica of it can take a request now."""

    status = 503
    code: str | None = "no_replica_available"
    retryable = True
    retry_after_s: int | None = 2


class AdapterLoading(ServingError):
    """No replica has the adapter ready yet, and the request has waited for as long as it may."""

    status = 503
    code: str | None = "adapter_loading"
    retryable = True
    retry_after_s: int | None = 5


class AdapterMissing(ServingError):
    """The engine does not have the adapter, though it should."""

    status = 503
    code: str | None = "adapter_missing"
    retryable = True
    retry_after_s: int | None = 2


class AdapterUnavailable(ServingError):
    """No replica has the adapter, and none can be given it now."""

    status = 503
    code: str | None = "adapter_unavailable"
    retryable = True
    retry_after_s: int | None = 5


class Overloaded(ServingError):
    """A bound on concurrent work is reached, here or in the engine."""

    status = 503
    code: str | None = "overloaded"
    retryable = True
    retry_after_s: int | None = 1


class ControlPlaneUnavailable(ServingError):
    """The control plane is not reachable, or broke off; inference goes on without it."""

    status = 503
    code: str | None = "control_plane_unavailable"
    retry_after_s: int | None = 2


class UpstreamBroken(ServingError):
    """The replica failed, hung up, or answered with something that is not HTTP."""

    status = 502
    code: str | None = "upstream_error"
    retryable = True


class UpstreamLost(UpstreamBroken):
    """The replica closed the connection unanswered, as one does that is killed."""


class DeadlineExceeded(ServingError):
    """The replica did not answer, or not completely, within the deadline."""

    status = 504
    code: str | None = "deadline_exceeded"
    retryable = True

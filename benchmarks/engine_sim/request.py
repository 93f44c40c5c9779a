"""What the simulated engine reads of a request, and how it refuses one, in vLLM's words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec

from benchmarks.engine_sim.errors import Invalid, SimError
from benchmarks.engine_sim.tokens import encode, encode_chat

if TYPE_CHECKING:
    from benchmarks.engine_sim.options import SimOptions
    from benchmarks.engine_sim.sequence import FinishReason

Endpoint = Literal["chat", "completion"]
Body = TypeVar("Body", bound=msgspec.Struct)

_PLACE = re.compile(r" - at `\$\.?(.*)`$")
_MAX_CHOICES = 128


class StreamOptions(msgspec.Struct):
    """Options of a streamed request."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Message(msgspec.Struct):
    """One turn of a conversation."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class _SharedFields(msgspec.Struct):
    """The fields that chat and text completions share; others are accepted and not looked at."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = 1
    ignore_eos: bool = False
    min_tokens: int = 0
    cache_salt: str | None = None
    request_id: str | None = None
    session_id: str | None = None

    def bound(self) -> int | None:
        """The request's own bound on the answer, in tokens."""
        return self.max_tokens


class ChatRequest(_SharedFields):
    """A chat completion."""

    messages: list[Message] = msgspec.field(default_factory=list)
    max_completion_tokens: int | None = None

    def prompts(self) -> list[list[int]]:
        """One: the conversation."""
        return [encode_chat([(one.role, _text(one.content)) for one in self.messages])]

    def bound(self) -> int | None:
        """`max_completion_tokens` is the newer name."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_SharedFields):
    """A text completion."""

    prompt: (
        str
        | list[str | Annotated[int, msgspec.Meta(ge=0)] | list[Annotated[int, msgspec.Meta(ge=0)]]]
        | None
    ) = None

    def prompts(self) -> list[list[int]]:
        """One of each: a text, token ids, several texts, several lists of ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [encode(prompt)]
        given = prompt or []
        if all(isinstance(one, int) for one in given):
            return [[one for one in given if isinstance(one, int)]]
        return [encode(one) if isinstance(one, str) else _ids(one) for one in given]


GenerateRequest = ChatRequest | CompletionRequest
"""What asks for an answer: has `prompts()`, the token ids of each, and `bound()`."""


class TokenizeRequest(msgspec.Struct):
    """Text or a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(msgspec.Struct):
    """Token ids."""

    tokens: list[Annotated[int, msgspec.Meta(ge=0)]]


class LoadLoraRequest(msgspec.Struct):
    """An adapter to load."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLoraRequest(msgspec.Struct):
    """An adapter to unload."""

    lora_name: str


_DECODERS: dict[type[msgspec.Struct], msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind)
    for kind in (
        ChatRequest,
        CompletionRequest,
        TokenizeRequest,
        DetokenizeRequest,
        LoadLoraRequest,
        UnloadLoraRequest,
    )
}


def decode_body(body: bytes, kind: type[Body]) -> Body:
    """A request of this kind.

    Raises:
        SimError: With status 400, if it is not one.
    """
    try:
        decoded: Body = _DECODERS[kind].decode(body)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _PLACE.search(text)
        place = f"body.{found[1]}" if found and found[1] else "body"
        raise _schema_error("value_error", place, _PLACE.sub("", text)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _schema_error("json_invalid", "body.0", f"JSON decode error: {error}") from None
    return decoded


def answer_length(
    request: GenerateRequest, num_prompt_tokens: int, options: SimOptions
) -> tuple[int, FinishReason]:
    """How long the answer will be, and why it ends there.

    Raises:
        Invalid: If prompt or bound are longer than the context.
    """
    limit = options.max_model_len
    if num_prompt_tokens >= limit:
        message = (
            f"This model's maximum context length is {limit} tokens. However, your prompt contains "
            f"{num_prompt_tokens} input tokens, which exceeds this limit even without any output "
            "tokens. Please reduce the length of the input prompt."
        )
        raise Invalid(message, "input_tokens", num_prompt_tokens)
    bound = request.bound()
    if bound is not None and bound < 1:
        raise Invalid(f"max_tokens must be at least 1, got {bound}.", "max_tokens", bound)
    if bound is not None and bound > limit:
        message = (
            f"max_tokens={bound} cannot be greater than max_model_len={limit}. Please request fewer "
            "output tokens."
        )
        raise Invalid(message, "max_tokens", bound)
    # Prompt and bound together may not fit: clamped silently, as in vLLM.
    room = min(bound or limit, limit - num_prompt_tokens)
    stops_at = max(options.answer_tokens, request.min_tokens)
    if request.ignore_eos or stops_at >= room:
        return room, "length"
    return stops_at, "stop"


def check(request: GenerateRequest) -> None:
    """Refuses what vLLM refuses.

    Raises:
        SimError: With status 400.
    """
    if request.stream_options is not None and not request.stream:
        message = "Stream options can only be defined when `stream=True`."
        raise Invalid(message, "stream_options")
    n = 1 if request.n is None else request.n
    if n < 1:
        raise SimError(400, "BadRequestError", f"n must be at least 1, got {n}.")
    if n > _MAX_CHOICES:
        message = f"n must be at most {_MAX_CHOICES}, got {n}."
        raise SimError(400, "BadRequestError", message)
    if isinstance(request, ChatRequest) and not request.messages:
        raise _schema_error("missing", "body.messages", "Field required")
    if isinstance(request, CompletionRequest) and not request.prompt:
        raise Invalid("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")


def conversation_tokens(messages: list[Message]) -> list[int]:
    """Token ids of a conversation."""
    return encode_chat([(one.role, _text(one.content)) for one in messages])


def _schema_error(kind: str, place: str, message: str) -> SimError:
    text = f"1 validation error:\n  {{'type': '{kind}', 'loc': '{place}', 'msg': '{message}'}}"
    return SimError(400, "Bad Request", text, place)


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


def _ids(prompt: int | list[int]) -> list[int]:
    return prompt if isinstance(prompt, list) else [prompt]

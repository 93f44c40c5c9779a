"""From a request's body to the model that shall answer it and what that will cost; pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from serving.engines.base import RESPONSES
from serving.errors import BadRequest, NoReplica, NotOffered, UnknownModel, UnknownResponse
from serving.gateway.endpoints import STORED_PREFIX, STORED_RESPONSE
from serving.gateway.request import read_body_fields
from serving.gateway.response_id import replica_index_of
from serving.routing.cost import estimate_tokens
from serving.routing.snapshot import Model

if TYPE_CHECKING:
    from serving.gateway.endpoints import Endpoint
    from serving.gateway.request import BodyFields
    from serving.routing.snapshot import Snapshot

_MAX_SHOWN_CHARS = 200


class Route(NamedTuple):
    """Where a request goes.

    Attributes:
        endpoint: The relayed route.
        model: As it was when the request came; attempts look its replicas up anew.
        sent_name: The body's `model`, or None.
        cost_tokens: Charged to the replica while it works.
        adds_usage: Whether we ask for a stream's usage because the client did not; the chunk that
            the engine sends for it is withheld.
        stored_target: For a stored response, the request target on the replica that keeps it.
        kept_by: Index of the replica that keeps the response which this one goes on from, or None.
    """

    endpoint: Endpoint
    model: Model
    sent_name: str | None
    cost_tokens: int
    adds_usage: bool
    stored_target: str | None = None
    kept_by: int | None = None


def resolve(endpoint: Endpoint, body: bytes, snapshot: Snapshot) -> Route:
    """Finds the model of a request.

    Args:
        endpoint: The route that it came in on.
        body: The whole body.
        snapshot: The fleet at this moment.

    Raises:
        BadRequest: If the body is not a JSON object with the right types.
        UnknownModel: If no replica serves the model.
        NotOffered: If its engine does not offer the endpoint.
        NoReplica: If the model may be served by a replica that has not been reached yet.
    """
    fields = read_body_fields(body)
    model = find_model(endpoint, fields.model, snapshot)
    before = fields.previous_response_id if endpoint.path == RESPONSES else None
    return Route(
        endpoint,
        model,
        fields.model,
        estimate_tokens(len(body), fields.max_generated_tokens, fields.num_choices),
        endpoint.injects_usage and _lacks_usage(fields),
        kept_by=None if before is None else replica_index_of(before),
    )


def resolve_stored(path: str, target: bytes, snapshot: Snapshot) -> Route:
    """Finds the replica that keeps a response, by the response's id.

    Args:
        path: `/v1/responses/{id}`, or that with `/cancel`.
        target: The same with its query.
        snapshot: The fleet at this moment.

    Raises:
        UnknownResponse: If the id is not one of ours, or its replica has left the fleet.
    """
    stored_id = path.removeprefix(STORED_PREFIX).removesuffix("/cancel")
    index = replica_index_of(stored_id)
    replica = snapshot.routable.get(index) if index is not None else None
    if replica is None:
        raise UnknownResponse(f"No response with id '{stored_id[:_MAX_SHOWN_CHARS]}' is kept here.")
    endpoint = STORED_RESPONSE
    only = {endpoint.path: (replica,)}
    model = Model("", "", {}, None, None, only, frozenset(only))
    return Route(endpoint, model, None, 1, adds_usage=False, stored_target=target.decode("latin-1"))


def _lacks_usage(fields: BodyFields) -> bool:
    if not fields.stream:
        return False
    return fields.stream_options is None or not fields.stream_options.include_usage


def find_model(endpoint: Endpoint, name: str | None, snapshot: Snapshot) -> Model:
    """The model of this name, found to offer the endpoint.

    Raises:
        BadRequest: If there is no name where one is needed.
        UnknownModel: If no replica serves it.
        NotOffered: If its engine does not offer the endpoint.
        NoReplica: If it may be served by a replica that has not been reached yet, or is an adapter
            of a base model that nobody serves.
    """
    model = _named(endpoint, name, snapshot)
    if endpoint.path not in model.offered:
        if model.adapter is not None and not model.offered:
            raise NoReplica(f"No replica serves the base model of '{model.name}'.")
        raise NotOffered(f"The engine that serves '{model.name}' does not offer {endpoint.path}.")
    return model


def _named(endpoint: Endpoint, name: str | None, snapshot: Snapshot) -> Model:
    if name is None:
        if endpoint.model_optional and snapshot.default_model is not None:
            return snapshot.default_model
        raise BadRequest("You must provide a 'model' parameter.", param="model")
    model = snapshot.models.get(name)
    if model is None:
        model = snapshot.find(name)
    if model is not None:
        return model
    shown = name[:_MAX_SHOWN_CHARS]
    if not snapshot.is_complete:
        raise NoReplica(f"No reachable replica serves '{shown}' yet; some have not been reached.")
    raise UnknownModel(
        f"The model '{shown}' does not exist. GET /v1/models lists the ones that do.", param="model"
    )

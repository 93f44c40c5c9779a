"""The gateway's own routes: models, health, readiness, metrics. No engine is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from serving.errors import UnknownModel
from serving.gateway import answers, metrics
from serving.gateway.admission import allowed_methods
from serving.gateway.endpoints import HEALTHZ, METRICS, MODELS, READYZ

if TYPE_CHECKING:
    from serving.gateway.request import Request
    from serving.gateway.worker import Worker
    from serving.routing.snapshot import Model


class LocalRoutes:
    """Answers from what the worker knows."""

    def __init__(self, worker: Worker, started_at_s: int) -> None:
        """Keeps what the answers are made from.

        Args:
            worker: Whose snapshot and tables are shown.
            started_at_s: Unix time; the `created` of every model.
        """
        self._worker = worker
        self._started_at_s = started_at_s

    def answer(self, request: Request) -> bytes:
        """The whole response to a GET or HEAD of a local route."""
        worker = self._worker
        path = request.path
        if request.method == b"OPTIONS":
            return self._options(request)
        if path == METRICS:
            text = metrics.exposition(
                worker.tables,
                worker.snapshot.replica_health,
                worker.engine_table,
                worker.adapter_tables,
            )
            return answers.answer(request, 200, text, worker.date, metrics.CONTENT_TYPE)
        if path == HEALTHZ:
            return self._json(request, 200, {"status": "ok"})
        if path == READYZ:
            return self._ready(request)
        if path == MODELS:
            models = [self._card(model) for model in worker.snapshot.models.values()]
            models += self._published_cards()
            return self._json(request, 200, {"object": "list", "data": models})
        return self._model(request)

    def _options(self, request: Request) -> bytes:
        cors = self._worker.cors
        lines = b"allow: %b\r\n" % allowed_methods(request.path).encode()
        if cors is not None and cors.is_preflight(request):
            lines += cors.preflight_lines(request)
        return answers.no_content(request, lines, self._worker.date)

    def _ready(self, request: Request) -> bytes:
        worker = self._worker
        is_ready = worker.snapshot.is_ready and not worker.is_draining
        status = "draining" if worker.is_draining else "ready" if is_ready else "waiting"
        body = {"status": status, "replicas": dict(worker.snapshot.replica_health)}
        return self._json(request, 200 if is_ready else 503, body)

    def _model(self, request: Request) -> bytes:
        name = request.model_id
        model = self._worker.snapshot.find(name)
        if model is None:
            error = UnknownModel(f"The model '{name[:200]}' does not exist.", param="model")
            return answers.error_answer(request, error, self._worker.date)
        return self._json(request, 200, self._card(model))

    def _published_cards(self) -> list[dict[str, Any]]:
        """Of aliases that resolve; versions are answered by their names, and not listed."""
        snapshot = self._worker.snapshot
        if snapshot.adapters is None:
            return []
        cards = [self._card(snapshot.find(alias)) for alias in snapshot.adapters.aliases()]
        return [card for card in cards if card]

    def _card(self, model: Model | None) -> dict[str, Any]:
        """Empty for none."""
        if model is None:
            return {}
        adapters = self._worker.snapshot.adapters
        alias = None if adapters is None else adapters.published.aliases.get(model.name)
        return {
            "id": model.name,
            "object": "model",
            "created": self._started_at_s if alias is None else alias.created_at_s,
            "owned_by": "headrace" if alias is None else alias.owner,
            "root": model.version,
            "parent": model.parent,
            "max_model_len": model.max_model_len,
        }

    def _json(self, request: Request, status: int, body: object) -> bytes:
        return answers.answer(request, status, msgspec.json.encode(body), self._worker.date)

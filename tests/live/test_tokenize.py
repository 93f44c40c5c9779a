"""`/tokenize` and `/detokenize`, through the gateway to a real vLLM."""

import pytest

pytestmark = pytest.mark.engine

TEXT = "Ein Mühlgraben führt 3 m³/s, naïve 水 🙂.\n"


def post(client, path, body):
    """OpenAI's client with a route that it does not know; its base URL ends with `/v1`."""
    return client.post(f"{client.base_url.copy_with(path=path)}", body=body, cast_to=object)


@pytest.mark.parametrize("named", ["model", "alias", None])
def test_round_trip(client, gateway, named):
    """Text comes back from its tokens, with the model's name, an alias, or none."""
    model = {} if named is None else {"model": getattr(gateway, named)}
    tokenized = post(client, "/tokenize", {**model, "prompt": TEXT})
    assert tokenized["count"] == len(tokenized["tokens"]) > 10
    back = post(client, "/detokenize", {**model, "tokens": tokenized["tokens"]})
    assert back["prompt"] == TEXT


def test_conversation(client, gateway, question):
    """A conversation is counted with its template, as a request is charged."""
    tokenized = post(client, "/tokenize", {"model": gateway.model, "messages": question})
    assert tokenized["count"] == 37

"""What `--model` may be, and what a configuration says about memory."""

import json
from pathlib import Path

import pytest

from serving.errors import ConfigError
from serving.fleet import default_model
from serving.fleet.model_source import ModelSource, kv_cache_gib, resolve

SMOLLM2 = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 8192,
}


def never(stage: str, done: float) -> None:
    pytest.fail(f"the default model was touched: {stage} {done}")


def make_model(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    return folder


def test_hugging_face_id_passes_through(tmp_path):
    """An id is the engine's to fetch, and is the public name."""
    assert resolve("Qwen/Qwen3-0.6B", tmp_path, never) == ModelSource(
        served_name="Qwen/Qwen3-0.6B", location="Qwen/Qwen3-0.6B", is_local=False
    )


def test_folder_is_served_by_its_own_name(tmp_path):
    """A local folder's name is the public name, whatever path led to it."""
    folder = make_model(tmp_path / "models" / "mine", SMOLLM2)
    found = resolve(f"{tmp_path}/models/../models/mine/", tmp_path, never)
    assert found == ModelSource(
        served_name="mine",
        location=str(folder),
        is_local=True,
        weights_bytes=100,
        kv_cache_gib=1,
    )


def test_existing_folder_beats_an_id_of_the_same_form(tmp_path, monkeypatch):
    """`org/name` that exists here is the folder, not a model on a hub."""
    make_model(tmp_path / "org" / "name", SMOLLM2)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", tmp_path, never).is_local


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gpt2", "neither smollm2-135m-instruct, nor an existing folder"),
        ("./missing", "neither"),
        ("a/b/c", "neither"),
        ("", "neither"),
        ("-x/y", "neither"),
        ("../y", "neither"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tmp_path, monkeypatch, model, message):
    """A name that is nothing is refused before anything starts."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(model, tmp_path, never)
    assert "\n" not in str(caught.value)


def test_folder_without_configuration_or_weights_is_refused(tmp_path):
    """A folder that is no whole model says what is missing."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json in it"):
        resolve(str(tmp_path / "empty"), tmp_path, never)
    (make_model(tmp_path / "bare", SMOLLM2) / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="not an adapter"):
        resolve(str(tmp_path / "bare"), tmp_path, never)
    (make_model(tmp_path / "broken", {}) / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        resolve(str(tmp_path / "broken"), tmp_path, never)


def test_file_is_refused(tmp_path):
    """A single weights file is not a model folder."""
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ConfigError, match="this is a file"):
        resolve(str(tmp_path / "m.gguf"), tmp_path, never)


@pytest.mark.parametrize(
    ("changes", "expected_gib"),
    [
        ({}, 1),
        ({"num_hidden_layers": 60, "head_dim": 128}, 3),
        ({"num_hidden_layers": 80, "num_key_value_heads": 64, "head_dim": 128}, 4),
        ({"num_key_value_heads": None}, 3),
        ({"hidden_size": "?"}, 4),
    ],
)
def test_kv_cache_holds_four_requests_of_full_length(changes, expected_gib):
    """2 x layers x KV heads x head size x 2 bytes a token, four full contexts, 1 to 4 GiB."""
    assert kv_cache_gib(SMOLLM2 | changes) == expected_gib


def test_unknown_configuration_gets_the_default_cache():
    """Without the shape of the model the cache is a guess, not a failure."""
    assert kv_cache_gib({}) == 4


def test_default_model_of_the_cache_is_used_as_it_is(tmp_path):
    """A converted model is taken from the cache without a download, with its tool parser."""
    folder = make_model(default_model.folder(tmp_path), SMOLLM2)
    manifest = {
        "name": default_model.NAME,
        "package": default_model.PACKAGE,
        "sha256": default_model.WHEEL_SHA256,
        "conversion": default_model.CONVERSION,
    }
    (folder / default_model.MANIFEST).write_text(json.dumps(manifest))
    found = resolve(default_model.NAME, tmp_path, never)
    assert (found.served_name, found.location) == ("smollm2-135m-instruct", str(folder))
    assert found.tool_call_parser == "hermes"

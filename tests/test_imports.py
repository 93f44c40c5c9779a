"""Which package may import which, held over the syntax tree; and what an install exposes."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Who may import whom, of our own packages (design: dependencies point one way).
ALLOWED = {
    "adapters": {"adapters"},
    "serving": {"serving", "adapters"},
    "training": {"training", "adapters", "serving"},
    "benchmarks": {"benchmarks", "serving", "adapters", "training"},
}
# The only part of `serving` that `training` sees is its records.
TRAINING_SEES = "serving.capture.records"
HEAVY = {"torch", "transformers", "vllm", "peft", "trl", "ray", "sglang", "tensorrt_llm"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it; relative imports are made absolute."""
    names: set[str] = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names.add(".".join((*base, node.module or "")).rstrip("."))
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_dependencies_point_one_way(package):
    """No file imports one of our packages that it may not know."""
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imported(path)
        if name.partition(".")[0] in ALLOWED.keys() - ALLOWED[package]
    }
    assert wrong == set()


def test_training_sees_only_the_records_of_serving():
    """Training reads what serving wrote down, and nothing else of it."""
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("training")
        for name in imported(path)
        if name.startswith("serving") and not name.startswith(TRAINING_SEES)
    }
    assert wrong == set()


@pytest.mark.parametrize("package", ["serving", "adapters"])
def test_serving_and_adapters_never_import_a_heavy_package(package):
    """Not even inside a function: what needs torch runs in a process of its own."""
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imported(path)
        if name.partition(".")[0] in HEAVY
    }
    assert wrong == set()


def test_tests_shadow_no_package():
    """An `__init__.py` below tests/ could hide the real `serving` from the suite."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_install_exposes_the_named_packages_only(tmp_path):
    """From elsewhere our packages import, from this clone, and no other folder of it does."""
    code = (
        "import importlib.util as u, sys;"
        "print(sorted(n for n in ('serving', 'adapters', 'training', 'benchmarks', 'tests',"
        " 'deploy', 'helm', 'docs') if u.find_spec(n)));"
        f"print({str(ROOT)!r} in sys.path);"
        "print(u.find_spec('adapters').origin)"
    )
    answer = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert answer.stdout.splitlines() == [
        "['adapters', 'benchmarks', 'serving', 'training']",
        "False",
        str(ROOT / "adapters" / "__init__.py"),
    ]


def test_unrelated_adapters_distribution_is_not_installed():
    """PyPI has a distribution named `adapters` that owns our package's import name."""
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("adapters")

"""What may import what, how long a module may be, and what an import may cost."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "airflow_provider_batchkit"
ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}

#: Values and errors: what every other module may build on.
FOUNDATION = {"model", "exceptions", "waiting", "exposure", "blocks", "keys", "prepared", "rows"}
#: One stage of the way from rows to costs each. They know the foundation, not each other.
STAGES = {"sources", "files", "templates", "requests", "shards", "results", "pricing", "polling", "budget", "schema"}
#: The parts that know Airflow.
AIRFLOW_SIDE = {"hooks", "operators", "sensors", "triggers", "decorators", "links", "lineage", "ui", "commands", "__main__"}
#: The only modules of the simulator's folder that know Airflow and the client side: the demo's drivers, which start both.
DEMO = {module for module in SOURCES if module.startswith(f"{PACKAGE}.simulator.demo")}
MAX_LINES = 450
#: What a DAG file's parse must not pay for through the engine.
HEAVY = {"airflow", "anthropic", "genai_prices", "pyarrow", "sqlalchemy"}


def part(module: str) -> str:
    """Where a module lies: ``operators`` for ``airflow_provider_batchkit.operators.batch``, nothing for the package itself."""
    return module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]


def is_ours(target: str) -> bool:
    """Whether an imported name lies in this package."""
    return target.partition(".")[0] == PACKAGE


def imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports: at its top, in functions, and for type checking alone."""
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=name, names=names, level=level):
                base = ".".join(filter(None, [*package.split(".")[: package.count(".") + 2 - level], name])) if level else name or ""
                for alias in names:
                    child = f"{base}.{alias.name}"
                    yield node.lineno, child if child in SOURCES else base
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(target)), *_]) if name in {
                "__import__",
                "import_module",
            }:
                yield node.lineno, package + target if target.startswith(".") else target


def violations(modules: list[str], allowed: set[str]) -> list[str]:
    """Each import from our own package, by one of ``modules``, of a part that is not ``allowed`` and is not the part it lies in itself."""
    return [
        f"{module}:{line} imports {target}"
        for module in modules
        for line, target in imports(module)
        if is_ours(target) and part(target) not in allowed | {part(module)}
    ]


def modules_in(parts: set[str]) -> list[str]:
    """The modules of those parts that exist."""
    return [module for module in SOURCES if part(module) in parts]


def test_the_values_and_the_errors_import_nothing_else_of_the_package() -> None:
    """``model`` may use ``exceptions``; neither knows a stage."""
    assert modules_in(FOUNDATION), "model.py and exceptions.py were not found: this test looks in the wrong place"
    assert violations(modules_in({"model", "exceptions"}), {"exceptions"}) == []


def test_a_stage_imports_only_the_values_and_the_errors() -> None:
    """Stages pass values to each other through whoever composes them, so each can be read and tested alone."""
    assert violations(modules_in(STAGES), FOUNDATION) == []


def test_the_kit_composes_stages_and_the_calls_of_the_api_alone() -> None:
    """``BatchKit`` works without a ledger, without a table to land in, and without Airflow."""
    assert violations(modules_in({"api"}), FOUNDATION | STAGES) == []
    assert violations(modules_in({"estimate", "tally"}), FOUNDATION | STAGES) == []
    assert violations(modules_in({"cancel"}), FOUNDATION | STAGES | {"api"}) == []
    assert violations(modules_in({"kit"}), FOUNDATION | STAGES | {"api", "cancel", "estimate", "scratch", "tally"}) == []


def test_ledger_and_landing_know_neither_the_kit_nor_the_package_as_a_whole() -> None:
    """They are libraries below it: one transaction holds both, and a change of the public face reaches neither."""
    found = [
        f"{module}:{line} imports {target}"
        for module in modules_in({"ledger", "landing"})
        for line, target in imports(module)
        if is_ours(target) and part(target) in {"", "kit"}
    ]
    assert found == []


def test_airflow_is_imported_only_where_airflow_is_met() -> None:
    """The engine runs and is tested without Airflow."""
    found = [
        f"{module}:{line} imports {target}"
        for module in SOURCES
        if part(module) not in AIRFLOW_SIDE and module not in DEMO
        for line, target in imports(module)
        if target.partition(".")[0] == "airflow"
    ]
    assert found == []


def test_the_engine_imports_nothing_of_the_airflow_side() -> None:
    """Else Airflow would come in through the back door."""
    engine = [module for module in SOURCES if part(module) not in AIRFLOW_SIDE | {"simulator"}]
    found = [
        f"{module}:{line} imports {target}"
        for module in engine
        for line, target in imports(module)
        if is_ours(target) and part(target) in AIRFLOW_SIDE
    ]
    assert found == []


def test_the_simulator_shares_no_code_with_the_client_side() -> None:
    """A misunderstanding of the API that both shared would never show."""
    assert violations([module for module in modules_in({"simulator"}) if module not in DEMO], set()) == []


def test_the_client_side_imports_nothing_of_the_simulator() -> None:
    """The same, the other way round; and nobody's production imports a fake."""
    client = [module for module in SOURCES if part(module) != "simulator"]
    found = [
        f"{module}:{line} imports {target}"
        for module in client
        for line, target in imports(module)
        if is_ours(target) and part(target) == "simulator"
    ]
    assert found == []


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_is_short_enough_to_read_at_once(module: str) -> None:
    """A module that grows beyond the limit does more than one thing."""
    lines = len(SOURCES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines, {MAX_LINES} at most: split it by concern"


@pytest.mark.parametrize("module", [PACKAGE, *modules_in(FOUNDATION | STAGES)])
def test_importing_the_engine_loads_nothing_heavy(module: str) -> None:
    """DAG files are parsed again and again: clients, price data and database drivers wait for their first use."""
    code = f"import sys, json, {module}; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert HEAVY & set(json.loads(result.stdout)) == set()

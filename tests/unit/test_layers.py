"""What may import what, how long a module may be, and what an import may cost."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "airflow_provider_batchkit"
ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}

#: Values, errors and the progress line: what every other module may build on.
FOUNDATION = {"model", "exceptions", "progress"}
#: What each folder may import beside the foundation. Whoever adds an edge here changes the plan of the house in CONTRIBUTING.md, too.
EDGES: dict[str, set[str]] = {
    "source": set(),
    "schema": set(),
    "request": {"source", "schema"},
    "api": {"request"},
    "cost": {"request", "api"},
    "ledger": {"request", "cost"},
    "landing": {"request", "api", "cost", "schema", "ledger"},
    "kit": {"source", "request", "api", "cost"},
    "jobs": {"source", "request", "api", "cost", "schema", "ledger", "landing", "kit"},
    "simulator": set(),
}
#: The parts that know Airflow.
AIRFLOW_SIDE = {"hooks", "operators", "sensors", "triggers", "decorators", "links", "lineage", "ui", "commands", "__main__"}
#: The public names, looked up when they are used; and what Airflow reads of the package.
FACE = {"", "get_provider_info"}
MAX_LINES = 450
#: Names with an underscore that are used and given by nobody here, and why they are no private names of another package.
ABROAD = {
    "_fields": "documented for every named tuple",
    "_replace": "documented for every named tuple",
}
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


def modules_in(parts: set[str]) -> list[str]:
    """The modules of those parts that exist."""
    return [module for module in SOURCES if part(module) in parts]


def own_imports(module: str) -> set[str]:
    """The modules of this package that a module imports, wherever in its code."""
    return {target for _, target in imports(module) if target in SOURCES} - {module}


def test_every_module_has_a_room() -> None:
    """A new folder, or a new module in the root, is a decision: it is written into the tables above."""
    assert {part(module) for module in SOURCES} <= FOUNDATION | EDGES.keys() | AIRFLOW_SIDE | FACE
    assert len([module for module, path in SOURCES.items() if path.parent.name == PACKAGE and path.name != "__init__.py"]) <= 9


@pytest.mark.parametrize("folder", sorted(EDGES))
def test_a_folder_imports_only_what_its_edges_allow(folder: str) -> None:
    """The stages know each other in one direction alone."""
    modules = modules_in({folder})
    assert modules, f"{folder} was not found: this test looks in the wrong place"
    found = [
        f"{module}:{line} imports {target}"
        for module in modules
        for line, target in imports(module)
        if is_ours(target) and part(target) not in EDGES[folder] | FOUNDATION | {folder}
    ]
    assert found == []


def test_the_values_and_the_errors_import_nothing_else_of_the_package() -> None:
    """``model`` may use ``exceptions``; neither knows a stage."""
    assert {target for module in modules_in(FOUNDATION) for target in own_imports(module)} <= {f"{PACKAGE}.exceptions"}


def test_no_module_imports_itself_over_others() -> None:
    """In a circle of imports, none can be read, tested or moved alone."""
    order = TopologicalSorter({module: own_imports(module) for module in SOURCES if SOURCES[module].name != "__init__.py"})
    try:
        order.prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_airflow_is_imported_only_where_airflow_is_met() -> None:
    """The engine runs and is tested without Airflow."""
    found = [
        f"{module}:{line} imports {target}"
        for module in SOURCES
        if part(module) not in AIRFLOW_SIDE
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


def test_the_ledgers_engine_is_used_by_the_ledger_and_the_landing_alone() -> None:
    """Others call a method of ``Ledger``. The commands hand the engine to the reading side, whose statements are in ``ledger`` as well."""
    found = [
        f"{module}:{node.lineno}"
        for module in SOURCES
        if part(module) not in {"ledger", "landing", "commands"}
        for node in ast.walk(ast.parse(SOURCES[module].read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "engine"
    ]
    assert found == []


def distribution_of(target: str) -> str:
    """The distribution that an imported module comes from, for the names that this package imports; "" for the standard library."""
    root, *below = target.split(".")
    if root in sys.stdlib_module_names or root == PACKAGE:
        return ""
    if below[:1] == ["providers"]:
        return "-".join(["apache-airflow-providers", *(below[1:3] if below[1] == "common" else below[1:2])])
    return {"airflow": "apache-airflow", "jinja2": "jinja2", "genai_prices": "genai-prices", "openlineage": "openlineage-python"}.get(
        root, root
    )


def test_every_import_is_declared() -> None:
    """What comes with something else today may be gone with its next release. What a user installs by an extra counts."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for name in extras.keys() - {"test", "browser", "dev", "bench"} for line in extras[name])]
    declared = {re.split(r"[\[<>=!~; ]", line)[0] for line in wanted}
    found = [
        f"{module}:{line} imports {target}"
        for module in SOURCES
        for line, target in imports(module)
        if distribution_of(target) not in declared | {""}
    ]
    assert found == []


def names_used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every attribute, also of those that are named by a text."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, lineno=line):
                yield line, name
            case ast.Call(
                func=ast.Name(id=caller) | ast.Attribute(attr=caller), args=[_, ast.Constant(value=str(name)), *_], lineno=line
            ) if "attr" in caller:
                yield line, name
            case ast.Subscript(value=ast.Attribute(attr="__dict__"), slice=ast.Constant(value=str(name)), lineno=line):
                yield line, name
            case ast.Compare(left=ast.Constant(value=str(name)), comparators=[ast.Attribute(attr="__dict__")], lineno=line):
                yield line, name


def names_given(tree: ast.AST) -> Iterator[str]:
    """Every name that a module defines or assigns to, also a part of one that it composes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def test_no_private_name_of_another_package_is_used() -> None:
    """Names that begin with an underscore change without notice. Whoever needs one names it in ``ABROAD``, with its reason."""
    trees = {module: ast.parse(path.read_text(), str(path)) for module, path in SOURCES.items()}
    known = {name for tree in trees.values() for name in names_given(tree)} | ABROAD.keys()
    found = [
        f"{module}:{line} {name}"
        for module, tree in trees.items()
        for line, name in names_used(tree)
        if re.match("_[a-z]", name) and name not in known
    ]
    found += [
        f"{module}:{line} imports {target}"
        for module in SOURCES
        for line, target in imports(module)
        if not is_ours(target) and re.search(r"(^|\.)_[a-z]", target)
    ]
    assert found == []


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_is_short_enough_to_read_at_once(module: str) -> None:
    """A module that grows beyond the limit does more than one thing."""
    lines = len(SOURCES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines, {MAX_LINES} at most: split it by concern"


@pytest.mark.parametrize("module", [PACKAGE, *modules_in(FOUNDATION | {"source", "schema", "request", "api", "cost"})])
def test_importing_the_engine_loads_nothing_heavy(module: str) -> None:
    """DAG files are parsed again and again: clients, price data and database drivers wait for their first use."""
    code = f"import sys, json, {module}; print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert HEAVY & set(json.loads(result.stdout)) == set()

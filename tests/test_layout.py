"""The layout: what the modules in the root import, and the map at the head of ai_service.py.

What the packages import is a contract in pyproject.toml, which `make lint` checks.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"ai_client", "ai_handover", "ai_internal", "ai_service", "providers"}


def imported(module: str) -> set[str]:
    """The top-level names that a module in the root imports, inside functions too."""
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [[node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] for node in nodes]
    return {name.partition(".")[0] for listed in names for name in listed}


@pytest.mark.parametrize(("module", "allowed"), [("ai_client", set()), ("ai_handover", {"ai_client"})])
def test_a_module_that_callers_import_needs_nothing_else_of_ours(module: str, allowed: set[str]) -> None:
    assert imported(module) & OURS == allowed


def test_the_root_shows_what_is_run_imported_and_extended() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {
        "ai_client.py",
        "ai_handover.py",
        "ai_service.py",
    }


def test_the_map_of_ai_service_names_its_sections_in_their_order() -> None:
    text = (ROOT / "ai_service.py").read_text()
    head = ast.get_docstring(ast.parse(text)) or ""
    listed = re.findall(r"^    ([A-Z][a-z ]+?)  +\S", head.partition("Sections:")[2], re.MULTILINE)
    assert listed == re.findall(r"^# ── (.+?) ─+$", text, re.MULTILINE)
    assert len(listed) == 6


def test_the_import_contract_holds_and_is_no_empty_one(tmp_path: Path) -> None:
    contract = (ROOT / "pyproject.toml").read_text().partition("[tool.importlinter]")[2]
    folders = {f"ai_internal.{path.parent.name}" for path in ROOT.glob("ai_internal/*/__init__.py")}
    modules = {f"ai_internal.{path.stem}" for path in ROOT.glob("ai_internal/*.py")}
    layers = set(re.findall(r"ai_internal\.\w+", contract))
    assert layers == (folders | modules) - {"ai_internal.__init__"}

"""The rooms of the project, and that imports between them run one way."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# what each package may use of the project; README has the same in one line
MAY_USE = {
    "sections": set(),
    "significance": {"group_counts", "store"},
    "analysis": {"config", "sections", "group_counts", "group_mapping", "significance", "store"},
    "figures": {"analysis", "group_counts"},
    "report_page": {"analysis"},
    "quantizers": {
        "evaluation", "fairness_losses", "group_counts", "sections", "significance", "store", "training",
    },
    "execution": {"config", "image_cache", "owners", "plan", "store"},
}  # fmt: skip


def imported(code: str) -> set[str]:
    """The first part of every module that is imported anywhere in `code`, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def uses() -> dict[str, set[str]]:
    """What each room, a package or a module of the root, imports of the others."""
    packages = {path.parent.name: path.parent for path in ROOT.glob("*/__init__.py")}
    files = {path.stem: [path] for path in ROOT.glob("*.py")}
    assert not packages.keys() & files.keys()
    files |= {name: sorted(folder.glob("*.py")) for name, folder in packages.items()}
    return {
        name: (set().union(*(imported(path.read_text(encoding="utf-8")) for path in paths)) & files.keys()) - {name}
        for name, paths in files.items()
    }


def test_imports_are_found_wherever_they_stand():
    code = "import a.b, c\ndef f():\n    from d.e import x\n    from . import y\nimport g as h\n"
    assert imported(code) == {"a", "c", "d", "g"}


def test_imports_run_one_way():
    """No circle, not even one hidden in a function; nothing but main.py knows of it."""
    rooms = uses()
    assert {"phases", "runner", "quantizers", "store"} <= rooms["main"] | rooms["phases"]
    try:
        list(TopologicalSorter(rooms).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert [name for name, used in rooms.items() if "main" in used] == []


@pytest.mark.parametrize("package", MAY_USE)
def test_a_package_keeps_to_its_floor(package):
    assert uses()[package] == MAY_USE[package]


def test_the_ground_floor_needs_nothing():
    rooms = uses()
    assert {name: rooms[name] for name in ("sections", "group_counts", "evaluation", "owners")} == {
        "sections": set(), "group_counts": set(), "evaluation": set(), "owners": set(),
    }  # fmt: skip
    assert "torch" not in imported((ROOT / "group_counts.py").read_text(encoding="utf-8"))

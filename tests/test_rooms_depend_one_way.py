"""What a room imports imports nothing of that room, however far away: each can be read, and tested, without those above it."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path("megatron_vespo")


def room_of(name: str) -> str:
    """`policy` of megatron_vespo.policy.model; a file beside the rooms is one of its own."""
    return name.split(".")[1]


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == PACKAGE.name:
            names |= {f"{PACKAGE.name}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith(f"{PACKAGE.name}.")}


def rooms() -> dict[str, set[str]]:
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        if path.parent == PACKAGE and path.stem == "__init__":
            continue
        room = room_of(".".join(path.with_suffix("").parts))
        graph.setdefault(room, set()).update(room_of(name) for name in imported(path))
    return {room: needed - {room} for room, needed in graph.items()}


def test_no_room_needs_itself_by_way_of_others():
    graph = rooms()
    assert len(graph) > 15
    assert (
        set(graphlib.TopologicalSorter(graph).static_order()) == graph.keys()
    )  # raises CycleError, which names the rooms


def test_what_is_pure_stays_pure():
    graph = rooms()
    assert graph["config"] <= {"errors"}
    assert graph["objective"] <= {"config", "targets", "errors"}
    assert "policy" not in graph["rollout"] and "rollout" not in graph["policy"]
    assert all(
        room == "orchestration" or "orchestration" not in needed for room, needed in graph.items() if room != "cli"
    )

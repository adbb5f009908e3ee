# SPDX-License-Identifier: Apache-2.0
"""Render the rooms of the package `blip3` and which of them import which: docs/images/imports.svg.

    python docs/import_graph.py            in an environment with the package

A room is a module or a folder of `blip3/`. Each stands one floor above the highest room that it imports, so every
arrow points down. Imports inside functions count, too.
"""

from pathlib import Path

from blip3.hub import PACKAGE, imported_files

ROOT = PACKAGE.parent
IMAGE = ROOT / "docs" / "images" / "imports.svg"
WIDTH, BOX_WIDTH, BOX_HEIGHT, FLOOR_HEIGHT, MARGIN = 960, 116, 34, 92, 24

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Name every module without `blip3.`, with its file; a folder's `__init__` has the folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def module_graph() -> Graph:
    """Give for each module the modules of the package that it imports."""
    names = {path.relative_to(ROOT).as_posix(): name for name, path in modules().items()}
    return {name: {names[file] for file in imported_files(path) if file in names} for path, name in names.items()}


def room_graph(graph: Graph) -> Graph:
    """Join the modules of each folder into one room."""
    rooms: Graph = {}
    for name, imported in graph.items():
        room = name.split(".")[0]
        rooms.setdefault(room, set()).update(other.split(".")[0] for other in imported)
    return {room: imported - {room} for room, imported in rooms.items()}


def circle_in(graph: Graph) -> list[str]:
    """Find names that import each other in a circle, the first one twice; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        for other in sorted(graph[name]) if name not in done else ():
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def floors_of(rooms: Graph) -> dict[str, int]:
    """Give each room's floor: 0 for those that import no other, else one above the highest they import."""
    floors: dict[str, int] = {}
    while len(floors) < len(rooms):
        ready = {room for room, imported in rooms.items() if room not in floors and imported <= floors.keys()}
        if not ready:
            raise ValueError(
                f"The rooms {', '.join(circle_in(rooms))} import each other but imports are expected to go one way. A "
                "function probably stands in the wrong room: move it down."
            )
        floors |= {room: 1 + max((floors[other] for other in rooms[room]), default=-1) for room in sorted(ready)}
    return floors


def render(rooms: Graph) -> str:
    """Write the rooms as SVG."""
    floors = floors_of(rooms)
    height = MARGIN * 2 + FLOOR_HEIGHT * max(floors.values()) + BOX_HEIGHT
    places = {}
    for floor in range(max(floors.values()) + 1):
        row = sorted(room for room in floors if floors[room] == floor)
        for index, room in enumerate(row):
            x = WIDTH * (index + 1) / (len(row) + 1)
            places[room] = (round(x), height - MARGIN - BOX_HEIGHT - FLOOR_HEIGHT * floor)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#8a94a6"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for room in sorted(rooms):
        for other in sorted(rooms[room]):
            (x1, y1), (x2, y2) = places[room], places[other]
            lines.append(
                f'<path d="M{x1} {y1 + BOX_HEIGHT}C{x1} {y1 + BOX_HEIGHT + 40} {x2} {y2 - 40} {x2} {y2 - 3}" '
                'fill="none" stroke="#8a94a6" marker-end="url(#tip)"/>'
            )
    for room, (x, y) in sorted(places.items()):
        lines.append(
            f'<rect x="{x - BOX_WIDTH // 2}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="#eef2f8" '
            f'stroke="#4a5a75"/><text x="{x}" y="{y + 22}" text-anchor="middle" font-size="14">{room}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Render the package as it is."""
    IMAGE.write_text(render(room_graph(module_graph())), encoding="utf-8")


if __name__ == "__main__":
    main()

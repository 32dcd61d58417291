"""What was found, kept in a file so that a check that was stopped goes on where it was, and shown as one table."""

import ast
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import lrcompress

SERVING = ("vllm_plugin", "formats", "kernels", "coding", "export", "checkpoint", "report/serving.py")
"""Of lrcompress, what results depend on: where a file of it changes, all is run again."""


@dataclass(frozen=True)
class Item:
    """One cell of the table: format `name` of a model of `architecture`, in a runtime."""

    name: str
    architecture: str
    runtime: str

    @property
    def column(self) -> str:
        return f"{self.architecture}, {self.runtime}"

    def __str__(self) -> str:
        return f"{self.architecture}/{self.name} {self.runtime}"


def digest() -> str:
    """Of the code that serves and of what checks it."""
    package = Path(lrcompress.__file__).parent
    paths = [path for part in SERVING for path in ([package / part] if "." in part else (package / part).rglob("*"))]
    paths += Path(__file__).parent.glob("*.py")
    found = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix in (".py", ".c", ".h")):
        text = path.read_text()
        found.update((ast.dump(ast.parse(text)) if path.suffix == ".py" else text).encode())  # comments do not count
    return found.hexdigest()[:16]


class Results:
    """Item to whether it is right, and what is said of it; those of other code and failures are not kept."""

    def __init__(self, path: Path) -> None:
        self.path, self.code = path, digest()
        read = json.loads(path.read_text()) if path.is_file() else {}
        self.found: dict[str, tuple[bool, str]] = {}
        if read.get("code") == self.code:
            self.found = {key: (True, said) for key, (right, said) in read["found"].items() if right}

    def __contains__(self, item: Item) -> bool:
        return str(item) in self.found

    def add(self, item: Item, right: bool, said: str) -> None:
        """Print and keep one."""
        print(f"{'  ' if right else '! '}{item}: {said}", flush=True)
        self.found[str(item)] = right, said
        self.path.write_text(json.dumps({"code": self.code, "found": self.found}, indent=1))

    def right(self, items: list[Item]) -> bool:
        """Whether all of these were run and are right."""
        return all(self.found.get(str(item), (False, ""))[0] for item in items)

    def table(self, items: list[Item]) -> str:
        """Markdown: a row a format, a column a model and a runtime."""
        columns = list(dict.fromkeys(item.column for item in items))
        lines = [["format", *columns], ["---"] * (len(columns) + 1)]
        for name in dict.fromkeys(item.name for item in items):
            cells = {item.column: self._cell(item) for item in items if item.name == name}
            lines.append([f"`{name}`", *(cells.get(column, "") for column in columns)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _cell(self, item: Item) -> str:
        right, said = self.found.get(str(item), (True, "not run"))
        return said if right else f"WRONG: {said}"

"""Rules of the house: who may import whom, and what the package may not contain."""

import ast
import graphlib
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lrcompress"
LAYERS = [
    [
        "errors",
        "budget",
        "recipe",
        "registry",
        "precision",
        "protocols",
        "parallel",
        "grams",
        "finite",
        "meta",
        "folders",
        "_autoload",
    ],
    ["linalg"],
    ["kernels"],
    ["coding"],
    ["ggml"],
    ["formats"],
    ["allocators"],
    ["bases"],
    ["methods"],
    ["model"],
    ["calibration"],
    ["checkpoint"],
    ["foreign"],
    ["report", "vllm_plugin"],
    ["evaluation"],
    ["stages"],
    ["export"],
    ["adapters", "training"],
    ["pipeline"],
    ["run", "overview", "sweep", "heal", "lm_eval", "gguf_file", "imatrix"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


@cache
def files() -> dict[Path, ast.AST]:
    found = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 100
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_a_layer_imports_only_itself_and_those_above():
    for path, tree in files().items():
        for name in imports(tree) if part(path) not in ("__init__", "__main__") else ():
            if name.startswith("lrcompress."):
                assert RANK[name.split(".")[1]] <= RANK[part(path)], f"{path} imports {name}"


def test_no_circle_of_imports():
    """Neither among the files of a room, nor by an import inside a function."""
    names = {
        ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in files()
    }
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for node in ast.walk(files()[path]):
            if isinstance(node, ast.ImportFrom) and node.module in names:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name] |= {one if one in names else node.module for one in full}
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & names.keys()
    assert sum(map(len, graph.values())) > 500
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from error


def test_files_have_at_most_300_lines():
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".c", ".h")]
    lines = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in sources}
    assert {Path(name).suffix for name in lines} == {".py", ".c", ".h"}
    assert not {name: count for name, count in lines.items() if count > 300}


def test_functions_have_at_most_60_lines():
    """Counted without the head: that of a command is the list of its options."""
    for path, tree in files().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = next((part for part in node.body if not isinstance(part, ast.Expr)), node.body[0])
                assert node.end_lineno - first.lineno < 60, f"{path}: {node.name}"


def test_mathematics_knows_no_transformers():
    for path, tree in files().items():
        if RANK.get(part(path), 99) < RANK["model"]:
            assert not any(name.split(".")[0] == "transformers" for name in imports(tree)), path


def test_no_device_literal_no_architecture_no_pickle():
    for path, tree in files().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("cuda"), path
            if isinstance(node, ast.Attribute):
                assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"
                            and node.attr in ("load", "save")), path  # fmt: skip
        assert "pickle" not in imports(tree), path


def test_nothing_says_that_the_package_is_on_an_index():
    root, found = PACKAGE.parent, []
    for suffix in ("*.md", "*.yml", "*.yaml", "*.toml", "*.html", "lrcompress/**/*.py", "tests/**/*.py"):
        found += [path for path in root.rglob(suffix) if not {".venv", ".git"} & set(path.relative_to(root).parts)]
    assert root / "README.md" in found
    for path in found:
        named = re.search(r"(pip|uv|pipx) +(install|add) [^\n`#;()]*(?<![\w/.-])lrcompress(?![\w/-])", path.read_text())
        assert named is None or path == Path(__file__), f"{path}: {named[0]}"

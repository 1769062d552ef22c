"""What a reader meets: sizes of files and functions, docstrings, comments, layers, circles, the README.

`.venv/bin/python scripts/code_figures.py` prints one line per figure. Kernels count for everything but the
length of functions; generated files do not.
"""

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median, quantiles

import grimp

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ep_rebalance", "kernels", "dashboards")
LONG, WIDE = 60, 8
"""Lines of a function, parameters of one."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    files = {path: path.read_text(encoding="utf-8") for path in sources(PACKAGES)}
    functions = [(path, node) for path, text in files.items() for node in functions_of(text)]
    lines = [len(text.splitlines()) for text in files.values()]
    lengths = [length(node) for _, node in functions]
    own = [(path, node) for path, node in functions if path.parts[len(ROOT.parts)] != "kernels"]
    figures = {
        "files, lines": f"{len(files)}, {sum(lines):,}",
        "file, median and 90 %": f"{median(lines):.0f}, {ninety(lines):.0f}",
        "function, median, 90 %, most": f"{median(lengths):.0f}, {ninety(lengths):.0f}, {max(lengths)}",
        f"functions over {LONG} lines outside kernels": listed(
            (path, node) for path, node in own if length(node) > LONG
        ),
        f"functions over {WIDE} parameters outside kernels and commands": listed(
            (path, node)
            for path, node in own
            if parameters(node) > WIDE and "commands" not in path.parts
        ),
        "functions with a docstring, public ones": docstrings(functions),
        "comments per 100 lines": f"{100 * sum(map(comments, files.values())) / sum(lines):.1f}",
        "lines of tests per line": f"{lines_of('tests') / sum(lines):.2f}",
        "modules and packages at the top": top(),
        "layers": str(len(layers())),
        "circles of imports": circle(),
        "README, words, lines": readme_size(),
        "README, words of a sentence, median and 90 %": readme_sentences(),
    }
    for name, value in figures.items():
        print(f"{name}: {value}")


def sources(folders: tuple[str, ...]) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def lines_of(folder: str) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources((folder,)))


def functions_of(text: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, Function))


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: Function) -> int:
    """Without `self` and `cls`."""
    names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return sum(name.arg not in ("self", "cls") for name in names)


def listed(functions: Iterator[tuple[Path, Function]]) -> str:
    names = [f"{path.relative_to(ROOT)}:{node.name}" for path, node in functions]
    return f"{len(names)} {' '.join(names)}".strip()


def docstrings(functions: list[tuple[Path, Function]]) -> str:
    public = [node for _, node in functions if not node.name.startswith("_")]
    return f"{share([node for _, node in functions])}, {share(public)}"


def share(functions: list[Function]) -> str:
    return f"{sum(ast.get_docstring(node) is not None for node in functions) / len(functions):.0%}"


def comments(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def ninety(values: list[int]) -> float:
    return quantiles(values, n=10)[-1]


def top() -> str:
    package = ROOT / "ep_rebalance"
    modules = list(package.glob("*.py"))
    packages = [path for path in package.iterdir() if (path / "__init__.py").exists()]
    return f"{len(modules)}, {len(packages)}"


def layers() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (rows,) = (c["layers"] for c in contracts if c.get("containers") == ["ep_rebalance"])
    return list(rows)


def circle() -> str:
    """The first one that is found, or none."""
    graph = grimp.build_graph("ep_rebalance")
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return "none"


def readme_size() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return f"{len(text.split())}, {len(text.splitlines())}"


def readme_sentences() -> str:
    """Without code blocks and tables."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith(("|", "#")))
    words = [len(part.split()) for part in re.split(r"(?<=[.:?!])\s|\n\s*[*\n]", prose)]
    counted = [count for count in words if count > 1]
    return f"{median(counted):.0f}, {ninety(counted):.0f}"


if __name__ == "__main__":
    main()

"""Budgets of size and style of the library, counted from its syntax trees; `EXCEPTIONS` lists what is over one.

`python -m tests.test_style` prints every figure.
"""

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "clex_train"
LOOP = "clex_train.training.loop"
LONGEST_FUNCTION, TYPICAL_FUNCTION, LONGEST_FILE = 50, 20, 350
LARGEST_PACKAGE, LARGEST_PACKAGES = 2000, {"evaluation": 3000}
LONGEST_IMPORT_PATH, LOOP_MODULES = 10, 60
DOCUMENTED, COMMENTS_PER_100_LINES, QUESTIONS = 0.98, 5.0, 0.03

EXCEPTIONS: dict[str, str] = {}
"""Files and packages over a budget of lines, with the reason."""

QUESTION = re.compile(r"(What|Whether|Where|Which|How|When|Who|Why)\b")
DIRECTIVE = re.compile(r"#\s*(noqa|type:|fmt:|pragma|mypy)")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """One source file with its counts."""

    path: Path
    tree: ast.Module
    num_lines: int
    code_lines: set[int] = field(default_factory=set)
    num_comments: int = 0

    @property
    def name(self) -> str:
        """Return the dotted name."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> tuple[Module, ...]:
    return tuple(read(path) for path in sorted(LIBRARY.rglob("*.py")))


def read(path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    module = Module(path, ast.parse(text), text.count("\n"))
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            module.num_comments += not DIRECTIVE.match(token.string)
        elif token.type not in layout:
            module.code_lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            module.code_lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return module


def functions() -> Iterator[tuple[str, Function]]:
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, Function):
                yield f"{module.name}:{node.name}", node


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def documented() -> Iterator[tuple[str, bool]]:
    """Yield public modules, classes, functions and methods, and whether each has a docstring."""
    for module in modules():
        if module.tree.body and not module.path.name.startswith("_"):
            yield module.name, ast.get_docstring(module.tree) is not None
        for parent in [module.tree, *(n for n in ast.walk(module.tree) if isinstance(n, ast.ClassDef))]:
            if getattr(parent, "name", "").startswith("_"):
                continue
            for node in parent.body:
                if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                    yield f"{module.name}:{node.name}", ast.get_docstring(node) is not None


def docstrings() -> list[str]:
    nodes = (node for module in modules() for node in ast.walk(module.tree))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [found for node in nodes if isinstance(node, kinds) and (found := ast.get_docstring(node))]


def imports() -> dict[str, set[str]]:
    """Map each module to the modules of the library that importing it imports."""
    known = {module.name for module in modules()}
    graph: dict[str, set[str]] = {name: set() for name in known}
    for module in modules():
        for node in module.tree.body:
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[module.name] |= {name if name in known else node.module for name in names} & known
            elif isinstance(node, ast.Import):
                graph[module.name] |= {alias.name for alias in node.names} & known
    return graph


def longest_path(graph: dict[str, set[str]]) -> list[str]:
    @cache
    def longest_below(name: str) -> tuple[str, ...]:
        return name, *max((longest_below(each) for each in graph[name] - {name}), key=len, default=())

    return list(max(map(longest_below, graph), key=len))


def reachable(graph: dict[str, set[str]], name: str) -> set[str]:
    seen: set[str] = set()
    ahead = [name]
    while ahead:
        fresh = graph[ahead.pop()] - seen
        seen |= fresh
        ahead += fresh
    return seen


def cycle(graph: dict[str, set[str]]) -> list[str]:
    return [name for name in graph if name in reachable(graph, name)]


def package_sizes() -> Counter[str]:
    sizes: Counter[str] = Counter()
    for module in modules():
        parts = module.path.relative_to(LIBRARY).parts
        if len(parts) > 1:
            sizes[parts[0]] += module.num_lines
    return sizes


def comments_per_100_lines() -> float:
    return 100 * sum(m.num_comments for m in modules()) / sum(len(m.code_lines) for m in modules())


def untyped() -> list[str]:
    missing = []
    for name, node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [each for each in (node.args.vararg, node.args.kwarg) if each]
        if node.returns is None or any(a.annotation is None for a in arguments if a.arg not in ("self", "cls")):
            missing.append(name)
    return missing


def test_public_names_have_docstrings() -> None:
    lacking = [name for name, has in documented() if not has]
    assert len(lacking) <= (1 - DOCUMENTED) * len(list(documented())), lacking


def test_every_argument_and_result_has_a_type() -> None:
    assert untyped() == []


def test_functions_are_short() -> None:
    lengths = sorted((length(node), name) for name, node in functions())
    assert lengths[int(0.9 * len(lengths))][0] <= TYPICAL_FUNCTION
    assert [each for each in lengths if each[0] > LONGEST_FUNCTION] == []


def test_files_and_packages_are_small_or_have_a_reason() -> None:
    over = {m.name: m.num_lines for m in modules() if m.num_lines > LONGEST_FILE}
    over |= {name: n for name, n in package_sizes().items() if n > LARGEST_PACKAGES.get(name, LARGEST_PACKAGE)}
    assert over.keys() == EXCEPTIONS.keys(), "a new one is split; one that is small enough leaves the list"


def test_import_paths_are_short_and_have_no_cycle() -> None:
    graph = imports()
    assert cycle(graph) == []
    path = longest_path(graph)
    assert len(path) <= LONGEST_IMPORT_PATH, path


def test_the_training_loop_reaches_few_modules() -> None:
    found = reachable(imports(), LOOP)
    assert len(found) <= LOOP_MODULES, sorted(found)


def test_comments_say_why_often_enough() -> None:
    assert comments_per_100_lines() >= COMMENTS_PER_100_LINES


def test_docstrings_open_with_a_verb_or_a_noun_and_not_with_a_question() -> None:
    every = docstrings()
    questions = [text.splitlines()[0] for text in every if QUESTION.match(text)]
    assert len(questions) < QUESTIONS * len(every), questions


def main() -> None:
    """Print every figure."""
    names, every, graph = list(documented()), docstrings(), imports()
    lengths = sorted((length(node), name) for name, node in functions())
    print(f"files {len(modules())}, lines {sum(m.num_lines for m in modules())}")
    print(f"public names with a docstring {100 * sum(has for _, has in names) / len(names):.1f} %")
    print(f"functions without full types {len(untyped())}")
    print(f"lines of a function: 90th percentile {lengths[int(0.9 * len(lengths))][0]}, longest {lengths[-3:]}")
    print(f"comments per 100 lines of code {comments_per_100_lines():.2f}")
    print(
        f"docstrings that open with a question {100 * sum(bool(QUESTION.match(d)) for d in every) / len(every):.1f} %"
    )
    print(f"longest import path {len(longest_path(graph))}: {' > '.join(longest_path(graph))}")
    print(f"modules that {LOOP} reaches {len(reachable(graph, LOOP))}")
    print(f"packages {dict(package_sizes().most_common())}")
    print(f"files over {LONGEST_FILE} lines {[(m.name, m.num_lines) for m in modules() if m.num_lines > LONGEST_FILE]}")


if __name__ == "__main__":
    main()

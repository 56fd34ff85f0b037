"""Foreign code is changed in engine/patches and nowhere else in the package, and nothing reaches below the engine."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nemo_prolong"
PATCHES = PACKAGE / "engine" / "patches"
SOURCES = sorted(file for file in PACKAGE.rglob("*.py") if PATCHES not in file.parents)

# Settings that a library documents as attributes to be assigned.
SETTINGS = {"torch.utils.deterministic.fill_uninitialized_memory"}
NOT_FOREIGN = {"nemo_prolong", *sys.stdlib_module_names}


def foreign_names(tree: ast.AST) -> set[str]:
    """Return the names that imports bind to foreign modules and what is in them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names if not is_familiar(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and not is_familiar(node.module):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def is_familiar(module: str) -> bool:
    """Whether a module is ours or of the standard library."""
    return module.split(".")[0] in NOT_FOREIGN


def assigned(node: ast.AST) -> Iterator[tuple[ast.Attribute, ast.expr | None]]:
    """Yield the attributes that a statement sets or deletes, with the value where there is one."""
    if isinstance(node, ast.Assign | ast.Delete):
        targets, value = node.targets, getattr(node, "value", None)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets, value = [node.target], node.value
    else:
        return
    for target in targets:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(part, ast.Attribute):
                yield part, value


def root_of(node: ast.expr) -> str | None:
    """Return the name that a chain of attributes starts with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def replaces_a_method(attribute: ast.Attribute, value: ast.expr | None, functions: set[str]) -> bool:
    """Whether an object other than ``self`` is given a function: ``x.step = partial(...)``, a lambda or a local one."""
    if isinstance(attribute.value, ast.Name) and attribute.value.id in ("self", "cls"):
        return False
    if isinstance(value, ast.Call):
        value = value.func
        return ast.unparse(value) in ("partial", "functools.partial", "MethodType", "types.MethodType")
    return isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in functions)


def changes(source: str) -> list[str]:
    """Return every change of foreign code in ``source``, as it is written there."""
    tree = ast.parse(source)
    foreign = foreign_names(tree)
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found = []
    for node in ast.walk(tree):
        for attribute, value in assigned(node):
            written = ast.unparse(attribute)
            if written in SETTINGS:
                continue
            if (
                root_of(attribute) in foreign
                or attribute.attr in ("__class__", "__bases__", "__dict__")
                or replaces_a_method(attribute, value, functions)
            ):
                found.append(written)
        if isinstance(node, ast.Call) and root_of(node.func) in ("setattr", "delattr"):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "change",
    [
        "import torch\ntorch.cuda.Stream = None",
        "import torch.cuda as device\ndevice.Stream: type = type",
        "from megatron.core import parallel_state as state\ndel state.destroy_model_parallel",
        "def f():\n    from nemo.collections.llm.gpt.model import base\n    base.MCoreGPTModel, x = 1, 2",
        "from torch import Tensor\nsetattr(Tensor, 'cuda', None)",
        "model.__class__ = Ours",
        "import functools\noptimizer.step = functools.partial(step, optimizer)",
        "trainer.fit = lambda: None",
        "def fit(): ...\ntrainer.fit = fit",
    ],
)
def test_the_check_sees_a_change_of_foreign_code(change: str) -> None:
    assert len(changes(change)) == 1


@pytest.mark.parametrize(
    "harmless",
    [
        "import torch\nx = torch.zeros(1)\nx.grad = None\nx[0] = torch.ones(1)",
        "import torch\ntorch.utils.deterministic.fill_uninitialized_memory = False",
        "import sys\nsys.argv = []",
        "class A:\n    def __init__(self, f):\n        self.f = lambda: f",
        "spec.core_attention = OurAttention",
    ],
)
def test_the_check_lets_other_assignments_pass(harmless: str) -> None:
    assert changes(harmless) == []


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_foreign_code_is_changed_in_engine_patches_alone(file: Path) -> None:
    assert changes(file.read_text()) == [], "make it a patch in engine/patches, with a test"

"""The architecture, kept by a test: who imports whom, where torch may be imported, how long a file may be."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.config.places import PROJECT

FILES = sorted((PROJECT / "sidestep").rglob("*.py"))
ALL = {
    "estimate",
    "doctor",
    "config",
    "data",
    "model",
    "preprocess",
    "training",
    "ui",
    "commands",
    "demo",
    "exports",
    "listen",
}
ALLOWED = {
    "errors": set(),
    "events": {"errors"},
    "files": {"errors"},
    "config": {"errors", "config"},
    "data": {"errors", "events", "data"},
    "model": {"errors", "events", "config", "model"},
    "preprocess": {"errors", "events", "data", "model", "config", "preprocess"},
    "training": {"errors", "events", "model", "config", "preprocess", "training"},
    "exports": {"errors", "events", "model", "config", "training", "exports"},
    "listen": {"errors", "events", "data", "model", "config", "preprocess", "training", "exports", "listen"},
    "estimate": {"errors", "events", "model", "config", "preprocess", "training", "estimate"},
    "doctor": {"errors", "config", "model", "preprocess", "training", "demo", "doctor"},
    "demo": {"errors", "events", "model", "config", "data", "demo"},
    "ui": {"errors", "events", "config", "data", "ui"},
    "commands": {"errors", "events", *ALL},
    "main": {"errors", "events", "commands", "ui", "config"},
}
# Single modules that a layer may know beside those: the wizard lists the models that are there.
ALSO_ALLOWED = {"ui": {"sidestep.model.checkpoint"}}
# Read before torch is loaded: what these find is reported at once.
TORCH_FREE = {
    *("model/checkpoint.py", "model/names.py", "model/architecture.py", "model/weights.py"),
    *("demo/songs.py", "exports/find.py", "listen/prompts.py", "listen/sound.py"),
    *("doctor/__init__.py", "doctor/finding.py", "doctor/machine.py", "doctor/folders.py"),
    *("listen/page.py", "listen/charts.py", "listen/pictures.py", "listen/story.py"),
}
TORCH_SIDE = {"doctor", "model", "preprocess", "training", "demo", "exports", "listen", "estimate"}
HEAVY = {"torch", "torchaudio", "transformers", "diffusers", "peft", "lycoris"}
# The one place that knows devices by name; everybody else asks it what a device can do.
DEVICE_LAYER = {"model/device.py", "model/capabilities.py"}
# "cpu" is none of these: every machine has one, and what --offload-encoder leaves there is no decision about a device.
DEVICES = re.compile(r"(cuda|rocm|hip|mps|xpu|hpu|npu)(:\d+)?")
OF_DEVICES = ("torch.cuda", "torch.mps", "torch.xpu", "torch.backends", "torch.accelerator", "torch.version")
MAX_LINES = 400
MAX_FUNCTION_LINES = 60


def layer(path: Path) -> str:
    return path.relative_to(PROJECT / "sidestep").parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, top_level: bool) -> Iterator[str]:
    nodes = tree.body if top_level and isinstance(tree, ast.Module) else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_module_keeps_its_place(path: Path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    name = str(path.relative_to(PROJECT / "sidestep")).replace("\\", "/")
    if layer(path) != "__init__":
        modules = set(imports(tree, top_level=False)) - ALSO_ALLOWED.get(layer(path), set())
        own = {module.split(".")[1] for module in modules if module.startswith("sidestep.")}
        assert own - {"files"} <= ALLOWED[layer(path)], "imports from a layer it must not know"
    heavy = {module.split(".")[0] for module in imports(tree, top_level=True)} & HEAVY
    may_be_heavy = (layer(path) in TORCH_SIDE and name not in TORCH_FREE) or name == "ui/tensorboard.py"
    assert may_be_heavy or not heavy, "torch is imported at import time outside the torch side"
    assert text.count("\n") <= MAX_LINES
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    assert not [f.name for f in functions if (f.end_lineno or f.lineno) - f.lineno + 1 > MAX_FUNCTION_LINES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_everything_public_says_what_it_gives(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module without a docstring"
    for node in ast.walk(tree):
        is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if is_public and not _is_nested(tree, node):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_only_the_device_layer_knows_devices_by_name(path: Path):
    if str(path.relative_to(PROJECT / "sidestep")).replace("\\", "/") in DEVICE_LAYER:
        return
    assert not list(devices_named(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "code",
    [
        *("torch.cuda.synchronize()", "torch.backends.mps.is_available()", "torch.version.hip", "import torch.xpu"),
        *(
            "from torch.cuda import Stream",
            "from torch import mps",
            "device.type == 'cuda'",
            "kind in ('cpu', 'cuda:1')",
        ),
        *("device.type != 'cpu'", "'meta' == device.type", "match device.type:\n    case 'cpu':\n        pass"),
    ],
)
def test_a_device_named_elsewhere_would_be_found(code: str):
    assert list(devices_named(ast.parse(code)))


def devices_named(tree: ast.AST) -> Iterator[str]:
    """Find torch's modules of devices, their names as strings, and every comparison of a device's type.

    Words in help and messages are sentences, not names, and are not looked at.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and DEVICES.fullmatch(node.value):
            yield node.value
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in OF_DEVICES:
            yield ast.unparse(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = (f"{module}{alias.name}" for alias in node.names)
            yield from (name for name in names if name.startswith(OF_DEVICES))
        elif isinstance(node, ast.Compare | ast.Match) and any(
            isinstance(part, ast.Attribute) and part.attr == "type" for part in _compared(node)
        ):
            yield ast.unparse(node)


def _compared(node: ast.Compare | ast.Match) -> list[ast.expr]:
    return [node.subject] if isinstance(node, ast.Match) else [node.left, *node.comparators]


def _is_nested(tree: ast.Module, node: ast.AST) -> bool:
    functions = (outer for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef) and outer is not node)
    private = (outer for outer in ast.walk(tree) if isinstance(outer, ast.ClassDef) and outer.name.startswith("_"))
    return any(node in ast.walk(outer) for outer in [*functions, *private])

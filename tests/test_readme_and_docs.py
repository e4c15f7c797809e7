"""What the documentation shows runs, and the package imports with torch alone."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import kru_triton

ROOT = Path(__file__).parents[1]
MODULES = [
    importlib.import_module(m.name)
    for m in pkgutil.walk_packages([str(ROOT / "kru_triton")], "kru_triton.")
]


def docstrings():
    """(name, docstring) of every public module, function, class and method of the package."""
    for module in MODULES:
        yield module.__name__, module.__doc__ or ""
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            yield f"{module.__name__}.{name}", inspect.getdoc(thing) or ""
            if inspect.isclass(thing):
                for method, function in vars(thing).items():
                    if not method.startswith("_") and callable(function):
                        yield f"{module.__name__}.{name}.{method}", inspect.getdoc(function) or ""


EXAMPLES = {name: text for name, text in docstrings() if ">>>" in text}


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_example(name):
    names = {"torch": torch}
    for module in MODULES:  # an example may use whatever a user can import from the package
        names |= {k: v for k, v in vars(module).items() if not k.startswith("_")}
    names |= {n: getattr(kru_triton, n) for n in kru_triton.__all__} | {"kru_triton": kru_triton}
    torch.manual_seed(0)
    test = doctest.DocTestParser().get_doctest(EXAMPLES[name], names, name, None, 0)
    assert test.examples
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append)
    assert not runner.summarize(verbose=False).failed, "".join(report)


@pytest.mark.parametrize("name", sorted(kru_triton.__all__))
def test_every_public_name_has_a_docstring_and_functions_an_example(name):
    thing = getattr(kru_triton, name)
    doc = inspect.getdoc(thing)
    assert doc
    if not inspect.ismodule(thing):
        assert ">>>" in doc
        assert thing.__module__.startswith("kru_triton.")


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_readme_python_runs():
    """In the order of the page, one namespace, as a reader would type it."""
    blocks = python_blocks((ROOT / "README.md").read_text())
    assert blocks, "README.md shows no Python"
    namespace = {"__name__": "readme"}
    torch.manual_seed(0)
    for i, block in enumerate(blocks):
        exec(compile(block, f"README.md python block {i}", "exec"), namespace)


def test_python_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n```sh\nls\n```\n```python\ny = 2\n\nz = 3\n```\n"
    assert python_blocks(text) == ["x = 1\n", "y = 2\n\nz = 3\n"]


def test_readme_names_files_that_exist():
    """Every path in backticks that looks like one of ours is there."""
    text = (ROOT / "README.md").read_text()
    named = set(
        re.findall(
            r"[\s`(]((?:kru_triton|kernels|train|bench|tests)/[\w./-]*\w\.(?:py|jsonl|md))", text
        )
    )
    assert named, "README.md names no file"
    assert not [path for path in named if not (ROOT / path).exists()]


def test_kernels_init_holds_a_docstring_alone():
    """transformers imports a package of this name where it finds one: it must do nothing."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value.value, str)


def test_nothing_imports_the_package_kernels_by_its_folder_name():
    for path in [
        p for d in ("kru_triton", "kernels", "train", "bench") for p in (ROOT / d).rglob("*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] != "kernels", f"{path}:{node.lineno}"


# Third-party modules that the scripts, or what they import, may import. (`evaluate`, which
# train/evaluate.py would hide, is imported by accelerate's own tests alone.)
THIRD_PARTY = {
    *("accelerate", "bitsandbytes", "datasets", "einops", "fsspec", "huggingface_hub", "kernels"),
    *("matplotlib", "mlxtend", "numpy", "pandas", "pyarrow", "requests", "safetensors", "scipy"),
    *("tokenizers", "torch", "torchaudio", "tqdm", "transformers", "triton", "tyro", "wandb"),
    *("yaml", "sklearn", "tensorboard", "regex", "typeguard"),
}


@pytest.mark.parametrize("folder", ["train", "train/tasks", "train/run", "bench"])
def test_no_script_shadows_a_module(folder):
    """A script's folder comes first on sys.path, so its neighbours would hide these."""
    names = {p.stem for p in (ROOT / folder).glob("*.py")} - {"__init__"}
    installed = {m.name for m in pkgutil.iter_modules([sysconfig.get_paths()["purelib"]])}
    taken = set(sys.stdlib_module_names) | THIRD_PARTY | installed
    assert {"copy", "profile", "wandb", "datasets"} <= taken
    assert not names & taken


def test_import_needs_torch_alone():
    """With the optional packages blocked, the package imports and a layer trains."""
    code = """
import sys

BLOCKED = set("triton matplotlib transformers datasets wandb tyro tqdm safetensors".split())


class Without:  # a finder that does not see the blocked packages, as if never installed
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in BLOCKED:
            return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
import kru_triton
import kru_triton.lm.model

y, _ = kru_triton.KRU(3, 8)(torch.randn(4, 2, 3))
y.sum().backward()
try:
    import wandb
except ImportError:
    print("blocked and fine")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "blocked and fine\n"


def test_import_loads_no_optional_package():
    code = (
        "import sys, torch; before = set(sys.modules); import kru_triton; "
        "print([m for m in sys.modules if m not in before and m.split('.')[0] in "
        "('triton', 'matplotlib', 'transformers', 'datasets', 'wandb', 'tyro')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.stdout == "[]\n", result.stdout + result.stderr

"""What the documentation shows runs, and the package imports with torch alone."""

import ast
import contextlib
import doctest
import functools
import importlib
import inspect
import io
import multiprocessing
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
import tomllib
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


FOLDERS = ("kru_triton", "kernels", "train", "bench", "tests")
PAGES = {
    page: (ROOT / page).read_text()
    for page in ("README.md", "CONTRIBUTING.md", *(f"{name}/README.md" for name in FOLDERS[:-1]))
}


@functools.cache
def run_page(page, code=None):
    """The names that a page's Python leaves behind, run in its order as a reader would type it."""
    namespace = {"__name__": "page"}
    torch.manual_seed(0)
    exec(compile(code or "\n".join(python_blocks(PAGES[page])), page, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if python_blocks(text)])
def test_python_of_a_page_runs(page):
    run_page(page)


def test_the_first_page_shows_python():
    assert len(python_blocks(PAGES["README.md"])) == 2


def test_the_model_of_the_page_learns_and_an_lstm_in_its_place_does_not():
    page = "kru_triton/README.md"
    code = "\n".join(python_blocks(PAGES[page]))
    for ours, theirs in {
        "self.rnn = KRU(": "self.rnn = nn.LSTM(",
        "self.rnn.output_size": "hidden_size",
        "_, h_n = self.rnn": "_, (h_n, _) = self.rnn",
        " + 1e-3 * model.rnn.unitarity_penalty()": "",
        ', {"params": repeated, "lr": 0.005 / 200}': "",
    }.items():
        assert code.count(ours) == 1
        code = code.replace(ours, theirs)
    assert run_page(page)["accuracy"] > 0.95
    assert run_page(page, code)["accuracy"] < 0.5  # a guess: 0.125


def test_python_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n```sh\nls\n```\n```python\ny = 2\n\nz = 3\n```\n"
    assert python_blocks(text) == ["x = 1\n", "y = 2\n\nz = 3\n"]


PATHS = [
    path.relative_to(ROOT).as_posix() + "/" * path.is_dir()
    for path in (
        *ROOT.glob("*.*"),
        *(p for f in FOLDERS for p in (ROOT / f, *(ROOT / f).rglob("*"))),
    )
]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_folders_that_a_page_names_are_there(page):
    """Each by its path, or the end of it."""
    named = re.findall(r"(?<![\w*./-])\w[\w./-]*\.(?:py|md|cff|svg)\b", PAGES[page])
    named += re.findall(r"\b(?:bench|results)/[\w./-]+\.jsonl?\b", PAGES[page])
    for line in code_lines(PAGES[page]):
        named += re.findall(r"(?<![\w./])[\w./-]+/(?=[\s,;])", line)
    assert named
    assert not [n for n in named if not any(f"/{path}".endswith(f"/{n}") for path in PATHS)]
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_no_file_has_the_marks_of_a_merge():
    files = [
        ROOT / path for path in PATHS if Path(path).suffix in (".md", ".py", ".toml", ".jsonl")
    ]
    marks = re.compile("^(<{7}|>{7}) ", re.MULTILINE)
    assert ROOT / "README.md" in files
    assert marks.search("a\n<<<<<<< HEAD\nb\n")
    assert not [file for file in files if marks.search(file.read_text())]


def code_lines(text):
    """Indented lines outside of lists, and what stands in single backticks."""
    blocks = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^ {4,}(\S.*)", blocks, re.MULTILINE)
    return lines + [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", blocks)]


COMMANDS = {
    line.partition("  #")[0].strip()
    for text in PAGES.values()
    for line in code_lines(text)
    if re.match(r"([\w./]*python|make|pip|torchrun) ", line)
}
MAKEFILE = (ROOT / "Makefile").read_text()


def print_help(program, connection):
    """In a process forked off this one, which has torch: the exit code of --help, and its text."""
    sys.argv = [*program, "--help"]
    told, code = io.TextIOWrapper(io.BytesIO(), "utf-8"), 0
    with contextlib.redirect_stdout(told):
        try:
            if program[0].endswith(".py"):
                runpy.run_path(str(ROOT / program[0]), run_name="__main__")
            else:
                runpy.run_module(program[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    told.flush()
    connection.send((code, told.buffer.getvalue().decode()))


@pytest.fixture(scope="module")
def help_of():
    importlib.import_module("kru_triton.train.lm")  # once: what most of them load
    texts = {}

    def ask(*program):
        if program not in texts:
            ours, theirs = multiprocessing.Pipe()
            context = multiprocessing.get_context("fork")
            process = context.Process(target=print_help, args=(program, theirs))
            process.start()
            theirs.close()  # so that its end is seen here
            code, texts[program] = ours.recv()
            process.join()
            assert not code, program
        return texts[program]

    return ask


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_of_the_pages_have_their_flags(command, help_of):
    words = shlex.split(command)
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    if words[0] == "make":
        for word in words[1:]:
            name, is_setting, value = word.partition("=")
            assert re.search(
                rf"\b{name} \?=|\({name}\)" if is_setting else f"^{name}:", MAKEFILE, re.M
            )
            if name == "ARGS":
                assert words[1] == "train"
                assert f"--{value.split()[0].strip('-')}" in help_of("train/lm.py")
        return
    if words[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"\[([\w,]+)\]", command)
        assert {e for es in extras for e in es.split(",")} <= project[
            "optional-dependencies"
        ].keys()
        assert all((ROOT / file).exists() for file in re.findall(r"-c (\S+)", command))
        return
    (place,) = [i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"]
    if words[0] == "torchrun":
        flags = [flag for flag in flags if flag in words[place:]]
    if words[place] == "-m":
        program = (
            words[place + 1 : place + 3] if words[place + 1] == "bench" else [words[place + 1]]
        )
        program = [word for word in program if not word.startswith("--") and word != "NAME"]
    else:
        program = words[place : place + 1]
    told = help_of(*program)
    assert told
    assert not [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", told)]


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

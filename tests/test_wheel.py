"""The package as others get it: an sdist, the wheel of it, installed away from the repository."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = "A wheel holds the whole train of thought.\n" * 40


def run(*command, cwd, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the sdist, as `pip install` of it would; with the environment's setuptools."""
    work = tmp_path_factory.mktemp("wheel")
    tree = work / "tree"
    tree.mkdir()
    for folder in ("kru_triton", "kernels", "train"):
        ignored = shutil.ignore_patterns("__pycache__", "kernels", "train")  # links of make gpu
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    backend = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])('..')"
    run("-c", backend, "build_sdist", cwd=tree)
    (sdist,) = work.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    run("-c", backend, "build_wheel", cwd=work / sdist.name.removesuffix(".tar.gz"))
    (made,) = work.glob("*.whl")
    return made


def test_the_wheel_holds_every_module(wheel):
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = {"kru_triton": "kru_triton"} | tool["package-dir"]
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in places.items()
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_symlink() and not any(parent.is_symlink() for parent in path.parents)
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == expected
    assert "kru_triton/py.typed" in names


def test_an_installed_wheel_trains_from_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site]
    run(*install, wheel, cwd=tmp_path)
    (tmp_path / "notes.txt").write_text(TEXT)
    flags = "--steps 3 --preset tiny --batch-size 2 --segment-length 32 --sample-tokens 0 "
    flags += "--wandb disabled --data text:notes.txt --valid text:notes.txt"
    command = ["-m", "kru_triton.train.lm", *flags.split()]
    run(*command, cwd=tmp_path, PYTHONPATH=str(site))
    summary = json.loads((tmp_path / "runs" / "lm" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["commit"] is None  # the installed code, not the repository's

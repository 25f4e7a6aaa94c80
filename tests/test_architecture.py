"""The rules of the code base that a reviewer should not have to check: layers, sizes, packaging, generated files."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPONENTS = ("operator", "router", "prefill_worker", "decode_worker", "kernels")
CODE = ("lanewise", *COMPONENTS)
MAX_LINES = 300
MAX_LINES_EXCEPTED = 400
LONGER_FILES: dict[str, str] = {}
"""File -> why it is over MAX_LINES; an entry needs a reason and is removed when it no longer applies."""
MAX_FUNCTION_LINES = 80
NAMES_NO_FILE_MAY_SAY = ("shared" + "/",)
BUILT_BY = "hatchling"


def sources(*folders: str) -> Iterator[Path]:
    """Python files of the repository, each once (links are not followed), without generated ones."""
    for folder in folders:
        for directory, names, files in os.walk(ROOT / folder):
            names[:] = [name for name in names if name != "__pycache__" and not (Path(directory) / name).is_symlink()]
            yield from (Path(directory) / name for name in sorted(files) if name.endswith(".py") and "_pb2" not in name)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_are_linked_and_are_no_packages(component: str) -> None:
    assert not list((ROOT / component).rglob("__init__.py")), "operator/__init__.py would shadow Python's own operator"
    link = ROOT / "lanewise" / component
    assert link.is_symlink()
    assert os.readlink(link) == f"../{component}"


def test_python_itself_works_from_the_root_of_the_repository() -> None:
    out = run(sys.executable, "-c", "import operator, collections; print(operator.__file__)")
    assert not out.startswith(str(ROOT))


@pytest.mark.parametrize("contracts", ["pyproject.toml"])
def test_layer_contracts_hold(contracts: str) -> None:
    run(str(Path(sys.executable).with_name("lint-imports")), "--config", contracts, "--no-cache")


@pytest.mark.parametrize(
    "module",
    ["lanewise.router.main", "lanewise.operator.main", "lanewise.sim", "lanewise.client", "lanewise.local.commands"],
)
def test_starts_without_torch(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} does not exist")
    code = f"import sys, {module}; print([n for n in ('torch', 'triton', 'lanewise.engine') if n in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == "[]"


# ---------------------------------------------------------------- sizes


def test_files_are_short() -> None:
    lines = {relative(path): len(path.read_text().splitlines()) for path in sources(*CODE)}
    limits = {name: MAX_LINES_EXCEPTED if name in LONGER_FILES else MAX_LINES for name in lines}
    assert {name: count for name, count in lines.items() if count > limits[name]} == {}
    needless = [name for name in LONGER_FILES if lines.get(name, 0) <= MAX_LINES]
    assert needless == [], "these exceptions are no longer needed"


def test_functions_are_short() -> None:
    long = {}
    for path in sources(*CODE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long[f"{relative(path)}:{node.lineno} {node.name}"] = length
    assert long == {}


def test_every_module_says_what_it_owns() -> None:
    modules = {relative(path): path.read_text() for path in sources(*CODE)}
    assert [name for name, text in modules.items() if text and not ast.get_docstring(ast.parse(text))] == []


def test_no_file_refers_to_what_users_do_not_have() -> None:
    found = []
    for path in (*sources(*CODE, "tests", "tools", "benchmarks"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        text = path.read_text(errors="replace")
        found += [
            f"{relative(path)}: {name}" for name in NAMES_NO_FILE_MAY_SAY if f"/{name}" in text or f" {name}" in text
        ]
    assert found == []


# ---------------------------------------------------------------- generated and built files


def test_grpc_stubs_are_not_stale(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    run("bash", "tools/gen_proto.sh", str(tmp_path))
    stubs = [f"{proto}_pb2{end}" for proto in ("lanewise", "externalscaler") for end in (".py", ".pyi", "_grpc.py")]
    for name in stubs:
        made, kept = (root / "lanewise" / "rpc" / name for root in (tmp_path, ROOT))
        assert without_layout(made) == without_layout(kept), f"run tools/gen_proto.sh: {name} is stale"


def without_layout(path: Path) -> str:
    """What a generated file says: a formatter may have been over it."""
    return "".join(ast.unparse(ast.parse(path.read_text())).split())


def tracked() -> set[str]:
    """What a wheel has to hold: every committed file of the code, under its path in the package."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = run("git", "ls-files", "--", *CODE).split()
    wanted = {name if name.startswith("lanewise/") else f"lanewise/{name}" for name in names if (ROOT / name).is_file()}
    return wanted - {f"lanewise/{component}" for component in COMPONENTS}


@pytest.fixture(scope="module")
def build_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from: others may write to the tree meanwhile, and a build may leave files behind."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    ignored = shutil.ignore_patterns(
        ".venv", ".git", "__pycache__", ".*_cache", ".hypothesis", "build", "dist", "*.whl"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


def wheel_of(tree: Path, out: Path) -> set[str]:
    if importlib.util.find_spec(BUILT_BY) is not None:
        run(sys.executable, "-m", BUILT_BY, "build", "-t", "wheel", "-d", str(out), cwd=tree)
    else:
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(tree))
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_component(build_root: Path, tmp_path: Path) -> None:
    built = wheel_of(build_root, tmp_path)
    assert tracked() - built == set()
    assert {name.split("/")[1] for name in built if name.startswith("lanewise/")} >= {
        "router",
        "decode_worker",
        "kernels",
    }
    assert not any(name.split("/")[0] in COMPONENTS for name in built)  # a top-level `operator` would shadow Python's


def test_a_wheel_from_the_source_archive_is_the_same(build_root: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec(BUILT_BY) is None:
        pytest.skip(f"{BUILT_BY} is not installed")
    run(sys.executable, "-m", BUILT_BY, "build", "-t", "sdist", "-d", str(tmp_path), cwd=build_root)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "x")  # our own archive; `filter` came with 3.11.4
    (tree,) = (tmp_path / "x").iterdir()
    assert wheel_of(tree, tmp_path / "a") == wheel_of(build_root, tmp_path / "b")

"""The tree is the architecture: who may import whom, who owns which package, what is public."""

from __future__ import annotations

import ast
import importlib.resources
import inspect
import subprocess
import sys
from pathlib import Path

import gpuload.kernels  # type: ignore[import-not-found, unused-ignore]  # mypy cannot follow package-dir
import pytest

import gpuload

PACKAGE = Path(gpuload.__file__).parent
KERNELS = Path(gpuload.kernels.__file__)

# A file imports only from files before it. A new file gets its place here.
LAYERS = """
signals ending errors badrows frameworks progress kernels device clock stages
order order.philox order.permutation order.draws order.split order.orders order.cut order.ranks order.rank_store
order.state
tables tables.malloc tables.fork tables.reading tables.projection tables.write tables.cache tables.lance tables.mix
tables.versions tables.together
order.samplers order.weighted order.turns order.mix order.choose
images images.transform images.encoded images.headers images.pillow images.views images.resize images.planes
images.augment images.header_sizes order.buckets
images.decode images.decode.libjpeg images.decode.host images.decode.room images.decode.line images.decode.cpu
images.decode.arena images.decode.lanes images.decode.libnvjpeg images.decode.nvjpeg
images.decode.nvimgcodec images.decode.dali images.decode.choose
fields fields.values fields.tokens fields.text
fields.numbers fields.lists fields.image fields.boxes fields.mask fields.raw fields.bytes fields.choose
batch augment.rows augment.colour augment.blur augment.erase augment.auto augment.mixing augment
pipeline options order.foreign order.epochs order.plans iteration dataset
gpuload
feed dali
tools tools.trace tools.describe tools.verify tools.metadata tools.folder tools.claim tools.ingest
tools.sheet tools.demo tools.bench tools.doctor tools.cli __main__
""".split()  # noqa: SIM905 - the lines say more than a list would

# One optional or heavy package, one place that knows it.
OWNERS = {
    "lance": {"tables.lance", "tables.write", "tools.ingest", "tools.verify"},
    "cupy": {"kernels"},
    "nvidia": {"images.decode.nvimgcodec", "images.decode.dali", "dali"},
    "tokenizers": {"fields.tokens"},
    "transformers": {"fields.tokens"},
    "datasets": set(),
    "simplejpeg": {name for name in LAYERS if name.startswith("images.decode.")},
    "PIL": {name for name in LAYERS if name.startswith("images.decode.")}
    | {
        "images.pillow",
        "tools.sheet",
        "tools.demo",
        "tools.folder",
        "tools.ingest",
        "tools.describe",
        "tools.doctor",
        "feed",
    },
    "typer": {"tools.cli"},
    "rich": {"tools.cli", "progress"},
}


def files() -> dict[str, Path]:
    """Module name without `gpuload.` → its file; the package itself is "gpuload"."""
    found = {"kernels": KERNELS}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "kernels":
            found[".".join(part for part in parts if part != "__init__") or "gpuload"] = path
    return found


FILES = files()


def imported(path: Path) -> set[str]:
    """Every module or name that a file imports, at its head or in a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path == KERNELS, f"{path}: a relative import hides where a name comes from"
            module = node.module if node.level == 0 else "gpuload.kernels"
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def layers_of(path: Path) -> set[str]:
    """The files of gpuload that a file imports."""
    found = set()
    for name in imported(path):
        if name.split(".")[0] == "gpuload":
            rest = name.split(".")[1:]
            known = [".".join(rest[:n]) for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in FILES]
            found.add(known[0] if known else "gpuload")
    return found


def test_every_file_has_its_layer() -> None:
    assert not set(FILES) - set(LAYERS), "give each new file its place in LAYERS"
    assert len(LAYERS) == len(set(LAYERS))


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_files_above_it(name: str) -> None:
    above = set(LAYERS[: LAYERS.index(name)])
    assert layers_of(FILES[name]) - {name} <= above


@pytest.mark.parametrize("package", OWNERS)
def test_a_package_is_imported_by_its_owner_alone(package: str) -> None:
    users = {name for name, path in FILES.items() if any(i.split(".")[0] == package for i in imported(path))}
    assert users <= OWNERS[package]


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(ast.parse(FILES[name].read_text()))


def test_public_names_are_sorted_and_complete() -> None:
    assert gpuload.__all__ == sorted(gpuload.__all__)
    public = {name for name, value in vars(gpuload).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public - {"annotations"} == set(gpuload.__all__)
    for name in gpuload.__all__:
        if isinstance(value := getattr(gpuload, name), type):
            assert value.__module__.startswith("gpuload.")
            assert value.__doc__


def run(program: str, *options: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", program], capture_output=True, text=True, timeout=60, check=True, cwd=cwd
    )
    return done.stdout.strip()


def test_importing_gpuload_imports_no_package_that_is_optional() -> None:
    optional = ("cupy", "nvidia.nvimgcodec", "nvidia.dali", "datasets", "transformers", "typer", "rich")
    loaded = run(f"import sys, gpuload; print([name for name in {optional} if name in sys.modules])")
    assert loaded == "[]"


def test_importing_gpuload_starts_no_thread_and_no_lance() -> None:
    program = "import threading, gpuload; from gpuload.tables.fork import lance_running as running"
    assert run(program + "; print(threading.active_count(), running())") == "1 False"


def test_no_top_level_module_kernels_is_installed(tmp_path: Path) -> None:
    """Another project owns that name."""
    find = "import importlib.util as u; print(u.find_spec('kernels'), bool(u.find_spec('gpuload.kernels')))"
    assert run(find, "-I", cwd=tmp_path) == "None True"


def test_the_package_says_that_it_is_typed() -> None:
    assert importlib.resources.files("gpuload").joinpath("py.typed").is_file()
    for name in ("resize_normalize.cu", "cpu_shim.h"):
        assert importlib.resources.files("gpuload.kernels").joinpath(name).is_file()

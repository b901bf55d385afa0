"""The GPU benchmark and the script around it, at toy size on the CPU: stages, cases, limits, what is missing, JSON."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FOR_A_GPU
from standin import StandIn, Stream

FOLDER = Path(__file__).parent.parent / "benchmarks"
ONE = ["--rounds", "1", "--passes", "1", "--seconds", "1"]
TOY = ["--rows", "8", *ONE]
ON_THE_CPU = [
    "limit: all but decoding",
    "limit: copy",
    "gpuload nvimgcodec",
    "gpuload nvimgcodec:parity",
    "gpuload dali",
    "gpuload cpu",
    "dali pipeline, crops, 0.65",
    "dali pipeline, whole images, 0.9",
]
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the benchmarks beside the tests")


@pytest.fixture(scope="module", autouse=True)
def importable() -> Any:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def load(name: str) -> Any:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    work = str(tmp_path_factory.mktemp("work"))
    return SimpleNamespace(images=None, rows=16, work=work, device="cpu", seconds=5.0, passes=2)


# -- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # those of other packages
@pytest.mark.parametrize("case", ON_THE_CPU)
def test_a_case_that_runs_on_the_cpu_yields_its_rows(case: str, settings: SimpleNamespace) -> None:
    setup = load("gpu_setup").Setup(settings, 0.2, 4)
    assert setup.rows == 16
    passes = load("gpu_cases").CASES[case](setup)
    rows = list(passes())
    assert rows == [4] * 4 if case != "limit: copy" else sum(rows) >= 16
    assert load("bench_gpu").measure(passes, setup) > 0
    gc.collect()


def test_a_training_step_is_fed_and_synthetic(settings: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the real size of the images; of the transformer, one thin layer."""
    setup, module = load("gpu_setup").Setup(settings, 0.2, 4), load("gpu_training")
    small = lambda: module.ViT(width=16, depth=1, heads=2)  # noqa: E731
    assert [list(module.training(small, decoder)(setup)()) for decoder in (None, "cpu")] == [[4] * 4, [4] * 4]


def test_the_transformer_is_a_vit_s_16() -> None:
    with torch.device("meta"):
        model = load("gpu_training").ViT()
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(p.numel() for p in model.parameters()) == 22_050_664  # as timm's vit_small_patch16_224


@pytest.mark.parametrize("case", ["gpuload nvjpeg", "gpuload nvjpeg:alone", "limit: engine"])
def test_what_needs_an_engine_says_so_without_a_gpu(case: str, settings: SimpleNamespace) -> None:
    found = load("bench_gpu").once(case, load("gpu_cases").Group(0.2, 4, ()), settings)
    assert found.keys() == {"left_out"}
    assert "part of a GPU" in found["left_out"]


def test_a_peer_that_is_not_installed_is_left_out(settings: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = load("bench_gpu").once("torchvision decode_jpeg", load("gpu_cases").Group(0.2, 4, ()), settings)
    assert found == {"left_out": "torchvision.io is not installed"}


def test_large_photos_are_large_and_fewer(settings: SimpleNamespace) -> None:
    many = SimpleNamespace(**{**vars(settings), "rows": 64})
    small, large = (load("gpu_setup").Setup(many, megapixels, 4) for megapixels in (0.2, 1))
    assert large.rows < small.rows
    assert len(large.unique) < len(small.unique)
    (_, table) = next(large.batches())
    assert (abs(table["height"].astype(float) * table["width"] / 1e6 - 1) < 0.01).all()


# -- the engine, as the stand-in plays it ----------------------------------------------------------------------------


class HostCard:
    """What a case calls nvJPEG with, on the stand-in."""

    def __init__(self, made: StandIn) -> None:
        self.library = made.library

    def stream(self, device: torch.device) -> Stream:
        return Stream(self.library)


def test_the_limit_is_the_engine_called_directly(settings: SimpleNamespace, card: StandIn) -> None:
    """A call for each sampling of a batch, and nothing that is not decoded."""
    setup = load("gpu_setup").Setup(settings, 0.2, 4, HostCard(card))
    assert list(load("gpu_cases").CASES["limit: engine, planes"](setup)()) == [4] * 4
    assert card.count("images") == 16
    assert 4 <= card.count("calls") <= 16
    assert card.count("states") == card.count("initialised")  # once each
    assert card.count("handles") <= 2


def test_photos_that_the_engine_does_not_take_are_not_in_its_limit(settings: SimpleNamespace, card: StandIn) -> None:
    from making import jpeg

    setup = load("gpu_setup").Setup(settings, 0.2, 4, HostCard(card))
    setup.unique = [jpeg(40, 50, 0, progressive=True), *setup.unique[:3]]
    assert list(load("gpu_cases").CASES["limit: engine, planes"](setup)()) == [4] * 4
    setup.unique = setup.unique[:1]
    with pytest.raises(RuntimeError, match="none of the photos"):
        load("gpu_cases").CASES["limit: engine, planes"](setup)


def test_without_the_library_or_an_engine_the_limit_says_so(settings: SimpleNamespace, card: StandIn) -> None:
    case = load("gpu_cases").CASES["limit: engine"]
    card.set(engines=0)
    with pytest.raises(Exception, match="JPEG engine"):
        case(load("gpu_setup").Setup(settings, 0.2, 4, HostCard(card)))
    with pytest.raises(Exception, match="Expected libnvjpeg"):
        case(load("gpu_setup").Setup(settings, 0.2, 4, SimpleNamespace(library=None)))


# -- stages ----------------------------------------------------------------------------------------------------------


def test_the_stages_measure_every_case_the_most_valuable_first() -> None:
    cases = load("gpu_cases")
    measured = {name for groups in cases.STAGES.values() for group in groups for name in group.cases}
    assert measured == set(cases.CASES)
    assert list(cases.STAGES) == ["rates", "training", "large", "dali", "peers", "batches"]
    sizes = {(group.megapixels, group.batch_size) for groups in cases.STAGES.values() for group in groups}
    assert sizes == {(0.2, 128), (1, 128), (12, 32), (0.2, 64), (0.2, 256)}
    for name, groups in cases.STAGES.items():
        assert all(name == "training" or group.cases[0] == "limit: engine" for group in groups)


def test_groups_take_turns_by_value_and_later_rounds_have_another_order() -> None:
    bench, cases = load("bench_gpu"), load("gpu_cases")
    one, other = cases.Group(1, 8, ("a", "b", "c")), cases.Group(2, 4, ("a", "b"))
    plan = bench.planned([one, other], 3)
    assert [(g.megapixels, case) for k, g, case in plan if k == 0] == [(1, "a"), (2, "a"), (1, "b"), (2, "b"), (1, "c")]
    rounds = [[(g.megapixels, case) for k, g, case in plan if k == wanted] for wanted in range(3)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(rounds[2])
    assert rounds[1] != rounds[2] or rounds[1] != rounds[0]


def test_ratios_are_those_of_a_round() -> None:
    bench, cases = load("bench_gpu"), load("gpu_cases")
    kind = "training ViT-S/16"
    group = cases.Group(0.2, 8, ("limit: engine", "a", f"{kind}: synthetic", f"{kind}: fed", "gone"))
    runs = {
        (0, "limit: engine"): {"rates": [100.0, 110.0, 90.0], "first_s": 0.1},
        (1, "limit: engine"): {"rates": [50.0], "first_s": 0.2},
        (0, "a"): {"rates": [50.0], "first_s": 0.3},
        (1, "a"): {"rates": [30.0], "first_s": 0.2},
        (1, f"{kind}: synthetic"): {"rates": [40.0], "first_s": 1.0},
        (0, f"{kind}: fed"): {"rates": [39.0], "first_s": 1.0},
        (1, f"{kind}: fed"): {"rates": [38.0], "first_s": 1.0},
        (0, "gone"): {"left_out": "it is not installed"},
    }
    found = bench.summary(group, runs)
    assert found["left_out"] == {"gone": "it is not installed"}
    assert found["cases"]["a"] == {
        "rows_per_s": 40.0, "lowest": 30.0, "highest": 50.0, "ratio": 0.55, "first_s": 0.2, "processes": 2,
    }  # fmt: skip
    assert found["cases"][f"{kind}: fed"]["ratio"] == 0.95  # of the one round that has both


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: SimpleNamespace) -> Any:
    """bench(out, stage, *options) -> the report, and what was printed; the cases are in processes of their own."""

    def run(out: Path, stage: str, *options: str) -> dict[str, Any]:
        common = ["--device", "cpu", "--rows", "16", "--batch-sizes", "4", "--work", settings.work, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [str(FOLDER / "bench_gpu.py"), stage, *common, *options])
        load("bench_gpu").main()
        printed = capsys.readouterr()
        return {"stdout": printed.out, "stderr": printed.err, **json.loads(out.read_text())}

    return run


def test_a_stage_writes_what_it_saw(bench: Any, tmp_path: Path) -> None:
    options = [*ONE, "--cases", "limit: copy"]
    found = bench(tmp_path / "out" / "rates.json", "rates", *options)
    (group,) = found["groups"].values()
    assert list(found["groups"]) == ["0.2 MP, batch 4"]
    assert group["left_out"] == {}
    assert group["cases"].keys() == {"limit: copy"}
    assert group["cases"]["limit: copy"]["rows_per_s"] > 0
    assert group["pixels_per_image"] > 100_000
    assert found["stage"] == "rates"
    assert found["machine"]["torch"]
    assert found["stdout"].rstrip().endswith("┘")
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "rates.json"]


def test_no_process_begins_that_the_limit_of_the_stage_would_end(bench: Any, tmp_path: Path) -> None:
    found = bench(tmp_path / "rates.json", "rates", "--limit", "0")
    (group,) = found["groups"].values()
    assert set(group["left_out"].values()) == {"the stage had no time left"}
    assert len(group["left_out"]) == 8


def test_a_case_that_hangs_is_ended_and_the_stage_goes_on(bench: Any, tmp_path: Path) -> None:
    options = ["--process-limit", "1", "--cases", "limit: copy"]  # its imports take longer
    found = bench(tmp_path / "rates.json", "rates", *options)
    (group,) = found["groups"].values()
    assert group["left_out"] == {"limit: copy": "it was not done after 1 s"}
    assert "limit: copy: left out, it was not done" in found["stderr"]


# -- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a rented machine: the packages in a folder on PYTHONPATH, gpuload not among them."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if not entry.name.startswith(("gpuload", "__editable__")):
            (packages / entry.name).symlink_to(entry)
    (packages / "sitecustomize.py").write_text("import sys; sys.modules['torchvision'] = None")  # a peer is missing
    venv.create(tmp_path / "venv", symlinks=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    return {**os.environ, "PYTHON": python, "DEVICE": "cpu", "PYTHONPATH": str(packages)}


def script(tmp_path: Path, environment: dict[str, str], *given: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(FOLDER / "gpu_all.sh"), "out", *given]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, cwd=tmp_path)


@pytest.mark.slow
def test_stages_are_run_by_name_in_a_checkout_that_is_not_installed(tmp_path: Path, bare: dict[str, str]) -> None:
    bare["PYTEST_ADDOPTS"] = "-k test_columns"  # not all tests once more
    options = [*TOY, "--batch-sizes", "4", "--work", str(tmp_path / "work"), "--cases", "limit: copy"]
    done = script(tmp_path, bare, "rates", "tests", "--", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("gpuload is not installed"), done.stdout + done.stderr
    assert "not compiled" not in done.stdout
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.json")} == {"rates.json", "tests.json"}
    assert "limit: copy" in done.stdout
    tests = json.loads((out / "tests.json").read_text())
    assert tests["status"] == 0
    assert tests["collected"] == tests["skipped"] > 0
    stages = (out / "stages.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in stages] == ["rates", "tests"]
    assert all(line.endswith("status 0") for line in stages)


def test_stages_are_run_by_name_and_one_that_fails_is_said(tmp_path: Path, settings: SimpleNamespace) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "PYTEST_ADDOPTS": "--no-such-option"}
    options = ["--rows", "16", "--batch-sizes", "4", "--work", settings.work, "--cases", "none"]
    done = script(tmp_path, environment, "correct", "rates", "--", *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "correct ended with 4; the last lines of" in done.stdout
    assert "no-such-option" in done.stdout
    stages = (tmp_path / "out" / "stages.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in stages] == ["correct", "rates"]
    assert [line.rpartition(" ")[2] for line in stages] == ["4", "0"]
    report = json.loads((tmp_path / "out" / "rates.json").read_text())
    assert report["groups"]["0.2 MP, batch 4"]["cases"] == {}


def test_pytests_outcomes_are_in_a_file_as_it_goes(tmp_path: Path) -> None:
    """After the second of three tests, which kills the process; each outcome is there, and what failed says why."""
    (tmp_path / "test_toy.py").write_text(
        "import os, pytest\n"
        "def test_good(): print('x: PSNR lowest 40.0')\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_none(): pass\n"
        "def test_fatal(): os._exit(9)\n"
    )
    command = [sys.executable, str(FOLDER / "gpu_tests.py"), str(tmp_path / "out.json"), "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=100, cwd=tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())
    assert done.returncode == 9, done.stdout
    assert (found["collected"], found["passed"], found["skipped"], found["status"]) == (4, 1, 1, None)
    assert list(found["failed"]) == ["test_toy.py::test_bad"]
    assert "assert 1 == 2" in found["failed"]["test_toy.py::test_bad"]
    assert found["printed"] == ["x: PSNR lowest 40.0"]


# -- what was seen ---------------------------------------------------------------------------------------------------


def test_the_published_figures_say_where_they_come_from() -> None:
    figures = load("figures")
    for path in (FOLDER / "results" / "gpu").glob("*.json"):
        report = json.loads(path.read_text())
        assert len(report["commit"]) >= 7, path
        assert report["date"], path
    found = figures.load_gpu()
    assert found["gpu"].startswith("NVIDIA")
    assert {"limit: engine", "gpuload nvimgcodec", "torchvision decode_jpeg", "lance.torch.data, workers"} <= found[
        "cases"
    ].keys()


def test_of_a_case_in_several_files_the_fastest_counts_and_other_groups_do_not(tmp_path: Path) -> None:
    figures = load("figures")
    for commit, rate in (("aaaaaaa", 5.0), ("bbbbbbb", 7.0), ("ccccccc", 6.0)):
        case = {"rows_per_s": rate, "lowest": rate, "highest": rate, "ratio": 1.0}
        groups = {"0.2 MP, batch 128": {"cases": {"a": case, commit: case}}, "12 MP, batch 32": {"cases": {"b": case}}}
        report = {"benchmark": "gpu", "commit": commit, "machine": {"gpu": "NVIDIA X", "cores": 4}, "groups": groups}
        (tmp_path / f"{commit}.json").write_text(json.dumps(report))
    (tmp_path / "correct.json").write_text(json.dumps({"benchmark": "tests"}))
    found = figures.load_gpu(tmp_path)
    assert {name: case["rows_per_s"] for name, case in found["cases"].items()} == {
        "a": 7.0, "aaaaaaa": 5.0, "bbbbbbb": 7.0, "ccccccc": 6.0,
    }  # fmt: skip
    assert found["commits"] == ["aaaaaaa", "bbbbbbb", "ccccccc"]


def test_the_picture_has_every_loader_and_the_training_steps(tmp_path: Path) -> None:
    figures, cases = load("figures"), load("gpu_cases").CASES
    old = {"training: synthetic": 100.0, "training: fed": 74.0}
    assert figures.training_steps({name: {"rows_per_s": rate} for name, rate in old.items()}) == {
        "ResNet-50": {"synthetic": {"rows_per_s": 100.0}, "fed": {"rows_per_s": 74.0}}
    }
    assert list(figures.training_steps(cases)) == ["ResNet-50", "ViT-S/16"]
    pytest.importorskip("matplotlib")
    every = {"rows_per_s": 10.0, "lowest": 9.0, "highest": 11.0}
    some = {"gpu": "NVIDIA X", "cores": 4, "commits": ["aaaaaaa"]}
    figures.draw_gpu({**some, "cases": dict.fromkeys(cases, every)}, tmp_path / "all.png")
    figures.draw_gpu({**some, "cases": {"gpuload cpu": every}}, tmp_path / "one.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("all", "one"))


def test_an_unknown_stage_and_one_that_time_is_up_for(tmp_path: Path) -> None:
    done = script(tmp_path, {**os.environ}, "rates", "ratse")
    assert done.returncode == 2
    assert "correct rates training kernel large dali peers batches tests dali-tests, got ratse." in done.stderr
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "TOTAL": "20"}
    done = script(tmp_path, environment, "rates")
    assert done.stdout.startswith("rates: left out, ")
    assert not (tmp_path / "out" / "rates.json").exists()


@pytest.mark.slow
def test_every_stage_runs_and_writes_its_figures(tmp_path: Path, bare: dict[str, str]) -> None:
    bare |= {"PYTEST_ADDOPTS": "-k test_columns", "TOTAL": "1200"}
    slow = ("training", "peers")  # a ResNet's or a transformer's step, and workers, take longer than all others
    names = [name for name in load("gpu_cases").STAGES if name not in slow]
    for name in names:
        sizes = ",".join("42"[: len(load("gpu_cases").STAGES[name])])
        megapixels = ",".join(["0.1", "0.3"][: len(load("gpu_cases").STAGES[name])])
        options = [*TOY, "--batch-sizes", sizes, "--megapixels", megapixels, "--work", str(tmp_path / "work")]
        done = script(tmp_path, bare, name, "--", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for group in found["groups"].values():
            assert all(case["rows_per_s"] > 0 for case in group["cases"].values())
            wanted = {case for case in ON_THE_CPU if any(case in g.cases for g in load("gpu_cases").STAGES[name])}
            assert wanted <= group["cases"].keys(), group["left_out"]
    done = script(tmp_path, bare, "correct", "tests", "dali-tests")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_kernels_are_a_stage(tmp_path: Path) -> None:
    toy = "--megapixels 0.01 --counts 2 --size 8 --rounds 1 --seconds 0"
    done = script(tmp_path, {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "KERNEL_OPTIONS": toy}, "kernel")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "kernel.json").read_text())["groups"]


def test_no_gpu_test_is_in_a_file_that_dash_m_gpu_leaves_out(request: pytest.FixtureRequest) -> None:
    found = {item.path for item in request.session.items if item.get_closest_marker("gpu")}
    assert [path.name for path in found if not FOR_A_GPU.search(path.read_text())] == []

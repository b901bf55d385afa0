"""The README's figures: benchmarks/results/*.json enter, the text between the markers and the pictures leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
TASKS = {
    "pixels": "resize 256, centre crop 224, uint8",
    "captions": "the same, captions as 77 token ids",
    "training": "random-resized crop, flip, float32",
}
_LIMIT, _OURS, _HAND = "bare loop (the limit)", "gpuload", "one batch by hand"
_BLUE, _GRAY, _RED, _DARK = "#1f6feb", "#b6bec9", "#cf222e", "#444c56"
_GROUP, _ENGINE = "0.2 MP, batch 128", "limit: engine"
_LABELS = {  # on the GPU's picture; what is not here is called as it is in the JSON
    "dali pipeline 0.65": "DALI's own pipeline, load 0.65",
    "dali pipeline 0.9": "DALI's own pipeline, load 0.9",
    "dali pipeline, crops, 0.12": "DALI, decoding crops, load 0.12",
    "dali pipeline, crops, 0.65": "DALI, decoding crops, load 0.65",
    "dali pipeline, crops, 0.9": "DALI, decoding crops, load 0.9",
    "dali pipeline, whole images, 0.9": "DALI, decoding whole images, load 0.9",
    "lance.torch.data, workers": "lance.torch.data, 14 workers",
}


def load(folder: Path = harness.RESULTS) -> dict[str, dict[str, Any]]:
    """Task → report, of those that are there."""
    found = {task: folder / f"cpu-{task}.json" for task in TASKS}
    return {task: json.loads(path.read_text()) for task, path in found.items() if path.exists()}


def peers(report: dict[str, Any]) -> dict[str, float]:
    """Ratio of each case that is neither ours nor the limit."""
    others = {name: case["ratio"] for name, case in report["cases"].items()}
    return {name: ratio for name, ratio in others.items() if not name.startswith(_OURS) and name not in (_LIMIT, _HAND)}


def text(reports: dict[str, dict[str, Any]]) -> str:
    """What stands between the markers."""
    first = next(iter(reports.values()))
    best = {task: max(peers(report).items(), key=lambda item: item[1]) for task, report in reports.items()}
    ours = {task: report["cases"][_OURS]["ratio"] for task, report in reports.items()}
    pixels = next(iter(reports))
    upstream = peers(first).get("lance.torch.data")
    sentence = (
        f"On {first['machine']['cores']} cores without a GPU: **{ours[pixels]:.2f} times** a bare loop that decodes "
        f"the same bytes from memory with simplejpeg and resizes them with torch, {ours[pixels] / best[pixels][1]:.1f} "
        f"times the next loader"
    )
    sentence += f" and {ours[pixels] / upstream:.1f} times `lance.torch.data`" if upstream else ""
    sentence += (
        "; with random-resized crops {:.2f} times the loop. ".format(ours["training"]) if "training" in ours else ". "
    )
    sentence += "`python benchmarks/run_all.py` measures it."
    lines = [sentence, "", "![Rate of every loader against the bare loop](benchmarks/results/cpu.png)", ""]
    lines += ["<details><summary>All figures</summary>", ""]
    lines += ["Rates are ratios to the bare loop within a round of interleaved runs: median (lowest-highest).", ""]
    lines.append("| | " + " | ".join(TASKS[task] for task in reports) + " | first batch, ms | peak MB |")
    lines.append("|---" * (len(reports) + 3) + "|")
    for name in sorted(first["cases"], key=lambda name: -first["cases"][name]["ratio"]):
        if name == _HAND:
            continue
        cells = [_cell(report["cases"].get(name)) for report in reports.values()]
        case = first["cases"][name]
        bold = "**" if name == _OURS else ""
        row = [f"{bold}{name}{bold}", *cells, f"{case['first_s'] * 1000:,.0f}", f"{case['peak_mb']:,}"]
        lines.append("| " + " | ".join(row) + " |")
    if _HAND in first["cases"]:
        lines += [
            "",
            f"One batch opened, read and decoded by hand takes {first['cases'][_HAND]['first_s'] * 1000:,.0f} ms.",
        ]
    settings, machine = first["settings"], first["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "pylance", "simplejpeg") if name in machine)
    lines += [
        "",
        f"{settings['rows']:,} photos, batches of {settings['batch_size']}, {settings.get('repeats', 1)} rounds; "
        f"{machine['processor']}; {versions}.",
    ]
    lines += [
        "A process for each run; peak memory is that of a process and its workers. Peers decode with simplejpeg and"
    ]
    lines += ["torch where they bring no decoder of their own.", "", "</details>"]
    return "\n".join(lines)


def _cell(case: dict[str, Any] | None) -> str:
    return f"{case['ratio']:.2f} ({case['ratio_lowest']:.2f}-{case['ratio_highest']:.2f})" if case else ""


def write_readme(reports: dict[str, dict[str, Any]], readme: Path = README) -> None:
    """Replace what is between the markers."""
    before, found, rest = readme.read_text().partition(BEGIN)
    if not found:
        raise SystemExit(f"Expected the marker {BEGIN} in {readme.name}, got none.")
    _, closed, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{text(reports)}\n{END}{after if closed else rest}")


def draw(reports: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel a task, a bar a loader, best first; the whiskers reach from the lowest round to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = next(iter(reports.values()))
    names = sorted({**peers(first), _OURS: first["cases"][_OURS]["ratio"]}, key=lambda n: first["cases"][n]["ratio"])
    figure, panels = plt.subplots(
        1, len(reports), figsize=(4.2 * len(reports) + 2, 0.36 * len(names) + 1.4), sharey=True, squeeze=False
    )
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind a number that meets the line
    for panel, (task, report) in zip(panels[0], reports.items(), strict=True):
        for at, name in enumerate(names):
            case = report["cases"].get(name)
            if case is None:
                continue
            low, high = case["ratio"] - case["ratio_lowest"], case["ratio_highest"] - case["ratio"]
            colour = "#1f6feb" if name == _OURS else "#b6bec9"
            whiskers = {"ecolor": "#444c56", "elinewidth": 1, "capsize": 2.5}
            panel.barh(at, case["ratio"], color=colour, height=0.72, xerr=[[low], [high]], error_kw=whiskers)
            panel.text(case["ratio_highest"] + 0.02, at, f"{case['ratio']:.2f}", va="center", fontsize=8.5, bbox=plain)
        panel.axvline(1, color="#cf222e", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        panel.set_title(TASKS[task], fontsize=10.5, loc="left")
        panel.set_xlim(0, 1.12 * max(case["ratio_highest"] for case in report["cases"].values()) + 0.1)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.set_xlabel("rate, bare loop = 1", fontsize=9)
    panels[0][0].set_yticks(range(len(names)), names, fontsize=9.5)
    panels[0][0].get_yticklabels()[names.index(_OURS)].set_fontweight("bold")
    figure.tight_layout(w_pad=2)
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)


def load_gpu(folder: Path = harness.RESULTS / "gpu") -> dict[str, Any]:
    """The reports of a GPU as one: cases → figures for photos of 0.2 MP in batches of 128, the GPU, the commits.

    A case that is in several files is taken from the one where it was fastest: what else was measured beside it, in the
    same process or not, can only have slowed it.
    """
    found: dict[str, Any] = {"cases": {}, "gpu": "", "commits": [], "cores": 0}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if report.get("benchmark") != "gpu" or _GROUP not in report["groups"]:
            continue
        found |= {"gpu": report["machine"].get("gpu", ""), "cores": report["machine"]["cores"]}
        found["commits"] = sorted({*found["commits"], report["commit"]})
        for name, case in report["groups"][_GROUP]["cases"].items():
            if case["rows_per_s"] > found["cases"].get(name, case)["rows_per_s"] or name not in found["cases"]:
                found["cases"][name] = case
    return found


def draw_gpu(found: dict[str, Any], path: Path) -> None:
    """Left a bar a loader, best first, beside the engine's own rate; right a training step, fed and synthetic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = found["cases"]
    loaders = [name for name in cases if not name.startswith(("limit", "training")) and "shuffle" not in name]
    loaders.sort(key=lambda name: cases[name]["rows_per_s"])
    steps = training_steps(cases)
    height = 0.36 * max(len(loaders), sum(map(len, steps.values()))) + 1.8
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, height), width_ratios=(1.6, 1))
    rates = {_LABELS.get(name, name): (cases[name], name.startswith(_OURS)) for name in loaders}
    _bars(left, rates)
    left.set_title(
        f"images/s, photos of {_GROUP}".replace("MP, batch", "megapixels, batches of"), fontsize=10.5, loc="left"
    )
    if _ENGINE in cases:
        engine = cases[_ENGINE]["rows_per_s"]
        left.axvline(engine, color=_RED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        left.text(
            engine, len(loaders) - 0.55, f"the JPEG engine alone: {engine:,.0f} ", color=_RED, fontsize=8.5, ha="right"
        )
        left.set_xlim(0, 1.04 * max(engine, left.get_xlim()[1]))
    _bars(right, {f"{model}, {how}": (case, how != "synthetic") for model, kinds in reversed(steps.items())
                  for how, case in reversed(kinds.items())}, _shares(steps))  # fmt: skip
    rows = max(len(loaders), sum(map(len, steps.values())))  # bars of one thickness in both, from the top
    for panel in (left, right):
        top = len(panel.patches) - 0.4
        panel.set_ylim(top - rows, top)
    right.set_title("a training step in bfloat16, images/s", fontsize=10.5, loc="left")
    commits = ", ".join(found["commits"])
    figure.text(0.01, 0.005, f"{found['gpu']}, {found['cores']} cores; commit {commits}", fontsize=8.5, color=_DARK)
    figure.tight_layout(w_pad=2, rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)


def training_steps(cases: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Model → "synthetic", "fed", ... → figures. The first GPU run's cases name no model: it was a ResNet-50."""
    found: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        kind, _, how = name.partition(": ")
        if kind.startswith("training"):
            found.setdefault(kind.removeprefix("training").strip() or "ResNet-50", {})[how] = case
    return found


def _shares(steps: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Of the rate on synthetic images, in each bar."""
    found = {}
    for model, kinds in steps.items():
        for how, case in kinds.items():
            if how != "synthetic" and "synthetic" in kinds:
                share = case["rows_per_s"] / kinds["synthetic"]["rows_per_s"]
                found[f"{model}, {how}"] = f"{share:.2f} of synthetic"
    return found


def _bars(panel: Any, bars: dict[str, tuple[Any, bool]], more: dict[str, str] | None = None) -> None:
    """A bar each, the last on top, blue where it is ours; whiskers to the lowest and highest pass."""
    for at, (name, (case, ours)) in enumerate(bars.items()):
        rate, low, high = (case[key] for key in ("rows_per_s", "lowest", "highest"))
        whiskers = {"ecolor": _DARK, "elinewidth": 1, "capsize": 2.5}
        colour = _BLUE if ours else _GRAY
        panel.barh(at, rate, color=colour, height=0.72, xerr=[[rate - low], [high - rate]], error_kw=whiskers)
        plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind a number that meets the line
        place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
        panel.annotate(f"{rate:,.0f}", (high, at), (5, 0), bbox=plain, **place)
        panel.annotate((more or {}).get(name, ""), (0, at), (6, 0), color="white", fontweight="bold", **place)
    if bars:
        panel.set_xlim(0, 1.18 * max(case["highest"] for case, _ in bars.values()))
    panel.set_yticks(range(len(bars)), list(bars), fontsize=9.5)
    for text, (_, ours) in zip(panel.get_yticklabels(), bars.values(), strict=True):
        text.set_fontweight("bold" if ours else "normal")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def scaling(report: dict[str, Any]) -> str:
    """A table of the corners and what limits each."""
    cores, rows = report["machine"]["cores"], report["settings"]["rows"]
    lines = ["# How the rate changes", "", f"`python benchmarks/bench_scaling.py` on {cores} cores, --rows {rows}. "]
    lines[-1] += "The ratio is to the first of each group; what limits is what `dataset.stats()` says."
    lines += [
        "",
        "| case | rows/s | ratio | CPU ms a row | first batch, ms | what limits |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in report["cases"].items():
        cells = [f"{case['rows_per_s']:,.0f}", f"{case['ratio']:.2f}", f"{case['cpu_ms']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {case['first_s'] * 1000:,.0f} | {case.get('limits', '')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Bring README, picture and the table of scaling up to date."""
    corners = harness.RESULTS / "scaling.json"
    if corners.exists():
        (harness.RESULTS / "scaling.md").write_text(scaling(json.loads(corners.read_text())))
    reports = load()
    if not reports:
        raise SystemExit("Expected benchmarks/results/cpu-pixels.json, got none: python benchmarks/run_all.py")
    write_readme(reports)
    try:
        draw(reports, harness.RESULTS / "cpu.png")
        if (seen := load_gpu())["cases"]:
            draw_gpu(seen, harness.RESULTS / "gpu.png")
    except ImportError as error:
        print(f"picture left out, {error.name} is not installed: pip install -e '.[bench]'")


if __name__ == "__main__":
    main()

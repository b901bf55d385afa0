"""The README's figures: benchmarks/results/*.json enter, the text between the markers, cpu.png and scaling.md leave."""

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
    except ImportError as error:
        print(f"picture left out, {error.name} is not installed: pip install -e '.[bench]'")


if __name__ == "__main__":
    main()

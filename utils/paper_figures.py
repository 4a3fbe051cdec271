"""The paper's figure 2 from records: quality over the depth that a teacher was trained at, or is read at."""

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from utils.checked import read_json
from utils.files import atomic_file
from utils.paper_tables import IN_FIGURE, PAPER, Table, depth_points, measured


def depth_figure(table: Table, dataset: str, protocol: str, found: dict, path: Path) -> None:
    """Write the figure, one panel per metric, once teachers of two depths are there.

    The paper's values, from other data and a base of 32 layers, are hollow markers on an axis of their own.
    """
    trained, direct = depth_points(table, protocol, found)
    if len(trained) < 2:
        return
    base = measured(found, protocol, table.rows["SASRec"])
    printed = read_json(PAPER, "")[table.paper[0]]["trained_at_depth"]
    figure = Figure(figsize=(4 * len(IN_FIGURE), 3.6), layout="constrained")
    panels = figure.subplots(1, len(IN_FIGURE))
    for panel, metric in zip(panels, IN_FIGURE, strict=True):
        values = {depth: [run["sampled"][metric] for run in runs] for depth, runs in trained.items()}
        means = [statistics.mean(of) for of in values.values()]
        spread = [statistics.stdev(of) if len(of) > 1 else 0.0 for of in values.values()]
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        panel.plot(list(values), means, "o-", color="black", label=f"trained at this depth, {dataset}")
        panel.fill_between(list(values), low, high, color="0.8", label="± standard deviation over seeds")
        if direct:
            of_layers = [direct[depth]["sampled"][metric] for depth in sorted(direct)]
            panel.plot(sorted(direct), of_layers, "s--", color="0.4", label="read after this layer of the full model")
        if base:
            level = statistics.mean(run["test"]["sampled"][metric] for run in base)
            panel.axhline(level, color="0.6", linestyle=":", label="SASRec")
        other = panel.twinx()
        other.plot(
            printed["layers"], printed[metric], "^", color="0.4", fillstyle="none", label="paper, Cloth, LLaMA-7B"
        )
        other.set_ylabel(f"paper's {metric}", color="0.4")
        panel.set(xlabel="decoder layers", ylabel=f"{metric} among 1 + 999, test")
        panel.grid(alpha=0.3)
    lines = [part for axes in (panels[0], other) for part in zip(*axes.get_legend_handles_labels(), strict=True)]
    figure.legend(*zip(*lines, strict=True), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=110)

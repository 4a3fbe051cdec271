"""The paper's figure 2 from records: quality over the depth that a teacher was trained at, or is read at."""

import statistics
from pathlib import Path

from utils.checked import read_json
from utils.files import atomic_file
from utils.paper_recipes import PAPER, Table
from utils.paper_tables import mean, measured
from utils.report import markdown_table

IN_FIGURE = ("HR@10", "NDCG@10", "MRR")


def depth_points(table: Table, protocol: str, found: dict) -> tuple[dict[int, list[dict]], dict[int, dict]]:
    """Test metrics by depth: of teachers trained at it, one per seed; and of each layer of the full model."""
    trained: dict[int, dict[int, dict]] = {}  # by depth and seed
    direct: dict[int, dict] = {}
    rows = table.rows.values()
    shown = {key: run for key, run in found.items() if key[0] == protocol and key[1] in {row.run for row in rows}}
    for (_, _, seed), run in sorted(shown.items(), key=lambda pair: pair[0]):
        if run["config"]["kind"] == "teacher":  # one per depth and seed: all layers of a small base may be 24
            trained.setdefault(run["config"]["num_layers"], {}).setdefault(seed, run["metrics"]["test"])
        elif run["config"]["kind"] == "layers" and not direct:
            direct = {int(layer): metrics for layer, metrics in run["metrics"]["layers"].items()}
    return {depth: list(of_seeds.values()) for depth, of_seeds in sorted(trained.items())}, direct


def depth_table(table: Table, dataset: str, protocol: str, found: dict) -> str:
    """Figure 2 as a table: sampled HR@10, NDCG@10, MRR and full NDCG@10 over depth, in percent, beside the paper's."""
    trained, direct = depth_points(table, protocol, found)
    printed = read_json(PAPER, "")[table.paper[0]]["trained_at_depth"]
    cells = []
    for depth in sorted({*trained, *direct, *printed["layers"]}):
        of = trained.get(depth, [])
        line = [str(depth), *(mean([run["sampled"][m] for run in of], 100, 2) for m in IN_FIGURE)]
        line += [mean([run["full"]["NDCG@10"] for run in of], 100, 2)]
        line += [
            f"{100 * direct[depth][kind]['NDCG@10']:.2f}" if depth in direct else "-" for kind in ("sampled", "full")
        ]
        at = printed["layers"].index(depth) if depth in printed["layers"] else None
        cells.append(line + ["-" if at is None else f"{100 * printed[m][at]:.2f}" for m in IN_FIGURE])
    header = [f"layers, {dataset}, %", *IN_FIGURE, "full NDCG@10", "direct NDCG@10", "direct, full NDCG@10"]
    return markdown_table([*header, *(f"paper {m}, Cloth" for m in IN_FIGURE)], cells)


def depth_figure(table: Table, dataset: str, protocol: str, found: dict, path: Path) -> None:
    """Write the figure, one panel per metric, once teachers of two depths are there.

    The paper's values, from other data and a base of 32 layers, are hollow markers on an axis of their own.
    """
    trained, direct = depth_points(table, protocol, found)
    if len(trained) < 2:
        return
    base = measured(found, protocol, table.rows["SASRec"]) if "SASRec" in table.rows else []
    printed = read_json(PAPER, "")[table.paper[0]]["trained_at_depth"]
    from matplotlib.figure import Figure  # takes a second to import, which most verbs do not need

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

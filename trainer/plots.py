"""Pictures of a run."""

from pathlib import Path

from datasets.files import replacing


def plot_metric_by_size(results: dict[int, dict[str, float]], ks: tuple[int, ...], title: str, path: Path) -> None:
    """Recall and NDCG against model size, a line per K, written as PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sizes = list(results)
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.color": "#e6e6e6", "axes.axisbelow": True}):  # fmt: skip
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        colours = plt.get_cmap("viridis")([0.78 - 0.75 * i / max(1, len(ks) - 1) for i in range(len(ks))])
        for panel, metric in zip(panels, ("Recall", "NDCG"), strict=True):
            for k, colour in zip(ks, colours, strict=True):
                values = [results[m][f"{metric}@{k}"] for m in sizes]
                panel.plot(sizes, values, marker="o", markersize=4, color=colour)
                panel.annotate(f"@{k}", (sizes[-1], values[-1]), (7, -3), textcoords="offset points", color=colour)
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(m) for m in sizes])
            panel.minorticks_off()
            panel.set_ylim(bottom=0)
            panel.set_xlabel("model size (dimensions)")
            panel.set_title(f"{metric}@K", loc="left")
        figure.suptitle(title, fontsize=11)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        plt.close(figure)

"""Plots of results files: stages of attention, steps by shape, latency against context, heat maps."""
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from hashfast.common import UserError, atomic_path, read_file


def plot(files: list[Path]) -> None:
    """A PNG beside every results file: stages of attention, steps by shape, or latency against context."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    wanted = "give a file that bench --json wrote"
    for path in files:
        try:
            result = json.loads(read_file(path, wanted))
            rows = result["rows"]
            figure, axes = plt.subplots(figsize=(8, 4.5))
            if "attend_us" in rows[0]:
                plot_stages(axes, [row for row in rows if row["mode"] == "default"])
            elif "ttft_s" in rows[0]:
                plot_per_token(axes, rows)
            else:
                plot_latency(axes, rows)
            axes.set_title(f"{result['gpu']}, torch {result['torch']}", fontsize=9)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"cannot plot {path} ({type(error).__name__}: {error}); {wanted}") from error
        figure.tight_layout()
        with atomic_path(path.with_suffix(".png")) as beside:
            figure.savefig(beside, dpi=120, format="png")
        print(path.with_suffix(".png"))


def plot_stages(axes, rows: list[dict]) -> None:
    names = [f"{row['batch']} x {row['context'] // 1024}K, 1/{row['sparsity']}" for row in rows]
    left = [0.0] * len(rows)
    for stage in ("score_us", "select_us", "attend_us"):
        values = [row[stage] / row["dense_best_us"] for row in rows]
        axes.barh(names, values, left=left, label=stage.removesuffix("_us"))
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.plot([row["floor_us"] / row["dense_best_us"] for row in rows], names, "k|", markersize=18, label="bytes / bandwidth")
    for i, row in enumerate(rows):
        axes.text(left[i] + 0.005, i, f"{row['total_us']:.1f} us; dense {row['dense_best_us']:.0f}", va="center", fontsize=8)
    axes.set_xlim(0, 1.25 * max(left))
    axes.set_xlabel("time of one layer's attention, as a share of the fastest dense kernel's")
    axes.legend(fontsize=8)


def plot_latency(axes, rows: list[dict]) -> None:
    shapes = sorted({(row["batch"], row["context"]) for row in rows})
    names = [f"{batch} x {context // 1024}K" for batch, context in shapes]
    for mode, offset in (("dense", -0.2), ("hash", 0.2)):
        found = {(row["batch"], row["context"]): row for row in rows if row["attention"] == mode}
        places = [i + offset for i, shape in enumerate(shapes) if shape in found]
        chosen = [found[shape] for shape in shapes if shape in found]
        axes.bar(places, [row["ms_per_step"] for row in chosen], width=0.38, label=mode)
        axes.hlines([row["floor_ms"] for row in chosen], [x - 0.19 for x in places], [x + 0.19 for x in places], "k",
                    label="bytes / bandwidth" if mode == "hash" else None)
        for x, row in zip(places, chosen, strict=True):
            axes.text(x, row["ms_per_step"], f"{row['ms_per_step']:.1f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(f"batch x context, {rows[0]['model']}, hash at 1/{max(row['sparsity'] for row in rows):g}")
    axes.set_ylabel("ms per decode step")
    axes.legend(fontsize=8)


def plot_per_token(axes, rows: list[dict]) -> None:
    for mode in ("dense", "hash"):
        chosen = [row for row in rows if row["attention"] == mode]
        contexts = [row["context"] for row in chosen]
        (line,) = axes.plot(contexts, [row["ms_per_token"] for row in chosen], "o-",
                            label=mode if mode == "dense" else f"hash, 1/{chosen[0]['sparsity']:g}")
        axes.plot(contexts, [row["floor_ms"] for row in chosen], "--", color=line.get_color(),
                  label=f"{mode}: bytes / bandwidth")
        for row in chosen:
            axes.annotate(f"{row['ms_per_token']:.1f}", (row["context"], row["ms_per_token"]),
                          (0, 5 if mode == "dense" else -13), textcoords="offset points", ha="center", fontsize=8)
    first = {row["context"]: row["ttft_s"] for row in rows}
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:g}")
    axes.set_xticks(list(first), [f"{context // 1024}K\nfirst token {float(f'{seconds:.2g}'):g} s"
                                  for context, seconds in first.items()])
    axes.set_xlabel(f"prompt tokens, {rows[0]['model']}, batch 1")
    axes.set_ylabel("ms per token")
    axes.legend(fontsize=8)


def heat_maps(path: Path, maps: list[tuple[str, Tensor]], across: tuple[str, Sequence[int]], down: tuple[str, Sequence[int]],
              label: str, least: float) -> None:
    """Heat maps side by side, from `least` to 1. maps: titles and values [down, across]; across, down: names and ticks."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = min(6, len(maps))
    lines = -(-len(maps) // columns)
    height = max(2.0, 1 + 0.12 * len(down[1]))
    figure, axes = plt.subplots(lines, columns, figsize=(2.2 * columns + 1, height * lines + 1), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(maps):]:
        axis.axis("off")
    for axis, (title, values) in zip(axes.flat, maps, strict=False):
        image = axis.imshow(values.numpy(), vmin=least, vmax=1, aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set_title(title, fontsize=8)
        axis.set_xticks(range(len(across[1])), labels=map(str, across[1]))
        step = -(-len(down[1]) // 16)
        axis.set_yticks(range(0, len(down[1]), step), labels=map(str, down[1][::step]))
        axis.tick_params(labelsize=6)
    figure.supxlabel(across[0])
    figure.supylabel(down[0])
    figure.colorbar(image, ax=axes, label=label, shrink=0.6)
    with atomic_path(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
    plt.close(figure)

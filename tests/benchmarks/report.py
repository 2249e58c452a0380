"""The cells of paper.py as Markdown and plots, each beside the paper's figure."""

import os
import platform
import re
from pathlib import Path

import palette

try:
    import matplotlib
    from matplotlib import pyplot
except ImportError:  # tables only
    pyplot = None

# The paper's figures: DSR / OR, orders 1 to 4, on Llama-3.2-3B.
PAPER = {
    "in context": "61.7 / 12.3, 51.3 / 10.9, 48.8 / 13.5, 41.9 / 12.3",
    "ORPO (LoRA)": "74.3 / 29.4, 78.1 / 31.4, 75.1 / 28.7, 72.9 / 29.1",
    "SFT (LoRA)": "99.1 / 10.3, 98.8 / 7.4, 99.1 / 5.4, 98.9 / 5.2",
    "MOSAIC-2": "100.0 / 10.4, 99.2 / 6.3, 99.5 / 5.4, 99.7 / 5.0",
    "MOSAIC-5": "99.6 / 8.4, 99.3 / 3.3, 99.8 / 3.3, 99.9 / 2.9",
}
PAPER_GROWTH = {
    "initial": "99.3 / 3.3",
    "+1": "99.5 / 3.4",
    "+2": "99.4 / 3.6",
    "+1+1": "99.3 / 4.2",
}
BEGIN, END = "<!-- results: paper.py --readme writes this -->", "<!-- results end -->"


def hardware(threads: int) -> str:
    """The processor's name, and how many threads a cell had."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    name = name[1].strip() if name else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {threads} threads a cell"


# --- Numbers --------------------------------------------------------------------------


def rates(results: list[dict], order: int, kind: str) -> list[float]:
    """A share in percent at an order, one for each seed."""
    return [100 * result["orders"][order - 1][kind]["rate"] for result in results]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def spread(values: list[float]) -> str:
    """Mean, and lowest and highest where there are several."""
    ends = f" [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else ""
    return f"{mean(values):.1f}{ends}"


def orders_of(results: list[dict]) -> list[int]:
    return [row["order"] for row in results[0]["orders"]]


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def line_of(results: list[dict], kind: str) -> list[float]:
    return [mean(rates(results, r, kind)) for r in orders_of(results)]


# --- Tables ---------------------------------------------------------------------------


def table_1(rows: dict[str, list[dict]]) -> str:
    body = []
    for name, results in rows.items():
        cells = [
            f"{spread(rates(results, r, 'dsr'))} / "
            f"{spread(rates(results, r, 'over_refusal'))}"
            for r in orders_of(results)
        ]
        body.append([name, f"{results[0]['numbers']:,}", *cells])
        if name in PAPER:
            body.append(["the paper's", "", *PAPER[name].split(", "), "-"])
    heads = ["DSR / OR, %", "numbers trained", *(f"order {r}" for r in range(1, 6))]
    return table(heads, body)


def near_misses(rows: dict[str, list[dict]]) -> str:
    body = [
        [name, *(spread(rates(results, r, "near_miss")) for r in orders_of(results))]
        for name, results in rows.items()
    ]
    return table(["near-miss OR, %", *(f"order {r}" for r in range(1, 6))], body)


def table_2(rows: dict[str, list[dict]]) -> str:
    names = {"kl": "KL", "top1": "top-1, %", "perplexity": "perplexity", "mmlu": "MMLU"}
    body = []
    for name, results in rows.items():
        for key, shown in names.items():
            orders = results[0]["utility"]
            if key in orders["1"]:
                scale = 100 if key in ("top1", "mmlu") else 1
                cells = [
                    f"{scale * mean([one['utility'][r][key] for one in results]):.4g}"
                    for r in orders
                ]
                body.append([name, shown, *cells])
    return table(["neutral answers", "", *(f"order {r}" for r in range(1, 6))], body)


def table_3(rows: dict[str, list[dict]]) -> str:
    stages, body = rows["growth"][0]["stages"], []
    for stage, found in stages.items():
        orders = found["orders"]
        both = [
            100 * mean([row[kind]["rate"] for row in orders])
            for kind in ("dsr", "over_refusal")
        ]
        shown = [
            f"{100 * row['dsr']['rate']:.1f} / {100 * row['over_refusal']['rate']:.1f}"
            for row in orders
        ]
        shown += ["-"] * (4 - len(shown))
        average = f"{both[0]:.1f} / {both[1]:.1f}"
        body.append([stage, average, PAPER_GROWTH[stage], *shown])
    heads = ["stage", "mean DSR / OR, %", "the paper's"]
    return table([*heads, *(f"order {r}" for r in range(1, 5))], body)


def knob(rows: dict[str, list[dict]]) -> str:
    """A figure as a table: a row for each value of the knob."""
    body = [
        [name]
        + [
            f"{dsr:.1f} / {over:.1f}"
            for dsr, over in zip(line_of(some, "dsr"), line_of(some, "over_refusal"))
        ]
        for name, some in rows.items()
    ]
    return table(["DSR / OR, %", *(f"order {r}" for r in range(1, 6))], body)


def two_sides(found: dict[str, dict]) -> str:
    """Per order, two sides of DSR and OR, and how far apart."""
    body = []
    for order, sides in found.items():
        for kind, name in (("dsr", "DSR"), ("over_refusal", "OR")):
            a, b = (100 * side[kind]["rate"] for side in sides.values())
            harmonic = 2 * a * b / (a + b) if a + b else 0.0
            cells = [f"{order}, {name}", f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}"]
            body.append([*cells, f"{harmonic:.1f}"])
    first = next(iter(found.values()))
    return table(["order", *first, "difference", "harmonic mean"], body)


# --- What the paper claims, and what is found here ------------------------------------


def claims(rows: dict[str, dict[str, list[dict]]]) -> list[tuple[str, str, str]]:
    """(claim, holds here, figures), for what the cells at hand can tell."""
    said = []

    def claim(text: str, fails: list, detail: str) -> None:
        where = "at order " + ", ".join(map(str, fails))
        said.append((text, "yes" if not fails else f"no, {where}", detail))

    def numbers(values: list[float]) -> str:
        return " / ".join(f"{value:.1f}" for value in values)

    def both(name, a, b, kind, fails, text) -> None:
        x, y = (line_of(some, kind) for some in (a, b))
        bad = [r for r, (p, q) in enumerate(zip(x, y), 1) if fails(p, q)]
        claim(text, bad, f"{numbers(x)} against {numbers(y)}")

    def falls(some, text) -> None:
        x = line_of(some, "dsr")
        bad = [r for r in range(2, len(x) + 1) if x[r - 1] >= x[r - 2]]
        claim(text, bad, numbers(x))

    if main := rows.get("table 1"):
        ours, sft = main["MOSAIC-5"], main["SFT (LoRA)"]
        both("", ours, sft, "dsr", lambda a, b: a < b, "MOSAIC-5: DSR at least SFT's")
        both(
            "", ours, sft, "over_refusal", lambda a, b: a > b / 2,
            "MOSAIC-5: OR at most half of SFT's",
        )  # fmt: skip
        falls(main["in context"], "a written instruction: DSR falls with the order")
    if parts := rows.get("figure 4"):
        falls(parts["without compositions"], "without compositions DSR falls with it")
        both(
            "", parts["MOSAIC-5"], parts["without KD"], "over_refusal",
            lambda a, b: a >= b, "KD lowers OR",
        )  # fmt: skip
    for name, text in (
        ("unseen", "subsets never trained on: DSR within 1 point of seen ones"),
        ("permutations", "token sets in another order: DSR within 1 point"),
    ):
        if rows.get(name):
            (found,) = next(iter(rows[name].values()))[:1]
            sides = found["subsets" if name == "unseen" else "permutations"]
            gaps = {r: gap(side) for r, side in sides.items()}
            bad = [r for r, value in gaps.items() if abs(value) > 1]
            shown = ", ".join(f"order {r}: {v:+.1f}" for r, v in gaps.items())
            claim(text, bad, shown)
    return said


def gap(sides: dict[str, dict]) -> float:
    """How far the second side's DSR lies above the first's, in points."""
    a, b = (100 * side["dsr"]["rate"] for side in sides.values())
    return b - a


# --- Plots ----------------------------------------------------------------------------


def plot(path: Path, lines: dict[str, tuple[list, list, list]], x: str) -> None:
    """DSR and OR side by side; a line is (x values, DSR, OR). SVG, always the same."""
    matplotlib.rcParams["svg.hashsalt"] = "mosaic"
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for side, name in enumerate(("DSR, % (up)", "OR, % (down)")):
        for label, values in lines.items():
            strong = {"linewidth": 2.5} if label == "MOSAIC-5" else {"alpha": 0.8}
            at = range(len(values[0]))
            axes[side].plot(at, values[1 + side], marker="o", label=label, **strong)
            axes[side].set_xticks(at, values[0])
        axes[side].set(title=name, xlabel=x, ylim=(0, 100 if side == 0 else None))
        axes[side].grid(alpha=0.3)
    axes[1].legend(fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def plots(rows: dict[str, dict[str, list[dict]]], folder: Path) -> None:
    def along_orders(some):
        return {
            name: (
                orders_of(results),
                line_of(results, "dsr"),
                line_of(results, "over_refusal"),
            )
            for name, results in some.items()
        }

    def along_knob(some):
        first = next(iter(some.values()))
        return {
            f"order {r}": (
                [*some],
                [line_of(results, "dsr")[r - 1] for results in some.values()],
                [line_of(results, "over_refusal")[r - 1] for results in some.values()],
            )
            for r in orders_of(first)
        }

    x = {"figure 3": "tokens per category", "figure 5": "negatives for a positive"}
    for name in {"table 1", "figure 4"} & {*rows}:
        path = folder / f"{name.replace(' ', '_')}.svg"
        plot(path, along_orders(rows[name]), "order of the policy")
    for name in {"figure 3", "figure 5", "figure 6"} & {*rows}:
        path = folder / f"{name.replace(' ', '_')}.svg"
        plot(path, along_knob(rows[name]), x.get(name, "lambda, weight of the KD"))


# --- The whole ------------------------------------------------------------------------

TITLES = {
    "table 1": "Table 1: methods and orders",
    "table 2": "Table 2: what is left of the other answers",
    "table 3": "Table 3: growth, older tokens frozen",
    "figure 3": "Figure 3: tokens per category",
    "figure 4": "Figure 4: compositions and distillation",
    "figure 5": "Figure 5: negatives for a positive",
    "figure 6": "Figure 6: lambda, the weight of the distillation",
    "unseen": "Subsets that were never trained on",
    "permutations": "Token sets in another order",
    "palette": "The neighbour: Palette",
}


def section(name: str, rows: dict[str, list[dict]]) -> str:
    """One table or figure as Markdown."""
    first = next(iter(rows.values()))[0]
    if name == "table 1":
        return f"{table_1(rows)}\n\n{near_misses(rows)}"
    if name == "palette":
        return palette.markdown(first)
    if name in ("unseen", "permutations"):
        return two_sides(first["subsets" if name == "unseen" else "permutations"])
    return {"table 2": table_2, "table 3": table_3}.get(name, knob)(rows)


def rows_of(grid: dict, found: dict) -> dict[str, dict[str, list[dict]]]:
    return {
        name: {title: [found[c.name] for c in cells] for title, cells in some.items()}
        for name, some in grid.items()
    }


def claims_table(rows: dict[str, dict[str, list[dict]]]) -> str:
    return table(["claim", "here", "figures, %"], [[*one] for one in claims(rows)])


def markdown(grid: dict, found: dict, folder: Path) -> str:
    """Every table that was asked for; plots and a README.md beside the cells."""
    rows = rows_of(grid, found)
    parts = ["# The paper's evidence, remade"]
    if pyplot:
        plots(rows, folder)
    for name in TITLES:
        if name in rows:
            parts += [f"## {TITLES[name]}", section(name, rows[name])]
    if claims(rows):
        parts += ["## What the paper claims, and what is found here"]
        parts += [claims_table(rows)]
    text = "\n\n".join(parts) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    return text

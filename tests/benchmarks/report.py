"""The cells of paper.py as Markdown and pictures, beside the paper's own figures."""

import os
import platform
import re
from itertools import chain
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
    "MOSAIC-5": "99.6 / 8.4, 99.3 / 3.3, 99.8 / 3.3, 99.9 / 2.9",
}
PAPER_GROWTH = {  # one figure a stage
    "initial": "99.3 / 3.3", "+1": "99.5 / 3.4",
    "+1+1": "99.3 / 4.2", "+2": "99.4 / 3.6",
}
KINDS = {"dsr": "DSR", "over_refusal": "OR", "near_miss": "near-miss OR"}
TITLES = {
    "table 1": "Table 1: methods and orders",
    "objective": "The objective: how an answer's tokens are weighed",
    "figure 4": "Figure 4: compositions and distillation",
    "figure 5": "Figure 5: negatives for a positive",
    "table 3": "Table 3: growth, older tokens frozen",
    "palette": "The neighbour: Palette",
}
NOTES = {
    "table 1": "One table, or one adapter, serves every policy. Whatever is trained "
    "had the same tasks for 4 epochs, half of the default's, but for one row. Adapters "
    "read the policy as a rule with the categories' names; their rate was not tuned. "
    "In context: the rule with a summary of each category; low by construction, since "
    "the backbone was taught to follow rules on 60 other topics, and never to decline "
    "one of these five. Mean of the seeds [lowest, highest]. The paper's: "
    "Llama-3.2-3B.",
    "objective": "Weights of positions: an answer's first token 3 and the others 0.3, "
    "going over to 1 in the last third (the default); 1 throughout (the paper's sum); "
    "or 1 / length. Muon but for one row. 4 epochs but for one row.",
    "figure 4": "Seed 0; as many steps without compositions, all on order 1. Paper: "
    "without them DSR is about 50 at order 2 and 33 at order 3; without KD OR rises.",
    "figure 5": "Seed 0, as many steps whatever the ratio, so the more negatives the "
    "fewer positives. The paper: more than 1:1 helps little.",
    "table 3": "Seed 0. Each stage trains its new tokens only, and knows no request of "
    "a category that comes later, but for its near misses, which are neutral.",
}
MARK = "<!-- results -->"  # before and after README's table


def hardware() -> str:
    """The processor's name; a cell has one thread."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    name = name[1].strip() if name else platform.processor()
    return f"{name}, {os.cpu_count()} cores, one thread a cell"


# --- Numbers --------------------------------------------------------------------------

Results = list[dict]  # of one way, a cell for each seed
Rows = dict[str, Results]  # a table's rows


def rates(results: Results, kind: str, key: str = "orders") -> dict[int, list[float]]:
    """{order: shares in percent, one for each seed}."""
    found: dict[int, list[float]] = {}
    for result in results:
        for row in result[key]:
            found.setdefault(row["order"], []).append(100 * row[kind]["rate"])
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def spread(values: list[float]) -> str:
    """Mean, and lowest and highest where there are several."""
    ends = f" [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else ""
    return f"{mean(values):.1f}{ends}"


def dsr_or(results: Results, key: str = "orders", shown=spread) -> dict[int, str]:
    """{order: "DSR / OR"}."""
    over = rates(results, "over_refusal", key)
    return {r: f"{shown(dsr)} / {shown(over[r])}"
            for r, dsr in rates(results, "dsr", key).items()}


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(palette.table(heads, rows)).strip()


def orders(*heads: str, which=range(1, 6)) -> list[str]:
    return [*heads, *(f"order {r}" for r in which)]


# --- Tables ---------------------------------------------------------------------------


def by_order(rows: Rows, paper: bool = False) -> str:
    """DSR / OR, a row for each way; the paper's own below."""
    body = []
    for name, results in rows.items():
        body.append([name, *dsr_or(results).values()])
        if paper and name in PAPER:
            body.append(["the paper's", *PAPER[name].split(", "), "-"])
    return table(orders("DSR / OR, %"), body)


def table_1(rows: Rows) -> str:
    near = [[name, *map(spread, rates(results, "near_miss").values())]
            for name, results in rows.items()]
    later = [[name, *dsr_or(results, "second_turn").values()]
             for name, results in rows.items()]
    moved = [[name, *(f"{mean([one['drift'][r]['kl'] for one in results]):.3f} / "
                      f"{100 * mean([one['drift'][r]['same'] for one in results]):.1f}"
                      for r in "135")]
             for name, results in rows.items()]
    exact = [[name, shown, *(palette.shown(row[kind]) for row in results[0]["orders"])]
             for name, results in rows.items() for kind, shown in KINDS.items()]
    return "\n\n".join([
        by_order(rows, paper=True),
        table(orders("near-miss OR, %"), near),
        "The second turn: each request after a harmless one and its answer, under the "
        "same policies.",
        table(orders("DSR / OR, %", which=(1, 3, 5)), later),
        "Answers to neutral requests: KL(without || with) in nats a token / how often "
        "both put the same token first, %.",
        table(orders("KL / same", which=(1, 3, 5)), moved),
        "Seed 0 with 95% Wilson intervals (n); the same requests come again under many "
        "policies, so true intervals are wider.",
        table(orders("%", ""), exact)])


def table_3(rows: Rows) -> str:
    body = []
    for stage, found in rows["growth"][0]["stages"].items():
        cells = [*dsr_or([found]).values()]
        body.append([stage, ", ".join(found["categories"]), PAPER_GROWTH[stage],
                     *cells, *["-"] * (4 - len(cells))])
    heads = orders("stage", "categories", "the paper's", which=range(1, 5))
    return table(heads, body)


def section(name: str, rows: Rows) -> str:
    """One table or figure as Markdown."""
    if name == "palette":
        return palette.markdown(rows["Palette"][0])
    return {"table 1": table_1, "table 3": table_3}.get(name, by_order)(rows)


def rows_of(grid: dict, found: dict) -> dict[str, Rows]:
    """The grid with each cell's result in its place; what is not finished left out."""
    rows = {
        name: {title: [found[cell] for cell in cells if found[cell]]
               for title, cells in some.items()}
        for name, some in grid.items()}
    rows = {name: {title: results for title, results in some.items() if results}
            for name, some in rows.items()}
    return {name: some for name, some in rows.items() if some}


def markdown(rows: dict[str, Rows], lacking: list[str] = []) -> str:
    """Every table that was asked for; `lacking` names the rows without a result."""
    parts = ["# The paper's evidence, remade"]
    for name in rows:
        parts += [f"## {TITLES[name]}", NOTES.get(name, "")]
        if name in pictured(rows):
            parts += [f"![{TITLES[name]}]({file_of(name)})"]
        parts += [section(name, rows[name])]
    every = [*chain(*chain(*(some.values() for some in rows.values())))]
    took = sum({id(one): one["seconds"] for one in every}.values())  # each cell once
    where = "; ".join(sorted({one["hardware"] for one in every}))
    parts += [f"{took / 3600:.1f} hours of cells in all. Hardware: {where}."]
    parts += [f"Not run: {', '.join(lacking)}." if lacking else ""]
    return "\n\n".join(filter(None, parts)) + "\n"


# --- Pictures -------------------------------------------------------------------------


def picture(path: Path, rows: Rows) -> None:
    """DSR and OR by order, side by side. SVG, always the same."""
    matplotlib.rcParams.update({"svg.hashsalt": "mosaic", "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for side, kind in zip(axes, ("dsr", "over_refusal")):
        for name, results in rows.items():
            line = {r: mean(values) for r, values in rates(results, kind).items()}
            side.plot([*line], [*line.values()], marker="o", label=name)
        up = kind == "dsr"
        side.set(title=f"{KINDS[kind]}, % ({'up' if up else 'down'})",
                 xlabel="order of the policy", ylim=(0, 101 if up else None))
        side.grid(alpha=0.3)
    axes[1].legend(fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def pictured(rows: dict[str, Rows]) -> list[str]:
    """Table 1, figures 4 and 5, if they have two rows or more to compare.

    None without matplotlib.
    """
    names = ("table 1", "figure 4", "figure 5") if pyplot else ()
    return [name for name in names if len(rows.get(name, ())) > 1]


def file_of(name: str) -> str:
    return f"{name.replace(' ', '_')}.svg"


def pictures(rows: dict[str, Rows], folder: Path) -> None:
    """The SVG files that `markdown` shows."""
    for name in pictured(rows):
        picture(folder / file_of(name), rows[name])


# --- README ---------------------------------------------------------------------------


def readme_table(rows: Rows) -> str:
    """Table 1 for README: a cell is "DSR / OR", the mean of the seeds."""
    body = []
    for name, results in rows.items():
        cells = dsr_or(results, shown=lambda values: f"{mean(values):.1f}")
        trained = f"{results[0]['numbers']:,}"
        body.append([name, trained, *(cells[r] for r in (1, 3, 5))])
    return table(orders("DSR / OR, %", "numbers trained", which=(1, 3, 5)), body)


def write_readme(text: str, rows: Rows) -> str:
    """README with its table written anew. ValueError: the marks are not there twice."""
    if text.count(MARK) != 2:
        raise ValueError(f"README has {MARK} {text.count(MARK)} times, not 2")
    before, _, after = text.split(MARK)
    return f"{before}{MARK}\n{readme_table(rows)}\n{MARK}{after}"

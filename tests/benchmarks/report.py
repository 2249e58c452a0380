"""The cells of paper.py as Markdown and plots, each beside the paper's figure."""

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
    "MOSAIC-2": "100.0 / 10.4, 99.2 / 6.3, 99.5 / 5.4, 99.7 / 5.0",
    "MOSAIC-5": "99.6 / 8.4, 99.3 / 3.3, 99.8 / 3.3, 99.9 / 2.9",
}
PAPER_GROWTH = {
    "initial": "99.3 / 3.3",
    "+1": "99.5 / 3.4",
    "+2": "99.4 / 3.6",
    "+1+1": "99.3 / 4.2",
}
SIDES = {"subsets": ("seen", "unseen"), "permutations": ("canonical", "permuted")}
KINDS = {"dsr": "DSR", "over_refusal": "OR", "near_miss": "near-miss OR"}
PLOTS, CATEGORIES = "tests/benchmarks/results", 5


def hardware(threads: int) -> str:
    """The processor's name, and how many threads a cell had."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    name = name[1].strip() if name else platform.processor()
    return f"{name}, {os.cpu_count()} cores, threads of a cell: {threads}"


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
    return "\n".join(palette.table(heads, rows)).strip()


def by_order(*heads: str, last: int = 5) -> list[str]:
    return [*heads, *(f"order {r}" for r in range(1, last + 1))]


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
        trained = f"{results[0]['numbers']:,}"
        if name.startswith("MOSAIC") or "added" in name:
            trained = f"{results[0]['numbers'] // CATEGORIES:,} per category"
        body.append([name, trained, *cells])
        if name in PAPER:
            body.append(["the paper's", "", *PAPER[name].split(", "), "-"])
    return table(by_order("DSR / OR, %", "numbers trained"), body)


def near_misses(rows: dict[str, list[dict]]) -> str:
    body = [
        [name, *(spread(rates(results, r, "near_miss")) for r in orders_of(results))]
        for name, results in rows.items()
    ]
    return table(by_order("near-miss OR, %"), body)


def seeds(rows: dict[str, list[dict]]) -> str:
    """One method's shares over many seeds: mean, lowest, highest."""
    (results,) = rows.values()
    body = [
        [name, *(spread(rates(results, r, kind)) for r in orders_of(results))]
        for kind, name in KINDS.items()
    ]
    return table(by_order(f"%, {len(results)} seeds"), body)


def intervals(result: dict) -> str:
    """One run's shares with their 95% Wilson intervals and n."""
    body = [
        [name, *(palette.shown(row[kind]) for row in result["orders"])]
        for kind, name in KINDS.items()
    ]
    return table(by_order("% [95%] (n)"), body)


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
    return table(by_order("neutral answers", ""), body)


def shared(stage: dict, kind: str) -> float:
    """A stage's mean share in percent over orders 1 and 2, which all stages have."""
    return 100 * mean([row[kind]["rate"] for row in stage["orders"][:2]])


def table_3(rows: dict[str, list[dict]]) -> str:
    stages, body = rows["growth"][0]["stages"], []
    for stage, found in stages.items():
        shown = [
            f"{100 * row['dsr']['rate']:.1f} / {100 * row['over_refusal']['rate']:.1f}"
            for row in found["orders"]
        ]
        shown += ["-"] * (4 - len(shown))
        both = f"{shared(found, 'dsr'):.1f} / {shared(found, 'over_refusal'):.1f}"
        body.append([stage, ", ".join(found["categories"]), both])
        body[-1] += [PAPER_GROWTH[stage], *shown]
    heads = ["stage", "categories", "orders 1 and 2, DSR / OR, %", "the paper's"]
    return table(by_order(*heads, last=4), body)


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
    return table(by_order("DSR / OR, %"), body)


def two_sides(rows: dict[str, list[dict]], key: str) -> str:
    """Per order, two sides of DSR and OR, and how far apart."""
    body, a, b = [], *SIDES[key]
    for name, results in rows.items():
        for order, sides in results[0][key].items():
            for kind, shown in (("dsr", "DSR"), ("over_refusal", "OR")):
                x, y = (palette.shown(sides[side][kind]) for side in (a, b))
                cells = [x, y, f"{gap(sides, key, kind):+.1f}"]
                cells += [f"{harmonic(sides, key, kind):.1f}"]
                body.append([name, f"{order}, {shown}", *cells])
    return table(["", "order", a, b, "difference", "harmonic mean"], body)


def gap(sides: dict[str, dict], key: str, kind: str = "dsr") -> float:
    """How far the second side lies above the first, in points."""
    a, b = (100 * sides[side][kind]["rate"] for side in SIDES[key])
    return b - a


def harmonic(sides: dict[str, dict], key: str, kind: str) -> float:
    a, b = (100 * sides[side][kind]["rate"] for side in SIDES[key])
    return 2 * a * b / (a + b) if a + b else 0.0


# --- Goals and findings ---------------------------------------------------------------


Claim = tuple[str, list, str]  # what, the orders (or stages) where it fails, figures


def numbers(values: list[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def compared(text: str, some: list, other: list, kind: str, holds) -> Claim:
    """A claim on one line of figures against another, order by order."""
    x, y = (line_of(results, kind) for results in (some, other))
    fails = [r for r, (a, b) in enumerate(zip(x, y), 1) if not holds(a, b)]
    return text, fails, f"{numbers(x)} against {numbers(y)}"


def falling(text: str, some: list) -> Claim:
    x = line_of(some, "dsr")
    return text, [r for r in range(2, len(x) + 1) if x[r - 1] >= x[r - 2]], numbers(x)


def claims_on_methods(rows: dict[str, list[dict]]) -> list[Claim]:
    ours, sft = rows["MOSAIC-5"], rows["SFT (LoRA)"]
    half = lambda a, b: a <= b / 2
    return [
        compared("MOSAIC-5: DSR at least SFT's", ours, sft, "dsr", float.__ge__),
        compared("MOSAIC-5: OR at most half SFT's", ours, sft, "over_refusal", half),
        falling("a written instruction's DSR falls with the order", rows["in context"]),
    ]


def claims_on_parts(rows: dict[str, list[dict]]) -> list[Claim]:
    whole, bare = rows["MOSAIC-5"], rows["without KD"]
    alone = rows["without compositions"]
    less = float.__lt__
    return [
        falling("without compositions DSR falls with the order", alone),
        compared("KD lowers OR", whole, bare, "over_refusal", less),
    ]


def claims_on_tokens(rows: dict[str, list[dict]]) -> list[Claim]:
    dsr, over = (line_of(rows["1"], kind) for kind in ("dsr", "over_refusal"))
    fails = [r for r, (a, b) in enumerate(zip(dsr, over), 1) if a < 98 or b > 10]
    text = "one token a category: DSR over 98, OR under 10"
    return [(text, fails, f"{numbers(dsr)}; {numbers(over)}")]


def claims_on_negatives(rows: dict[str, list[dict]]) -> list[Claim]:
    text = "four negatives for a positive lower OR by less than 5 points"
    close = lambda a, b: a - b < 5
    return [compared(text, rows["1"], rows["4"], "over_refusal", close)]


def claims_on_lambda(rows: dict[str, list[dict]]) -> list[Claim]:
    means = {
        name: [mean(line_of(results, kind)) for kind in ("dsr", "over_refusal")]
        for name, results in rows.items()
    }
    least = min(means, key=lambda name: means[name][1])
    shown = ", ".join(f"{name}: {over:.1f}" for name, (_, over) in means.items())
    best = ("OR is least for lambda in 0.8 .. 1.2", [], shown)
    if not 0.8 <= float(least) <= 1.2:
        best = (best[0], [f"lambda {least}"], shown)
    moved = [n for n in means if abs(means[n][0] - means["1.0"][0]) > 3]
    fails = [f"lambda {n}" for n in moved if 0.4 <= float(n) <= 1.6]
    shown = ", ".join(f"{name}: {dsr:.1f}" for name, (dsr, _) in means.items())
    return [best, ("DSR stays within 3 points for 0.4 .. 1.6", fails, shown)]


def claims_on_growth(rows: dict[str, list[dict]]) -> list[Claim]:
    stages = rows["growth"][0]["stages"]
    dsr = {stage: shared(found, "dsr") for stage, found in stages.items()}
    fails = [stage for stage in dsr if dsr[stage] < dsr["initial"] - 1]
    shown = ", ".join(f"{stage}: {value:.1f}" for stage, value in dsr.items())
    return [("growth costs at most 1 point of DSR at orders 1 and 2", fails, shown)]


def claims_on_unseen(rows: dict[str, list[dict]]) -> list[Claim]:
    """Beside a table that has seen all: some subsets are harder than others."""
    half, every = (results[0]["subsets"] for results in rows.values())
    more = {r: gap(half[r], "subsets") - gap(every[r], "subsets") for r in half}
    shown = ", ".join(f"order {r}: {value:+.1f}" for r, value in more.items())
    text = "never having trained on a subset costs at most 1 point of DSR"
    return [(text, [r for r, value in more.items() if value < -1], shown)]


def claims_on_permutations(rows: dict[str, list[dict]]) -> list[Claim]:
    (results,) = rows.values()
    sides = results[0]["permutations"]
    gaps = {r: gap(side, "permutations") for r, side in sides.items()}
    shown = ", ".join(f"order {r}: {value:+.1f}" for r, value in gaps.items())
    text = "token sets in another order: DSR within 1 point"
    return [(text, [r for r, value in gaps.items() if abs(value) > 1], shown)]


def claims_on_seeds(rows: dict[str, list[dict]]) -> list[Claim]:
    (results,) = rows.values()
    width = lambda values: max(values) - min(values)
    apart = {
        r: [width(rates(results, r, kind)) for kind in ("dsr", "over_refusal")]
        for r in orders_of(results)
    }
    shown = "; ".join(numbers(list(some)) for some in zip(*apart.values()))
    text = "ten seeds lie within 2 points, of DSR and of OR"
    return [(text, [r for r, widths in apart.items() if max(widths) > 2], shown)]


def claims(rows: dict[str, dict[str, list[dict]]]) -> list[Claim]:
    """What the cells at hand can tell of the paper's claims, and of open questions."""
    on = {
        "table 1": claims_on_methods,
        "figure 4": claims_on_parts,
        "table 3": claims_on_growth,
        "figure 3": claims_on_tokens,
        "figure 5": claims_on_negatives,
        "figure 6": claims_on_lambda,
        "unseen": claims_on_unseen,
        "permutations": claims_on_permutations,
        "seeds": claims_on_seeds,
    }
    said = [judge(rows[name]) for name, judge in on.items() if name in rows]
    return list(chain(*said))


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
    """The figures at hand as SVG files; none without matplotlib."""
    if not pyplot:
        return

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
    "seeds": "Ten seeds",
}


CAVEAT = (
    "each answer counts as independent, but the same 200 requests come again under "
    "many policies, so true intervals are wider:"
)
NOTES = {
    "table 1": "One adapter, or one table, serves every policy. Adapters read it as a "
    "written rule; SFT had 4 epochs, ORPO 2 at twice the price, tokens 8; the rate of "
    "adapters was not tuned. Adapters added: one for each category, trained alone, on "
    "the plain request. Mean of seeds [lowest, highest]; the paper's: Llama-3.2-3B.",
    "table 2": "On the backbone's own answers to neutral test requests: KL(without || "
    "with) in nats a token, how often both put the same token first, and perplexity. "
    "The paper has MMLU alone (--mmlu), which this backbone cannot do.",
    "table 3": "Seed 0. Every stage trains its new tokens only; older vectors are "
    "checked to be bit-identical. The paper gives one figure a stage.",
    "figure 3": "Seed 0, 4 epochs. The paper: one token already gives DSR over 98.",
    "figure 4": "Seed 0, 4 epochs, as many steps without compositions. The paper: DSR "
    "without them is about 50 at order 2 and 33 at order 3; without KD OR rises.",
    "figure 5": "Seed 0, 4 epochs; more negatives are more steps, too. The paper: more "
    "than 1:1 helps little.",
    "figure 6": "Seed 0, 4 epochs. The paper: OR is best for 0.8 to 1.2, DSR holds for "
    "0.4 to 1.6.",
    "unseen": "Trained on half of the subsets of orders 1 to 4 (3 of 5, 5 of 10, 5 of "
    "10, 3 of 5) or on all, seed 0, 4 epochs; either table under both halves.",
    "permutations": "All other orders of the token sets at order 3; five at 4 and 24 "
    "at 5, drawn by a seed; for the table of MOSAIC-5 with seed 0.",
    "seeds": "Mean of seeds [lowest, highest]; start values and sampling differ.",
    "claims": "The paper's claims and this repository's own goals, some stricter than "
    "the paper's figures; by point estimates alone, so that a miss by a point or two "
    "may be chance. Methods: three seeds, as above. Growth and permutations: seed 0, 8 "
    "epochs; growth starts with two categories, then adds one (+1), another (+1+1), or "
    "two at once (+2). All else but the ten seeds: seed 0, 4 epochs. Figures run over "
    "orders 1 to 5; those of lambda are means over them. Unseen subsets: DSR on them "
    "less that on seen ones, and less the same difference for a table trained on all.",
}


def section(name: str, rows: dict[str, list[dict]]) -> str:
    """One table or figure as Markdown."""
    if name == "table 1":
        seed_0 = "MOSAIC-5 with seed 0 and 95% Wilson intervals; " + CAVEAT
        first = intervals(rows["MOSAIC-5"][0])
        return "\n\n".join([table_1(rows), near_misses(rows), seed_0, first])
    if name == "palette":
        return palette.markdown(next(iter(rows.values()))[0])
    if name in ("unseen", "permutations"):
        return two_sides(rows, "subsets" if name == "unseen" else name)
    own = {"table 2": table_2, "table 3": table_3, "seeds": seeds}
    return own.get(name, knob)(rows)


def rows_of(grid: dict, found: dict) -> dict[str, dict[str, list[dict]]]:
    return {
        name: {title: [found[c.name] for c in cells] for title, cells in some.items()}
        for name, some in grid.items()
    }


def claims_table(rows: dict[str, dict[str, list[dict]]]) -> str:
    body = []
    for text, fails, shown in claims(rows):
        where = ", ".join(map(str, fails))
        where = f"order {where}" if where[:1].isdigit() else where
        body.append([text, f"no: {where}" if fails else "yes", shown])
    return table(["goal", "met", "figures, %"], body)


def markdown(rows: dict[str, dict[str, list[dict]]]) -> str:
    """Every table that was asked for."""
    parts = ["# The paper's evidence, remade"]
    for name, title in TITLES.items():
        if name in rows:
            parts += [f"## {title}", NOTES.get(name, ""), section(name, rows[name])]
    if claims(rows):
        parts += ["## Goals and findings", NOTES["claims"], claims_table(rows)]
    every = [
        one for some in rows.values() for results in some.values() for one in results
    ]
    parts += [f"Hardware: {'; '.join(sorted({one['hardware'] for one in every}))}."]
    return "\n\n".join(filter(None, parts)) + "\n"


# --- README ---------------------------------------------------------------------------


def headline(rows: dict[str, list[dict]]) -> str:
    names = {
        "untouched backbone": "untouched backbone",
        "in context": "written instruction",
        "MOSAIC-5": "**MOSAIC**",
    }
    body = []
    for key, name in names.items():
        kinds = [line_of(rows[key], kind) for kind in KINDS]
        body.append([name, *(numbers([k[r] for k in kinds]) for r in (0, 2, 4))])
    what = "declined, %: active categories / others / near misses"
    return table([what, "one category active", "three", "all five"], body)


def results(rows: dict[str, dict[str, list[dict]]]) -> str:
    main = rows["table 1"]
    return "\n\n".join(
        [
            table_1(main),
            NOTES["table 1"],
            f"MOSAIC-5 with seed 0 and 95% Wilson intervals; {CAVEAT}",
            intervals(main["MOSAIC-5"][0]),
            f"![DSR and OR of each method by order]({PLOTS}/table_1.svg)",
            f"![the same without compositions, without KD]({PLOTS}/figure_4.svg)",
            NOTES["claims"],
            claims_table(rows),
        ]
    )


def write_readme(text: str, rows: dict[str, dict[str, list[dict]]]) -> str:
    """README with its marked blocks written anew. ValueError: a mark is missing."""
    blocks = {"headline": headline(rows["table 1"]), "results": results(rows)}
    blocks["seeds"] = seeds(rows["seeds"])
    for name, block in blocks.items():
        begin, end = f"<!-- {name}: written by paper.py -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or end not in text.partition(begin)[2]:
            raise ValueError(f"README has no {begin} before {end}")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
    return text

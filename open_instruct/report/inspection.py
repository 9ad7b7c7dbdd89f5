"""An inspected soft prompt as text and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from open_instruct.report import pictures


def markdown(result: dict[str, Any], top: int | None = None) -> str:
    """Return tables of the figures.

    Args:
        result: content of inspection.json.
        top: number of virtual tokens in the table, those that moved furthest, else the longest; None: all, in order.
    """
    lines = [f"{result['adapter']}: {result['method']}, {result['virtual_tokens']} virtual tokens"]
    if "norms" in result:
        names = list(result["norms"]["vocabulary"])
        lines += ["", "Length of vectors:", "", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [
            f"| {vectors} | " + " | ".join(f"{values[name]:.3g}" for name in names) + " |"
            for vectors, values in result["norms"].items()
        ]
        lines += [
            "",
            heading(result, top),
            "",
            "| | length | moved | by cosine | by distance | at the start, by cosine |",
            "|---" * 6 + "|",
        ]
        for number in shown_tokens(result, top):
            token = result["end"][number]
            moved = f"{result['moved'][number]:.3g}" if "moved" in result else ""
            before = token_list(result["start"][number]["cosine"]) if "start" in result else "not kept"
            lines.append(
                f"| {number} | {token['norm']:.3g} | {moved} | {token_list(token['cosine'])} "
                f"| {token_list(token['distance'])} | {before} |"
            )
    lines += ["", *(f"Left out: {text}." for text in result["broken"])] if "broken" in result else []
    if result.get("drift"):
        lines += ["", "Drift:", "", "| step | mean distance from the start | mean length |", "|---|---|---|"]
        lines += [f"| {row['step']} | {row['distance']:.3g} | {row['norm']:.3g} |" for row in result["drift"]]
    if "prefix_norms" in result:
        base = result.get("base_norms")
        lines += [
            "",
            "Mean length of keys and values:",
            "",
            "| layer | prefix keys | prefix values | base keys | base values |",
            "|---" * 5 + "|",
        ]
        pairs = zip(result["prefix_norms"]["keys"], result["prefix_norms"]["values"], strict=True)
        labels = result.get("prefix_layers")
        for layer, (key, value) in enumerate(pairs):
            of_base = f"{base['keys'][layer]:.3g} | {base['values'][layer]:.3g}" if base else "|"
            lines.append(f"| {labels[layer] if labels else layer} | {key:.3g} | {value:.3g} | {of_base} |")
    if "attention" in result:
        uniform = result["attention"]["uniform"][0]
        lines += ["", f"Attention to the virtual tokens (all positions alike would give {uniform:.1%}):", ""]
        lines += ["| layer | share |", "|---|---|"]
        lines += [f"| {layer} | {share:.1%} |" for layer, share in enumerate(result["attention"]["mass"])]
    return "\n".join(lines)


def shown_tokens(result: dict[str, Any], top: int | None) -> list[int]:
    """Return the virtual tokens of the table, in its order; see `markdown`."""
    number = len(result["end"])
    if top is None or top >= number:
        return list(range(number))
    size = result.get("moved") or [token["norm"] for token in result["end"]]
    return sorted(range(number), key=lambda i: -size[i])[:top]


def heading(result: dict[str, Any], top: int | None) -> str:
    """Return what stands above the table of tokens."""
    number = len(result["end"])
    if top is None or top >= number:
        return "Nearest tokens:"
    kind = "that moved furthest" if "moved" in result else "that are longest"
    return f"Nearest tokens of the {top} virtual tokens {kind}, of {number} (inspection.json has all):"


def token_list(tokens: list[list[Any]]) -> str:
    """Return tokens with their figures, safe inside a table."""
    return ", ".join(f"`{str(text).replace('|', '¦').replace(chr(10), '⏎')}` {value:.2f}" for text, value in tokens)


def plot(result: dict[str, Any], path: Path) -> None:
    """Write similarities of the virtual tokens, and attention or norms of each layer, as a PNG."""
    panels = [name for name in ("similarity", "prefix_norms", "attention") if name in result]
    figure, grid = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axes, name in zip(grid[0], panels, strict=True):
        if name == "similarity":
            image = axes.imshow(result[name], vmin=-1, vmax=1, cmap="coolwarm")
            figure.colorbar(image, ax=axes, shrink=0.8)
            axes.set_title("cosine between virtual tokens")
        elif name == "attention":
            axes.bar(range(len(result[name]["mass"])), result[name]["mass"])
            axes.axhline(
                result[name]["uniform"][0], color="black", linestyle="--", linewidth=1, label="all positions alike"
            )
            axes.set(title="attention to virtual tokens", xlabel="layer", ylabel="share", ylim=(0, 1))
            axes.legend()
        else:
            for kind, values in result[name].items():
                axes.plot(values, "o-", label=f"prefix {kind}")
            for kind, values in result.get("base_norms", {}).items():
                axes.plot(values, "--", label=f"base {kind}")
            axes.set(title="length of keys and values", xlabel="layer")
            axes.legend()
    pictures.write_picture(figure, path, dpi=120)

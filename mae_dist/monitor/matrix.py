"""A confusion matrix as inline SVG, and the whiskers of intervals beside each other; texts are escaped, colours are
CSS classes.
"""

from collections.abc import Mapping, Sequence
from html import escape

CELL, GAP = 20, 1
LABELLED = 30
"""Classes up to which rows and columns have names, and cells tooltips."""
LONGEST = 16
"""Characters of a name beside the matrix."""
WIDTH, HEIGHT = 150, 14
"""Of whiskers."""


def confusion(order: Sequence[str], counts: Mapping[tuple[str, str], int]) -> str:
    """A figure with a row for each label and a column for each predicted class: how dark a cell is says which share of
    the row's images it has.
    """
    number, named = {name: i for i, name in enumerate(order)}, len(order) <= LABELLED
    totals = dict.fromkeys(order, 0)
    for (label, _), count in counts.items():
        totals[label] += count
    margin = min(LONGEST, max(map(len, order), default=0)) * 9 + 12 if named else 1
    side = len(order) * CELL
    cells = []
    for (label, predicted), count in counts.items():
        share, right = count / max(1, totals[label]), label == predicted
        text = f"{label} taken for {predicted}: {count:,} of {totals[label]:,} images"
        title = f"<title>{escape(text)}</title>" if named else ""
        cells.append(
            f'<rect class="{"c0" if right else "c1"}" x="{margin + number[predicted] * CELL}" '
            f'y="{margin + number[label] * CELL}" fill-opacity="{max(0.06, share):.2g}">{title}</rect>'
        )
    return (
        f'<figure class="matrix"><svg viewBox="0 0 {margin + side} {margin + side}" role="img" '
        f'aria-label="Confusion matrix" style="max-width: {min(margin + side, 760)}px">'
        f'<rect class="back" x="{margin}" y="{margin}" style="width: {side}px; height: {side}px"/>'
        f"{''.join(cells)}{_names(order, margin) if named else ''}</svg></figure>"
    )


def _names(order: Sequence[str], margin: int) -> str:
    parts = []
    for place, name in enumerate(order):
        text = escape(name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}")
        at = margin + place * CELL + CELL / 2
        parts.append(f'<text x="{margin - 6}" y="{at}" dy=".35em" text-anchor="end">{text}</text>')
        parts.append(f'<text transform="translate({at} {margin - 6}) rotate(-90)" dy=".35em">{text}</text>')
    return "".join(parts)


def whisker(ends: tuple[float, float, float], scale: tuple[float, float]) -> str:
    """A point with its interval, `ends` (low, value, high), between the ends of a `scale` that several rows share."""
    span = max(scale[1] - scale[0], 1e-9)
    left, at, right = (round(4 + (WIDTH - 8) * (x - scale[0]) / span, 1) for x in ends)
    middle = HEIGHT / 2
    return (
        f'<svg class="whisker" viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">'
        f'<line x1="{left}" y1="{middle}" x2="{right}" y2="{middle}"/><circle cx="{at}" cy="{middle}" r="3.5"/></svg>'
    )

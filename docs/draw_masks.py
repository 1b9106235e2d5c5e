"""Draws masks.svg from the library's own masks: python docs/draw_masks.py > docs/masks.svg"""

from __future__ import annotations

import torch

from blip2fast.kernels.qformer_attention.layout import MaskKind
from blip2fast.qformer.masks import qformer_mask

QUERIES, TEXT, CELL = 4, 5, 22
QUERY_COLOUR, TEXT_COLOUR = "#0072b2", "#d55e00"
TITLES = {
    MaskKind.UNIMODAL: "ITC: unimodal",
    MaskKind.BIDIRECTIONAL: "ITM: bidirectional",
    MaskKind.MULTIMODAL_CAUSAL: "ITG: multimodal causal",
}


def draw() -> str:
    """Three grids: rows attend to the columns that are filled."""
    side = (QUERIES + TEXT) * CELL
    width, height = 3 * (side + 60) + 10, side + 78
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        "<title>Which rows see which columns in the three passes of stage 1</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (kind, title) in enumerate(TITLES.items()):
        left, top = number * (side + 60) + 40, 58
        visible = qformer_mask(kind, QUERIES, torch.ones(1, TEXT))[0]
        parts.append(f'<text x="{left}" y="20" font-weight="bold">{title}</text>')
        for index in range(QUERIES + TEXT):
            name = "q" if index < QUERIES else "t"
            colour = QUERY_COLOUR if index < QUERIES else TEXT_COLOUR
            at = index * CELL + CELL // 2
            label = f'text-anchor="middle" fill="{colour}">{name}</text>'
            parts.append(f'<text x="{left + at}" y="{top - 8}" {label}')
            parts.append(f'<text x="{left - 14}" y="{top + at + 5}" {label}')
        for row, columns in enumerate(visible.tolist()):
            for column, seen in enumerate(columns):
                of_text = column >= QUERIES
                fill = (TEXT_COLOUR if of_text else QUERY_COLOUR) if seen else "#f0f1f3"
                x, y = left + column * CELL, top + row * CELL
                size = CELL - 2
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{size}" height="{size}" rx="3" fill="{fill}"/>'
                )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    print(draw(), end="")

"""Characters of an invented alphabet: strokes by drawers whose hands vary, at 28x28 pixels."""

from __future__ import annotations

import numpy as np
import torch

SIDE = 28
STROKES, PARTS, SAMPLES = 4, 3, 72  # at most 4 strokes of 72 points, each of at most 3 parts
PAD = 2  # margin in pixels around the image while it is drawn: as far as a pen reaches

# Tables of (share, value) that characters are made of. Angles are in degrees, clockwise from rightwards.
STROKE_COUNT = ((0.20, 1), (0.35, 2), (0.29, 3), (0.16, 4))
PART_COUNT = ((2.0, 4.0), (1.0, 3.2), (1.0, 2.5), (1.0, 2.2))  # (least, most) by number of strokes: many are short ones
HEADING = ((0.40, 0), (0.40, 90), (0.08, 45), (0.12, 125))
ACROSS = ((0.55, 90), (0.15, -90), (0.15, 55), (0.15, 130))  # a stroke's heading minus that of the stroke it touches
BEND = ((0.46, 0), (0.12, 70), (0.12, -70), (0.10, 170), (0.10, -170), (0.05, 340), (0.05, -340))
CORNER = ((0.31, 95), (0.26, -95), (0.13, 140), (0.13, -140), (0.17, 0))
THEIRS = ((0.30, 0.0), (0.40, 0.5), (0.30, 1.0))  # where two strokes touch, as a share of the earlier one's points
OURS = ((0.60, 0.0), (0.30, 0.5), (0.10, 1.0))  # the same, as a share of the later one's points


def draw_glyphs(n_classes: int, n_exemplars: int, seed: int = 0) -> torch.Tensor:
    """Images uint8 `[class, exemplar, 28, 28]`, ink 255 on 0. With the same seed, a larger call extends a smaller one.

    A class is a plan: 1 to 4 strokes of lines, arcs and loops with corners, joined as in handwriting. An exemplar is the plan in
    another hand: each bend and length is a little off, then come rotation, shear, scale, shift and pen width. NumPy computes it,
    because on a busy machine torch's threads would wait long for each other at each of these small steps.
    """
    stroke_plan = np.random.default_rng([seed, 0]).random((n_classes, STROKES, 9))
    part_plan = np.random.default_rng([seed, 1]).random((n_classes, STROKES, PARTS, 4))
    size = 14 + 9 * np.random.default_rng([seed, 2]).random((n_classes, 1))
    points, drawn = _compose(stroke_plan, part_plan, np.zeros((n_classes, STROKES, 3 + 3 * PARTS)))
    low, high = _box(points, drawn)
    zoom = size / np.maximum((high - low).max(-1, keepdims=True), 0.5)
    images = np.empty((n_classes, n_exemplars, SIDE, SIDE), np.uint8)
    for exemplar in range(n_exemplars):
        # Each exemplar has its own random streams, filled class by class: the number drawn does not change what is drawn.
        wobble = np.random.default_rng([seed, 3 + 2 * exemplar]).standard_normal((n_classes, STROKES, 3 + 3 * PARTS))
        hand = np.random.default_rng([seed, 4 + 2 * exemplar]).standard_normal((n_classes, 7))
        for start in range(0, n_classes, 64):  # blocks that stay in the processor's cache
            rows = slice(start, start + 64)
            points, drawn = _compose(stroke_plan[rows], part_plan[rows], wobble[rows])
            low, high = _box(points, drawn)
            points = (points - (low + high)[:, None] / 2) * zoom[rows, None]
            images[rows, exemplar] = _ink(_place(points, drawn, hand[rows]), drawn, hand[rows, 6])
    return torch.from_numpy(images)


def _pick(u: np.ndarray, table: tuple[tuple[float, float], ...]) -> np.ndarray:
    """The value of the table for each uniform `u`."""
    shares, values = np.array(table, np.float64).T
    return values[np.searchsorted(shares.cumsum()[:-1], u)]


def _box(points: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest x and y `[class, 2]` of the drawn points `[class, point, 2]`."""
    shown = drawn[..., None]
    return points.min(1, where=shown, initial=np.inf), points.max(1, where=shown, initial=-np.inf)


def _along(degrees: np.ndarray) -> np.ndarray:
    """Unit vectors `[..., 2]` at these angles."""
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def _compose(stroke_plan: np.ndarray, part_plan: np.ndarray, wobble: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points `[class, point, 2]` of all strokes, and which of them are drawn `[class, point]`.

    A stroke is a walk: its heading turns steadily within a part and jumps at a corner. Each stroke after the first touches an
    earlier one, or runs beside it.
    """
    heading, lean, n_parts, n_strokes, earlier, theirs, ours, across, aside = np.moveaxis(stroke_plan, -1, 0)
    bend, stretch, length, corner = np.moveaxis(part_plan, -1, 0)
    more, bias, longer = np.moveaxis(wobble[..., 3:].reshape(*bend.shape, 3), -1, 0)
    n_strokes = _pick(n_strokes[:, :1], STROKE_COUNT)
    few, many = np.moveaxis(np.array(PART_COUNT)[n_strokes.astype(int) - 1], -1, 0)
    n_parts = np.floor(few + (many - few) * n_parts)

    bend = _pick(bend, BEND) * (0.8 + 0.4 * stretch) * (1 + 0.10 * more) + 7 * bias
    length = (0.45 + 0.75 * length) * (1 + np.abs(bend) / 300) * np.exp(0.10 * longer)
    length *= np.arange(PARTS) < n_parts[..., None]
    turn = _pick(corner, CORNER)
    turn[..., 0] = 0
    into = (turn + bend).cumsum(-1) - bend  # heading at the start of each part, from that of the stroke

    ends, total = length.cumsum(-1), length.sum(-1, keepdims=True)
    far = total * (np.arange(SAMPLES) + 0.5) / SAMPLES  # points are evenly spaced along each stroke
    part = (far[..., None] > ends[..., None, :-1]).sum(-1)
    into, bend, began, length = (np.take_along_axis(x, part, -1) for x in (into, bend, ends - length, length))
    course = into + bend * (far - began) / length

    rows = np.arange(len(heading))
    start = _pick(heading, HEADING)
    beside = aside < 0.3
    theirs = (_pick(theirs, THEIRS) * (SAMPLES - 1) * ~beside).astype(int)
    ours = (_pick(ours, OURS) * (SAMPLES - 1) * ~beside).astype(int)
    walk = np.empty((len(heading), STROKES, SAMPLES, 2))
    for k in range(STROKES):
        onto = (earlier[:, k] * k).astype(int)
        if k:
            start[:, k] = start[rows, onto] + _pick(across[:, k], ACROSS) * ~beside[:, k]
        slant = start[:, k] + 24 * (lean[:, k] - 0.5) + 4 * wobble[:, k, 0]
        walk[:, k] = (_along(slant[:, None] + course[:, k]) * total[:, k, None] / SAMPLES).cumsum(1)
        if k:
            gap = (beside[:, k] * (0.3 + aside[:, k]))[:, None] * _along(start[rows, onto] + 90)
            meet = walk[rows, onto, theirs[:, k]] + gap + 0.05 * wobble[:, k, 1:3]
            walk[:, k] += (meet - walk[rows, k, ours[:, k]])[:, None]
    drawn = np.repeat(np.arange(STROKES) < n_strokes, SAMPLES, -1)
    return walk.reshape(len(walk), -1, 2), drawn


def _place(points: np.ndarray, drawn: np.ndarray, hand: np.ndarray) -> np.ndarray:
    """Points `[class, point, 2]` in pixels from the image's centre, as a hand `[class, 7]` places them; none leaves the image."""
    rotate, shear, wide, tall = 0.10 * hand[:, :4].T[..., None]
    x, y = points[..., 0] * np.exp(wide), points[..., 1] * np.exp(tall)
    x = x + shear * y
    turned = np.stack([x * np.cos(rotate) - y * np.sin(rotate), x * np.sin(rotate) + y * np.cos(rotate)], -1)
    placed = (turned + 1.3 * hand[:, None, 4:6]) * drawn[..., None]
    reach = np.abs(placed).max((1, 2), keepdims=True)
    return placed * np.minimum(12.5 / reach, 1)


def _ink(points: np.ndarray, drawn: np.ndarray, pen: np.ndarray) -> np.ndarray:
    """Images uint8 `[class, 28, 28]`. The pen covers a disc at each point; a pixel is as dark as the disc that covers it most."""
    width = SIDE + 2 * PAD
    at = points + (width - 1) / 2
    cell = np.floor(at)[..., None] + np.arange(-1, 3)  # [class, point, xy, 4]: the pixels within 2 of the point
    x2, y2 = np.moveaxis((cell - at[..., None]) ** 2, 2, 0)
    radius = np.minimum(0.64 * np.exp(0.12 * pen), 1.4)[:, None, None, None]
    dark = np.clip(radius + 0.5 - np.sqrt(y2[..., :, None] + x2[..., None, :]), 0, 1) * drawn[..., None, None]
    x, y = np.moveaxis(cell.astype(int), 2, 0)
    row = np.arange(len(points))[:, None, None] * width + y
    paper = np.zeros(len(points) * width * width)
    np.maximum.at(paper, (row[..., :, None] * width + x[..., None, :]).ravel(), dark.ravel())
    page = paper.reshape(-1, width, width)[:, PAD:-PAD, PAD:-PAD]
    return np.round(255 * page).astype(np.uint8)

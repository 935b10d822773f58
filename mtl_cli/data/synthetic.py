"""Rendered scenes: one coloured shape on a textured ground, made from (scene_seed, row) alone.

Three things to learn about each image: the shape, its colour and its size. Nothing is downloaded
or stored. A scene is data before it is pixels, so that masks, depth and boxes can be drawn from the
same scene.
"""

# P corners of an outline; lengths in scene pixels: the scene is SCENE x SCENE whatever the image is

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from mtl_cli.data.base import Source, Table
from mtl_cli.data.labels import class_values
from mtl_cli.errors import ConfigError, nearest
from mtl_cli.task import mix64

SCENE = 64.0
SHAPES = ("circle", "ring", "square", "triangle", "cross")
COLOURS = {  # hue in degrees
    "red": 0.0,
    "yellow": 55.0,
    "green": 120.0,
    "cyan": 185.0,
    "blue": 235.0,
    "magenta": 300.0,
}
SMALLEST, LARGEST = 20.0, 52.0  # diameter of the enclosing circle
_OVERSAMPLE = 2
Colour = tuple[int, int, int]
Outline = list[tuple[float, float]]


@dataclass(frozen=True)
class Shape:
    """One object of a scene.

    Args:
        kind: index into SHAPES.
        hue: index into COLOURS.
        colour: the RGB it is painted with.
        centre: x, y in scene pixels.
        size: diameter of the enclosing circle in scene pixels.
        angle: rotation in radians.
        depth: 0 nearest, 1 farthest.
    """

    kind: int
    hue: int
    colour: Colour
    centre: tuple[float, float]
    size: float
    angle: float
    depth: float = 0.0

    def outline(self) -> Outline:
        """Polygon [P] of x, y in scene pixels."""
        x0, y0 = self.centre
        points = []
        for radius, angle in _corners(SHAPES[self.kind]):
            r, a = radius * self.size / 2, angle + self.angle
            points.append((x0 + r * math.cos(a), y0 + r * math.sin(a)))
        return points

    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in scene pixels."""
        xs, ys = zip(*self.outline(), strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class Scene:
    """Everything that can be seen in one image.

    Args:
        ground: seed of the ground's texture.
        tint: mean RGB of the ground.
        contrast: amplitude of the ground's texture, 0..255.
        noise: standard deviation of pixel noise, 0..255.
        shapes: objects, the farthest first.
        clutter: grey strokes (x0, y0, x1, y1, width, brightness), partly over the objects.
    """

    ground: int
    tint: Colour
    contrast: float
    noise: float
    shapes: tuple[Shape, ...]
    clutter: tuple[tuple[float, float, float, float, float, int], ...]


def scene(seed: int, row: int, difficulty: float = 0.4) -> Scene:
    """Draw one scene.

    Args:
        seed: ``data.scene_seed``.
        row: number of the scene.
        difficulty: 0 plain ground and pure colours, 1 strong texture, pale mixed hues and strokes.
    """
    draw = Random(mix64(seed, row)).random  # only random() is the same on every Python
    kind, hue = int(draw() * len(SHAPES)), int(draw() * len(COLOURS))
    size = SMALLEST + (LARGEST - SMALLEST) * draw()
    inside = SCENE - size
    centre = (size / 2 + inside * draw(), size / 2 + inside * draw())
    degrees = list(COLOURS.values())[hue] + difficulty * 120.0 * (draw() - 0.5)
    saturation = 0.9 - difficulty * (0.1 + 1.1 * draw())
    colour = _rgb(degrees, saturation, 0.95 - difficulty * 0.45 * draw())
    angle = math.pi * difficulty * 0.5 * (draw() - 0.5)
    shape = Shape(kind, hue, colour, centre, size, angle)
    tint = _rgb(360.0 * draw(), 0.35 * difficulty * draw(), 0.25 + 0.5 * draw())
    strokes = tuple(
        (SCENE * draw(), SCENE * draw(), SCENE * draw(), SCENE * draw(),
         0.6 + 1.6 * draw(), int(255 * draw()))
        for _ in range(round(6 * difficulty))
    )  # fmt: skip
    return Scene(mix64(seed, row, 1), tint, 60.0 * difficulty, 12.0 * difficulty, (shape,), strokes)


def render(view: Scene, size: int) -> np.ndarray:
    """Paint a scene.

    Shape:
        -> uint8 [size,size,3]
    """
    noise = np.random.Generator(np.random.Philox(key=view.ground))
    scale = size * _OVERSAMPLE / SCENE
    coarse = noise.random((8, 8, 3), np.float32) - 0.5
    coarse += noise.random((8, 8, 1), np.float32) - 0.5
    ground = np.clip(np.array(view.tint, np.float32) + view.contrast * coarse, 0, 255).astype(
        np.uint8
    )
    side = size * _OVERSAMPLE
    canvas = Image.fromarray(ground).resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    for shape in view.shapes:
        pen.polygon([(x * scale, y * scale) for x, y in shape.outline()], fill=shape.colour)
    for x0, y0, x1, y1, width, grey in view.clutter:
        ends = [x0 * scale, y0 * scale, x1 * scale, y1 * scale]
        pen.line(ends, fill=(grey, grey, grey), width=max(1, round(width * scale)))
    pixels = np.asarray(canvas.reduce(_OVERSAMPLE), np.float32)
    grain = noise.standard_normal((size, size, 1), np.float32)
    return np.clip(pixels + view.noise * grain, 0, 255).astype(np.uint8)


class Synthetic(Source):
    """Scenes as a data set with the fields ``shape``, ``colour`` and ``size``.

    Outputs may have other names: ``column`` says which field they learn.

    Args:
        count: number of scenes.
        difficulty: 0..1, see :func:`scene`.
        scene_seed: another seed is another data set of the same kind.
    """

    name = "synthetic"

    def __init__(self, count: int = 4000, difficulty: float = 0.4, scene_seed: int = 0) -> None:
        problems = []
        if count < 3:
            problems.append(f"data.count: found {count}, expected 3 or more")
        if not 0 <= difficulty <= 1:
            problems.append(f"data.difficulty: found {difficulty}, expected 0..1")
        if problems:
            raise ConfigError(problems)
        self.count, self.difficulty, self.scene_seed = count, difficulty, scene_seed

    def scene(self, row: int) -> Scene:
        """The scene of one row."""
        return scene(self.scene_seed, row, self.difficulty)

    def table(self, outputs: Mapping[str, Mapping[str, Any]]) -> Table:
        """Labels of all scenes.

        Raises:
            ConfigError: an output asks for a field that scenes do not have.
        """
        shapes = [self.scene(row).shapes[0] for row in range(self.count)]
        colours = tuple(COLOURS)
        names = {
            "shape": [SHAPES[s.kind] for s in shapes],
            "colour": [colours[s.hue] for s in shapes],
        }
        files = [f"scene-{row:05d}" for row in range(self.count)]
        table = Table(files, files, {})
        for output, spec in outputs.items():
            field = str(spec.get("column") or output)
            if field in names:
                classes = [str(c) for c in spec.get("classes") or ()]
                table.labels[output], unknown = class_values(names[field], output, classes)
                table.problems += unknown
            elif field == "size":
                sizes = [s.size for s in shapes]
                table.labels[output] = torch.tensor(sizes, dtype=torch.float64)
            else:
                fields = (*names, "size")
                raise ConfigError(
                    f"outputs.{output}: scenes have no '{field}' (expected one of "
                    f"{', '.join(fields)}){nearest(field, fields)}; name it with column"
                )
        return table

    def image(self, row: int, size: int, resize: str = "crop") -> np.ndarray:
        """Render one scene; scenes are square, so ``resize`` does not matter."""
        del resize
        return render(self.scene(row), size)

    def identity(self) -> str:
        """The scenes' parameters."""
        return f"synthetic 1 {self.scene_seed} {self.difficulty}"


@functools.cache
def _corners(shape: str) -> tuple[tuple[float, float], ...]:
    """Outline of a shape in polar coordinates (radius, angle), enclosing circle of radius 1."""
    turn = 2 * math.pi
    if shape == "ring":  # outer edge, then the inner one backwards: one polygon with a hole
        outer = [(1.0, turn * k / 48) for k in range(49)]
        return (*outer, *((0.55, -angle) for _, angle in outer))
    if shape == "cross":
        arm = 0.32
        half = math.sqrt(1 - arm * arm)
        quarter = [(half, -arm), (half, arm), (arm, arm)]
        return tuple(
            (math.hypot(x, y), math.atan2(y, x) + turn * k / 4)
            for k in range(4)
            for x, y in quarter
        )
    sides = {"circle": 48, "square": 4, "triangle": 3}[shape]
    return tuple((1.0, turn * k / sides) for k in range(sides))


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    """RGB 0..255 of a hue in degrees, saturation and value 0..1."""

    def channel(offset: float) -> int:
        k = (offset + hue / 60.0) % 6.0
        return round(255 * value * (1 - saturation * max(0.0, min(k, 4 - k, 1.0))))

    return channel(5), channel(3), channel(1)

"""Scenes: data before pixels, functions of (scene_seed, row) alone."""

import numpy as np
import pytest

from mtl_cli.data.synthetic import COLOURS, SHAPES, Synthetic, render, scene
from mtl_cli.errors import ConfigError

OUTPUTS = {
    "shape": {"kind": "multiclass", "classes": list(SHAPES)},
    "colour": {"kind": "multiclass", "classes": list(COLOURS)},
    "size": {"kind": "regression"},
}


def test_a_scene_is_a_function_of_seed_and_row():
    assert scene(0, 5) == scene(0, 5)
    assert scene(0, 5) != scene(0, 6)
    assert scene(0, 5) != scene(1, 5)
    np.testing.assert_array_equal(render(scene(0, 5), 32), render(scene(0, 5), 32))
    assert np.array_equal(Synthetic(10).image(3, 32), Synthetic(5000).image(3, 32))


def test_labels_fit_the_pixels():
    source = Synthetic(60, difficulty=0.0)
    table = source.table(OUTPUTS)
    for row in range(60):
        shape = source.scene(row).shapes[0]
        x, y = shape.centre
        pixels = source.image(row, 64).astype(int)
        if SHAPES[shape.kind] != "ring":
            assert np.abs(pixels[int(y), int(x)] - shape.colour).max() < 40
        else:
            assert np.abs(pixels[int(y), int(x)] - shape.colour).max() > 40  # the hole
        left, top, right, bottom = shape.box()
        assert -0.5 <= left < right <= 64.5
        assert -0.5 <= top < bottom <= 64.5
        assert max(right - left, bottom - top) <= shape.size + 1e-6
        assert table.labels["size"][row] == shape.size
        assert table.labels["shape"][row] == shape.kind


def test_classes_are_balanced_and_difficulty_changes_the_image():
    table = Synthetic(2000).table(OUTPUTS)
    for name, classes in (("shape", SHAPES), ("colour", COLOURS)):
        counts = table.labels[name].long().bincount()
        assert len(counts) == len(classes)
        assert counts.min() > 0.7 * 2000 / len(classes)
    easy, hard = (render(scene(0, 1, d), 48).astype(float) for d in (0.0, 1.0))
    assert hard.std() > easy.std()


def test_outputs_may_be_renamed_and_reordered():
    outputs = {"kind_of": {"kind": "multiclass", "column": "shape", "classes": list(SHAPES)[::-1]}}
    table = Synthetic(50).table(outputs)
    plain = Synthetic(50).table(OUTPUTS)
    assert (table.labels["kind_of"] == len(SHAPES) - 1 - plain.labels["shape"]).all()


def test_unknown_field_and_missing_class_are_named():
    with pytest.raises(ConfigError, match=r"scenes have no 'color'.*did you mean 'colour'"):
        Synthetic(5).table({"color": {"kind": "multiclass", "classes": ["red"]}})
    table = Synthetic(50).table({"colour": {"kind": "multiclass", "classes": ["red", "green"]}})
    assert table.problems[0].text.startswith("found '")
    with pytest.raises(ConfigError, match=r"data\.difficulty"):
        Synthetic(5, difficulty=2.0)

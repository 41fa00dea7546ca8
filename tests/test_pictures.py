"""Pictures show the colours they should; tables the numbers, the best of them bold."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.decomposition import PCA
from torch import Tensor

from fd_scale.pictures import (
    PERCENTILES,
    Measured,
    before_after_markdown,
    before_after_table,
    feature_map_picture,
    pca_colours,
)

ROWS = {
    "teacher": {"kNN": Measured(0.8214, 0.0086), "linear": Measured(0.83, 0.01)},
    "student": {"kNN": Measured(0.8349, 0.0082)},
}


def skewed(seed: int, count: int, height: int, width: int, channels: int) -> Tensor:
    """A map with a few tokens unlike the others, as an object before a background."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(count, height, width, channels, generator=generator)
    return (base * torch.linspace(2, 0.1, channels)).exp()


@pytest.mark.parametrize("shape", [(1, 2, 2, 3), (3, 5, 4, 7), (2, 8, 8, 64), (6, 1, 3, 100)])
def test_colours_are_the_principal_components_of_scikit_learn(shape):
    tokens = skewed(0, *shape)
    flat = tokens.flatten(0, 2).double().numpy()
    scores = PCA(3, svd_solver="full").fit_transform(flat)
    scores *= np.where((scores**3).sum(0) < 0, -1, 1)
    low, high = np.percentile(scores, PERCENTILES, axis=0)
    expected = np.clip((scores - low) / (high - low), 0, 1).reshape(*shape[:3], 3)
    # Two decompositions in float64, stored in float32; worst seen 6e-8.
    np.testing.assert_allclose(pca_colours(tokens), expected, atol=1e-6)


def test_colours_do_not_depend_on_rotation_or_order():
    tokens = skewed(1, 4, 6, 6, 12).double()
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    colours = pca_colours(tokens)
    np.testing.assert_allclose(pca_colours(tokens @ rotation + 5), colours, atol=1e-6)
    np.testing.assert_array_equal(pca_colours(tokens.flip(0)), colours[::-1])


def test_what_is_rare_is_bright():
    tokens = torch.zeros(1, 5, 5, 4)
    tokens[0, 2, 2] = torch.tensor([-3.0, 1.0, 0.0, 2.0])
    colours = pca_colours(tokens)
    assert colours[0, 2, 2, 0] == 1
    assert colours.sum() == 1  # everything else, and the components that do not exist, are black


@pytest.mark.parametrize("channels", [1, 2])
def test_narrow_and_constant_maps_have_black_components(channels):
    colours = pca_colours(skewed(2, 2, 3, 3, channels))
    assert colours[..., :channels].max() == 1
    assert colours[..., channels:].max() == 0
    assert pca_colours(torch.ones(1, 2, 2, 8)).max() == 0


def test_a_picture_shows_images_and_maps_side_by_side(tmp_path):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, 0], images[1, 2] = 255, 200
    first, second = skewed(3, 2, 2, 2, 5), skewed(4, 2, 4, 4, 9)
    path = tmp_path / "new" / "maps.png"
    feature_map_picture(images, {"teacher": first, "student": second}, path)
    drawn = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
    inch = 160  # pixels; the layout is a margin of 0.2, a head of 0.5, cells of 1.35 and gaps of 0.08 inches

    def cell(row: int, column: int) -> np.ndarray:
        top, left = (0.5 + row * 1.43) * inch, (0.2 + column * 1.43) * inch
        return drawn[int(top) + 2 : int(top + 1.35 * inch) - 2, int(left) + 2 : int(left + 1.35 * inch) - 2]

    assert (cell(0, 0) == (255, 0, 0)).all()
    assert (cell(1, 0) == (0, 0, 200)).all()
    for column, tokens in ((1, first), (2, second)):
        side = tokens.shape[1]
        for row, colours in enumerate(pca_colours(tokens)):
            shown = cell(row, column)
            centres = [int((i + 0.5) / side * len(shown)) for i in range(side)]
            # Rounded to a level of 255.
            np.testing.assert_allclose(shown[np.ix_(centres, centres)] / 255, colours, atol=1 / 255)
    assert list((tmp_path / "new").iterdir()) == [path]


@pytest.mark.parametrize("shape", [(3, 2, 2, 5), (2, 4, 5)])
def test_maps_of_other_images_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"map 'teacher' of shape .* is not \(B, h, w, D\) of the 2 images"):
        feature_map_picture(
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {"teacher": torch.zeros(shape)}, tmp_path / "a.png"
        )


def test_tables_show_percent_and_leave_out_what_was_not_measured():
    assert before_after_markdown(ROWS) == (
        "| model | kNN | linear |\n"
        "|---|---:|---:|\n"
        "| teacher | 82.1 \u00b1 0.9 | **83.0 \u00b1 1.0** |\n"
        "| student | **83.5 \u00b1 0.8** |  |\n"
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(before_after_table(ROWS, "Accuracy"))
    text = console.export_text()
    for words in ("Accuracy", "82.1 \u00b1 0.9", "83.5 \u00b1 0.8", "student"):
        assert words in text

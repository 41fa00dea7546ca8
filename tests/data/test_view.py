"""Views: torchvision's crops in distribution and in detail, one crop for all sizes, upstream resampling."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import transforms as torchvision_transforms

from fd_scale.data import philox
from fd_scale.data.decode import of_pixels, read
from fd_scale.data.view import Box, apply, centre_view, draw, training_view
from fd_scale.run import recipe
from tests.data.pictures import encoded, picture

VIEW = recipe.View()
SHAPES = [(375, 500), (1, 1), (1, 90), (90, 1), (33, 500), (224, 224), (7, 5)]


def key(number: int) -> bytes:
    return philox.key("fd.test", number)


ROW = philox.as_array([key(9)])[0]


class UniformStream:
    """Stands in for the torch that torchvision draws from: the same arithmetic, fed with our uniforms."""

    log, tensor, exp = torch.log, torch.tensor, torch.exp

    def __init__(self, uniforms: list[float]) -> None:
        self.uniforms = iter(uniforms)

    def empty(self, _: int) -> "UniformStream":
        return self

    def uniform_(self, low: float, high: float) -> torch.Tensor:
        return torch.tensor(
            float(low) + (float(high) - float(low)) * next(self.uniforms), dtype=torch.float64
        )

    def randint(self, low: int, high: int, size: tuple[int]) -> torch.Tensor:
        return torch.tensor(int(next(self.uniforms) * (high - low)) + low)


def as_torchvision_draws(
    number: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, ...]:
    """torchvision's own algorithm on the uniforms of a key, of which a failed attempt throws two away."""
    uniform = philox.uniforms(philox.words(key(number), 41))[1:].reshape(10, 4)
    fits = []
    for row in uniform.tolist():
        area, ratio = (
            height * width * (0.08 + 0.92 * row[0]),
            math.exp(math.log(3 / 4) + math.log(16 / 9) * row[1]),
        )
        fits.append(round(math.sqrt(area * ratio)) <= width and round(math.sqrt(area / ratio)) <= height)
    stream = [
        value for row, fit in zip(uniform.tolist(), fits, strict=True) for value in (row if fit else row[:2])
    ]
    with monkeypatch.context() as patch:
        patch.setattr(torchvision_transforms, "torch", UniformStream(stream))
        return RandomResizedCrop.get_params(torch.zeros(3, height, width), [0.08, 1.0], [3 / 4, 4 / 3])


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_crops_are_torchvisions_on_the_same_uniforms(height, width, monkeypatch):
    boxes = [draw(VIEW, key(n), height, width)[:4] for n in range(200)]
    theirs = [as_torchvision_draws(n, height, width, monkeypatch) for n in range(200)]
    # torchvision takes logarithms of ratios in float32, which may move a rounding by a pixel; none seen.
    differing = [(a, b) for a, b in zip(boxes, theirs, strict=True) if a != b]
    assert len(differing) <= 2
    assert all(np.abs(np.subtract(a, b)).max() <= 1 for a, b in differing)


def test_crops_have_torchvisions_distribution():
    torch.manual_seed(0)
    image = torch.zeros(3, 375, 500)
    count = 4000
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(count)])
    ours = np.array([draw(VIEW, key(n), 375, 500)[:4] for n in range(count)])
    for column in range(4):
        grid = np.sort(np.concatenate([ours[:, column], theirs[:, column]]))
        shares = [
            np.searchsorted(np.sort(part[:, column]), grid, side="right") / count for part in (ours, theirs)
        ]
        # Kolmogorov-Smirnov: 0.043 is the 0.1 % point for two samples of 4000; 0.017 seen.
        assert np.abs(shares[0] - shares[1]).max() < 0.043


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (1.0, 1.0), (0.5, 0.6)])
def test_boxes_lie_inside_the_image(height, width, scale):
    view = recipe.View(crop_scale=scale)
    for number in range(100):
        box = draw(view, key(number), height, width)
        assert 0 <= box.top <= box.top + box.height <= height
        assert 0 <= box.left <= box.left + box.width <= width
        assert box.height >= 1
        assert box.width >= 1


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (100, 100, (0, 0, 100, 100))],
)
def test_when_no_attempt_fits_the_centre_is_taken(height, width, expected):
    # The whole area at these ratios never fits a long image; on a square one a ratio of 1 always does.
    ratio = (1.0, 1.0) if height == width else (3 / 4, 4 / 3)
    box = draw(recipe.View(crop_scale=(1.0, 1.0), crop_ratio=ratio), key(0), height, width)
    assert box[:4] == expected


def test_flips_come_at_their_rate_and_apart_from_the_crop():
    for rate in (0.0, 0.3, 1.0):
        flips = [draw(recipe.View(flip=rate), key(n), 50, 60).flip for n in range(2000)]
        # Standard deviation of the share is 0.01 at most.
        assert abs(np.mean(flips) - rate) <= (0.05 if 0 < rate < 1 else 0)
    assert draw(recipe.View(flip=0.0), key(1), 50, 60)[:4] == draw(recipe.View(flip=1.0), key(1), 50, 60)[:4]


def test_a_view_depends_on_its_key_alone():
    assert draw(VIEW, key(5), 50, 60) == draw(VIEW, philox.as_array([key(5)])[0], 50, 60)
    assert len({draw(VIEW, key(n), 375, 500) for n in range(50)}) == 50


def float64_view(image: np.ndarray, box: Box, size: int, mode: str) -> torch.Tensor:
    crop = image[box.top : box.top + box.height, box.left : box.left + box.width]
    crop = crop[:, ::-1].copy() if box.flip else crop
    planes = torch.from_numpy(crop).permute(2, 0, 1)[None].double()
    return F.interpolate(planes, (size, size), mode=mode, antialias=True, align_corners=False)[0]


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (37, 53), (300, 401), (16, 200)])
def test_pixels_are_the_antialiased_resampling_of_the_crop(height, width, mode):
    image = np.array(picture(1, 300, 401))
    for flip in (False, True):
        box = Box(0, 0, height, width, flip)
        views = apply(of_pixels(image), box, [16, 33, 64], mode)
        assert list(views) == [16, 33, 64]
        for size, view in views.items():
            assert view.dtype == torch.uint8
            assert view.shape == (3, size, size)
            exact = float64_view(image, box, size, mode).clamp(0, 255)
            # Rounding is half a level; the two passes on uint8 add rounding of their own. 1.05 seen.
            assert (view - exact).abs().max() <= 2
            assert (view - exact).abs().mean() <= 0.5  # 0.30 seen


def test_pixels_agree_with_pillow():
    image = picture(2, 200, 260)
    box = Box(20, 31, 150, 201, False)
    expected = np.asarray(image.resize((112, 112), Image.Resampling.BICUBIC, box=(31, 20, 232, 170)))
    # Pillow sees the pixels outside the crop at its edge, so the rim is left out; 1 level seen inside.
    difference = np.abs(
        apply(of_pixels(np.array(image)), box, [112], "bicubic")[112].permute(1, 2, 0).numpy().astype(int)
        - expected
    )
    assert difference[4:-4, 4:-4].max() <= 1


def test_a_crop_of_the_size_asked_for_is_not_resampled():
    image = np.array(picture(3, 40, 50))
    view = apply(of_pixels(image), Box(3, 5, 32, 32, False), [32], "bicubic")[32]
    np.testing.assert_array_equal(view.permute(1, 2, 0).numpy(), image[3:35, 5:37])


def test_the_training_view_draws_and_applies():
    image = of_pixels(np.array(picture(4, 90, 70)))
    row = philox.as_array([key(9)])[0]
    view = recipe.View(interpolation="bilinear", flip=1.0)
    expected = apply(image, draw(view, row, 90, 70), (24, 48), "bilinear")
    for size, pixels in training_view(image, row, (24, 48), view=view).items():
        assert torch.equal(pixels, expected[size])


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (64, 0.9), (33, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(300, 401), (401, 300), (256, 256), (20, 31)])
def test_the_view_of_evaluation_is_timms(size, crop_pct, height, width):
    image = picture(5, height, width)
    evaluate = create_transform(
        (3, size, size), is_training=False, interpolation="bicubic", crop_pct=crop_pct, normalize=False
    )
    expected = evaluate(image).numpy().astype(int)
    view = centre_view(np.array(image), size=size, crop_pct=crop_pct)
    assert view.shape == (3, size, size)
    # timm resamples with Pillow: 1 level seen.
    assert np.abs(view.numpy().astype(int) - expected).max() <= 1


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    error = (one.double() - other.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def test_a_large_jpeg_is_shrunk_where_the_crop_allows_and_looks_the_same():
    image = encoded(picture(7, 1203, 1611), "JPEG", quality=92)
    photo = read(image)
    seen = []
    for number in range(40):
        box = draw(VIEW, key(number), 1203, 1611)
        enough = {2: 96 * 2, 4: 2 * 96 * 4, 8: 2 * 96 * 8}
        divisor = max((d for d in enough if min(box.height, box.width) >= enough[d]), default=1)
        exact, fast = (apply(photo, box, [64, 96], "bicubic", shrink=flag)[96] for flag in (False, True))
        if divisor == 1:
            assert torch.equal(exact, fast)
        else:
            seen.append(psnr(exact, fast))
    assert len(seen) > 20
    assert min(seen) > 40  # 44.1 dB seen at the worst on these smooth pictures with fine grain


def test_a_shrunk_crop_sits_in_its_place():
    """A box moved by half a pixel of the view would show as an error of first order on a ramp."""
    ramp = np.repeat(np.linspace(0, 255, 1600, dtype=np.uint8)[None, :, None], 1200, axis=0).repeat(3, axis=2)
    photo = read(encoded(Image.fromarray(ramp), "JPEG", quality=100, subsampling=0))
    for left in (0, 1, 3, 5, 7, 10):
        box = Box(3, left, 1024, 1024, False)
        exact, fast = (apply(photo, box, [64], "bicubic", shrink=flag)[64].int() for flag in (False, True))
        assert (exact - fast).abs().max() <= 2  # a view's pixel spans 2.5 levels; 1 seen


@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_a_shrunk_crop_ends_where_the_small_image_does(divisor, monkeypatch):
    """Its place and its size may both be rounded up, to beyond the edge."""
    side, top = 131 * divisor, 3 * divisor // 2  # 1.5 pixels of the small image, and 129.5 follow
    photo = read(encoded(picture(6, side, side), "JPEG"))
    asked = []

    def region(*box):
        asked.append(box)
        return np.zeros((*box[2:4], 3), dtype=np.uint8)

    monkeypatch.setattr(photo, "region", region)
    apply(photo, Box(top, top, side - top, side - top, False), [64], "bicubic", shrink=True)
    assert asked == [(2, 2, 129, 129, divisor)]


def test_only_what_may_be_shrunk_is():
    large = picture(8, 800, 900)
    box = Box(0, 0, 800, 800, False)
    png, cmyk = read(encoded(large, "PNG")), read(encoded(large.convert("CMYK"), "JPEG"))
    assert not png.can_shrink
    assert not cmyk.can_shrink
    expected = apply(of_pixels(np.array(large)), box, [32], "bicubic")[32]
    assert torch.equal(apply(png, box, [32], "bicubic", shrink=True)[32], expected)
    assert recipe.View().shrink


def test_asking_for_other_sizes_changes_no_crop():
    photo = of_pixels(np.array(picture(9, 300, 300)))
    small, both = training_view(photo, ROW, [32], view=VIEW), training_view(photo, ROW, [32, 80], view=VIEW)
    assert torch.equal(small[32], both[32])


def test_views_have_their_channels_last_in_memory():
    view = training_view(of_pixels(np.array(picture(9, 90, 80))), ROW, [32], view=VIEW)[32]
    assert view.permute(1, 2, 0).is_contiguous()

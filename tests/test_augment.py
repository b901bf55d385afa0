"""Augmentations: torchvision's arithmetic, a factor a row, a function of (seed, epoch, row)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
from making import by_row, encode, picture
from torchvision_says import FACTORS, KERNEL, RECORD, pictures, says

from gpuload import Batch, ConfigError, Image, LanceDataset
from gpuload.augment import (
    ColorJitter,
    CutMix,
    GaussianBlur,
    MixUp,
    RandAugment,
    RandomErasing,
    RandomGrayscale,
    RandomSolarize,
    TrivialAugmentWide,
    auto,
    blur,
    colour,
    erase,
    mixing,
    rows,
)
from gpuload.order.draws import Draws, Named

pytestmark = pytest.mark.filterwarnings("ignore::gpuload.BadRowWarning")

EVERY: dict[str, Any] = {
    "jitter": ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
    "gray": RandomGrayscale(0.4),
    "blur": GaussianBlur(5, (0.1, 2.0), p=0.5),
    "solarize": RandomSolarize(0.5, p=0.3),
    "erase": RandomErasing(0.6),
    "rand": RandAugment(2, 9),
    "trivial": TrivialAugmentWide(),
}
TOLERANCE = 2e-6  # f32: some roundings of values in 0..1


def draws(rows: int, prefix: str = "", epoch: int = 0) -> Named:
    return Named(Draws(7, epoch, np.arange(rows)), (prefix,))


def ours(name: str) -> torch.Tensor:
    images, factors = pictures(), np.array(FACTORS[name])
    if name[0].isupper():
        return auto.operate(name, images, factors)
    factor = torch.from_numpy(factors.astype(np.float32)).view(-1, 1, 1, 1)
    if name == "blur":
        return blur.blur(images, *KERNEL, factor)
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = getattr(colour, name)
    return function(images, factor)


@pytest.mark.parametrize("name", FACTORS)
def test_operations_are_torchvisions_as_recorded(name: str) -> None:
    with np.load(RECORD) as record:
        np.testing.assert_allclose(ours(name).numpy(), record[name], atol=TOLERANCE, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="the record is compared with above")
@pytest.mark.parametrize("name", FACTORS)
def test_operations_are_those_of_the_torchvision_that_is_installed(name: str) -> None:
    torch.testing.assert_close(ours(name), says(name), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FACTORS)
def test_gray_pictures_stay_gray(name: str) -> None:
    if name in ("saturation", "hue"):
        one = pictures()[:, :1]
        factor = torch.tensor(FACTORS[name]).view(-1, 1, 1, 1)
        assert torch.equal(getattr(colour, name)(one, factor), one)
        return
    images = pictures()[:, :1]
    factors = np.array(FACTORS[name])
    factor = torch.from_numpy(factors.astype(np.float32)).view(-1, 1, 1, 1)
    if name[0].isupper():
        found = auto.operate(name, images, factors)
    elif name == "blur":
        found = blur.blur(images, *KERNEL, factor)
    else:
        found = getattr(colour, name)(images, factor)
    assert found.shape == images.shape


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    files = [encode(picture(40 + i % 5, 50 - i % 7, seed=i), "JPEG") for i in range(24)]
    path = str(tmp_path_factory.mktemp("augment") / "photos.lance")
    lance.write_dataset(pa.table({"image": files, "label": np.arange(24) % 5}), path)
    return path


def rows_of(photos: str, image: Image, batch_size: int, **options: Any) -> dict[int, torch.Tensor]:
    with LanceDataset(photos, batch_size, transforms={"image": image}, **options) as dataset:
        return by_row(dataset, "image")


@pytest.mark.parametrize("name", EVERY)
def test_each_is_a_function_of_the_row(photos: str, name: str, device: str) -> None:
    """The same for any batches, threads and order; others in another epoch; and not for every row the same."""
    image = Image(20, crop="random", mean=0.5, std=0.5, augment=(EVERY[name],))
    plain = rows_of(photos, Image(20, crop="random", mean=0.5, std=0.5), 24, device=device)
    one = rows_of(photos, image, 5, num_threads=1, device=device)
    other = rows_of(photos, image, 24, shuffle=True, device=device)
    assert all(torch.allclose(one[row], other[row], atol=1e-5) for row in range(24))
    if device == "cpu":
        assert all(torch.equal(one[row], other[row]) for row in range(24))
    changed = sum(not torch.allclose(one[row], plain[row], atol=1e-5) for row in range(24))
    assert 3 <= changed <= 24
    dataset = LanceDataset(photos, 24, transforms={"image": image}, device=device)
    dataset.set_epoch(1)
    later, before = by_row(dataset, "image"), rows_of(photos, Image(20, crop="random", mean=0.5, std=0.5), 24)
    assert sum(torch.equal(later[row], one[row]) for row in range(24)) < 12
    assert before.keys() == later.keys()


def test_order_is_drawn_for_each_row_and_factors_stay_in_their_limits() -> None:
    class Told:
        """Factors at the ends of their intervals."""

        def uniform(self, name: str, n: int) -> Any:
            if name == "order":
                return np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
            return np.full((2, n), 1 - 1e-12)

    images = pictures()[:2]
    found = ColorJitter(0.5, 0.5, 0.5, 0.25)(images.clone(), Told())  # type: ignore[arg-type]
    factor, shift = torch.full((1, 1, 1, 1), 1.5), torch.full((1, 1, 1, 1), 0.25)
    first = images[:1]
    for name in ("brightness", "contrast", "saturation"):
        first = getattr(colour, name)(first, factor)
    first = colour.hue(first, shift)
    second = colour.hue(images[1:], shift)
    for name in ("saturation", "contrast", "brightness"):
        second = getattr(colour, name)(second, factor)
    torch.testing.assert_close(found, torch.cat([first, second]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_probabilities_hold(p: float) -> None:
    images = torch.rand(2000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for change in (RandomGrayscale(p), RandomSolarize(0.0, p), GaussianBlur(3, 1.0, p), ColorJitter(0.5, p=p)):
        found = change(images.clone(), draws(2000, "p"))
        share = float((found != images).flatten(1).any(1).float().mean())
        assert abs(share - p) < 0.04


def test_erased_rectangles_have_the_areas_and_shapes_that_were_asked_for() -> None:
    boxes = RandomErasing(1.0, (0.1, 0.2), (0.5, 2.0)).boxes(draws(3000, "e"), 200, 300)
    top, left, height, width = boxes.T
    area = height * width / 60000
    assert area.min() > 0.095
    assert area.max() < 0.205
    assert (height / width).min() > 0.48
    assert (height / width).max() < 2.1
    assert (top >= 0).all()
    assert (top + height <= 200).all()
    assert (left + width <= 300).all()
    assert top.max() > 100  # anywhere it fits
    assert left.max() > 180
    images = torch.ones(3000, 1, 20, 30)
    small = RandomErasing(1.0, (0.1, 0.2), (0.5, 2.0), value=0.25)
    erased = small(images, draws(3000, "e"))
    assert set(erased.unique().tolist()) == {0.25, 1.0}
    assert torch.equal((erased == 0.25).sum((1, 2, 3)), torch.from_numpy(
        small.boxes(draws(3000, "e"), 20, 30)[:, 2:].prod(1)))  # fmt: skip


def test_an_image_that_no_rectangle_fits_stays_as_it_is() -> None:
    boxes = RandomErasing(1.0, (1.0, 1.0), (1.0, 1.0)).boxes(draws(10), 8, 8)
    assert not boxes[:, 2:].any()
    images = torch.rand(10, 3, 8, 8)
    assert torch.equal(RandomErasing(1.0, (1.0, 1.0), (1.0, 1.0))(images.clone(), draws(10)), images)


def test_erasing_comes_after_normalisation_and_everything_else_before(photos: str) -> None:
    seen: list[tuple[float, float]] = []

    def looks(images: torch.Tensor, draws: Any) -> torch.Tensor:
        seen.append((float(images.min()), float(images.max())))
        assert draws.uniform("mine", 2).shape == (len(images), 2)
        return images

    image = Image(16, mean=(0.9,) * 3, std=(0.1,) * 3, augment=(RandomErasing(1.0, (0.3, 0.4)), looks))
    (batch,) = LanceDataset(photos, 24, transforms={"image": image}, device="cpu")
    assert 0 <= seen[0][0] < seen[0][1] <= 1
    assert (batch["image"] == 0).flatten(1).any(1).all(), "the value is the normalised one"
    assert batch["image"].min() < -5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes_and_layouts_stay(photos: str, dtype: torch.dtype, channels_last: bool) -> None:
    def same(images: torch.Tensor, draws: Any) -> torch.Tensor:
        return images

    plain = Image(16, crop="random", dtype=dtype, channels_last=channels_last)
    image = Image(**{**plain.__dict__, "augment": (same,)})
    one, other = rows_of(photos, plain, 24), rows_of(photos, image, 24)
    for row, pixels in one.items():
        assert pixels.dtype == other[row].dtype == dtype
        torch.testing.assert_close(pixels, other[row], atol=1 if dtype == torch.uint8 else 4e-3, rtol=0)
    batch = next(iter(LanceDataset(photos, 24, transforms={"image": image}, device="cpu")))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert batch["image"].is_contiguous(memory_format=layout)


def test_views_and_outputs_are_augmented_independently(photos: str) -> None:
    jitter = (ColorJitter(0.9, 0.9, 0.9, 0.5),)
    columns = {"a": "image", "b": "image"}
    transforms = {"a": Image(16, crop="none", views=2, augment=jitter), "b": Image(16, crop="none", augment=jitter)}
    (batch,) = LanceDataset(photos, 24, columns=columns, transforms=transforms, device="cpu")
    a, b = batch["a"], batch["b"]
    assert not any(torch.allclose(x, y) for x, y in zip(a[:, 0], a[:, 1], strict=True))
    assert not any(torch.allclose(x, y) for x, y in zip(a[:, 0], b, strict=True))


def test_two_of_the_same_kind_draw_for_themselves(photos: str) -> None:
    def told(images: torch.Tensor, draws: Any) -> torch.Tensor:
        numbers.append(draws.uniform("x", 1))
        return images

    numbers: list[Any] = []
    rows_of(photos, Image(16, augment=(told, told)), 24)
    assert not np.array_equal(numbers[0], numbers[1])


def test_what_is_wrong_with_a_callable_is_said(photos: str) -> None:
    def loses(images: torch.Tensor, draws: Any) -> torch.Tensor:
        return images[1:]

    def stops(images: torch.Tensor, draws: Any) -> torch.Tensor:
        return next(iter(()))

    with pytest.raises(ConfigError, match=r"Expected floats \(24, 3, 16, 16\) on cpu from the augmentation .*loses"):
        rows_of(photos, Image(16, augment=(loses,)), 24)
    with pytest.raises(RuntimeError, match="got StopIteration"):
        rows_of(photos, Image(16, augment=(stops,)), 24)
    for wrong in (3, (3,), ColorJitter(0.1)):
        with pytest.raises(ConfigError, match=r"augment=\.\.\."):
            Image(16, augment=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="beside a size"):
        Image(None, augment=(RandomGrayscale(),))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ColorJitter(-0.1), lambda: ColorJitter(hue=0.6), lambda: ColorJitter((0.5, 0.2)),
        lambda: ColorJitter("much"), lambda: ColorJitter(p=2), lambda: RandomGrayscale(-1),
        lambda: GaussianBlur(4), lambda: GaussianBlur(0), lambda: GaussianBlur(3, 0.0), lambda: GaussianBlur(3, (2, 1)),
        lambda: RandomSolarize(128), lambda: RandomErasing(scale=(0.5, 1.5)), lambda: RandomErasing(ratio=(0, 1)),
        lambda: RandomErasing(value="random"), lambda: RandAugment(-1), lambda: RandAugment(2, 31),
        lambda: RandAugment(2.5), lambda: TrivialAugmentWide(1), lambda: MixUp(0, "label", 5),
        lambda: MixUp(1.0, 3, 5), lambda: CutMix(1.0, "label", 0), lambda: CutMix(1.0, "label", 5, p=-1),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="Expected"):
        make()


def test_tables_are_torchvisions() -> None:
    """The operations in their order and the largest magnitudes, as in torchvision's source."""
    assert list(RandAugment.space(31, 224, 224)) == list(TrivialAugmentWide.space(31, 224, 224))
    assert RandAugment.space(31, 331, 662)["TranslateX"][0][-1] == 300  # type: ignore[index]
    assert TrivialAugmentWide.space(31, 331, 662)["Rotate"][0][-1] == 135  # type: ignore[index]
    assert RandAugment.space(31, 9, 9)["Posterize"][0].tolist()[::10] == [8, 7, 5, 4]  # type: ignore[index]


def test_rand_augment_uses_each_operation_about_as_often() -> None:
    chosen = np.bincount(rows.below(draws(14000).uniform("op0", 2)[:, 0], 14), minlength=14)
    assert chosen.min() > 850
    assert chosen.max() < 1150


# whole batches


def mixed(photos: str, *after: Any, image: Image | None = None, **options: Any) -> Batch:
    image = image or Image(16, crop="none")
    with LanceDataset(photos, 24, transforms={"image": image}, after=list(after), **options) as dataset:
        return next(iter(dataset))


@pytest.mark.parametrize("kind", [MixUp, CutMix])
def test_images_and_labels_are_mixed_by_the_same_shares(photos: str, kind: Any, device: str) -> None:
    plain, batch = mixed(photos, device=device), mixed(photos, kind(0.8, labels="label", classes=5), device=device)
    labels = batch["label"].cpu()
    assert (labels.dtype, tuple(labels.shape)) == (torch.float32, (24, 5))
    torch.testing.assert_close(labels.sum(1), torch.ones(24))
    partner = torch.arange(24).roll(1)
    one_hot = torch.nn.functional.one_hot(plain["label"].cpu().long(), 5).float()
    different = plain["label"].cpu() != plain["label"].cpu()[partner]
    own = (labels * one_hot).sum(1)  # the share of its own class, where the partner's is another
    want = own[:, None] * one_hot + (1 - own[:, None]) * one_hot[partner]
    torch.testing.assert_close(labels[different], want[different])
    images, other, got = plain["image"].cpu(), plain["image"].cpu()[partner], batch["image"].cpu()
    if kind is MixUp:
        blended = own.view(-1, 1, 1, 1) * images + (1 - own.view(-1, 1, 1, 1)) * other
        torch.testing.assert_close(got[different], blended[different], atol=1e-5, rtol=0)
        return
    mine, theirs = (got == images).all(1), (got == other).all(1)
    assert (mine | theirs).all()
    area = (~mine).float().mean((1, 2))
    torch.testing.assert_close(area[different], (1 - own)[different], atol=0.02, rtol=0)


def test_partners_are_valid_rows() -> None:
    assert mixing.partners(np.array([True, False, True, True, False])).tolist() == [3, 1, 0, 2, 4]
    assert mixing.partners(np.array([False, True])).tolist() == [0, 1]


def test_a_broken_row_is_nobodys_partner(tmp_path: Path) -> None:
    files = [encode(picture(30, 30, seed=i), "PNG") for i in range(6)]
    files[2] = files[2][:50]
    lance.write_dataset(pa.table({"image": files, "label": np.arange(6)}), str(tmp_path / "x.lance"))
    transforms = {"image": Image(16)}
    (batch,) = LanceDataset(
        str(tmp_path / "x.lance"), 6, transforms=transforms, on_error="mask", after=[MixUp(1.0, "label", 6)],
        device="cpu",
    )  # fmt: skip
    assert batch["label"][2].tolist() == [0, 0, 1, 0, 0, 0]
    assert not batch["image"][2].any()
    assert batch["label"][3, 2] == 0
    assert batch["label"][3, 1] > 0


def test_shares_are_beta() -> None:
    for alpha in (0.2, 1.0, 4.0):
        shares = mixing.beta(draws(20000, "b").uniform("beta", 98), alpha)
        assert abs(shares.mean() - 0.5) < 0.01
        assert abs(shares.var() - 1 / (4 * (2 * alpha + 1))) < 0.004  # the variance of Beta(alpha, alpha)
        assert ((shares >= 0) & (shares <= 1)).all()


def test_rectangles_are_torchvisions() -> None:
    """Centre (x, y) = (2, 7) of 12 x 10, own share 0.75: half of a quarter's root of each side, cut at the edges."""
    (box,) = mixing.rectangles(np.array([[2.5 / 10, 7.1 / 12]]), np.array([0.75]), 12, 10)
    assert box.tolist() == [4, 0, 6, 4]  # rows 4 to 10, columns 0 to 4


def test_mixings_may_follow_each_other_and_views_are_mixed_too(photos: str) -> None:
    chain = (MixUp(0.8, "label", 5, p=0.5), CutMix(1.0, "label", 5, p=0.5))
    batch = mixed(photos, *chain, image=Image(16, crop="random", views=2))
    assert batch["image"].shape == (24, 2, 3, 16, 16)
    torch.testing.assert_close(batch["label"].sum(1), torch.ones(24))


def test_mixing_depends_on_the_batch_alone(photos: str) -> None:
    mix = MixUp(0.8, "label", 5)
    assert torch.equal(mixed(photos, mix, num_threads=1)["image"], mixed(photos, mix, num_threads=3)["image"])


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (MixUp(1.0, "lable", 5), "column among .*'lable'"),
        (MixUp(1.0, "label", 3), "labels from 0 to 2 in 'label', got 3"),
        (MixUp(1.0, "image", 3), "class numbers"),
        (CutMix(1.0, "label", 5, images="label"), "floating images"),
        (lambda batch, draws: None, "Expected a gpuload.Batch"),
    ],
)
def test_what_does_not_fit_the_batch_is_said(photos: str, after: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixed(photos, after)


def test_after_is_a_list_of_callables(photos: str) -> None:
    for wrong in (MixUp(1.0, "label", 5), [3]):
        with pytest.raises(ConfigError, match="after as a list of callables"):
            LanceDataset(photos, 4, after=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="after or to_tensor_fn"):
        LanceDataset(photos, 4, after=[MixUp(1.0, "label", 5)], to_tensor_fn=None)


def test_a_stop_iteration_of_a_mixing_is_an_error(photos: str) -> None:
    with pytest.raises(RuntimeError, match="got StopIteration"):
        mixed(photos, lambda batch, draws: next(iter(())))


def test_the_rectangle_of_each_row_is_its_own() -> None:
    boxes = np.array([[0, 0, 2, 2], [1, 1, 1, 3]])
    where = erase.inside(boxes, torch.zeros(2, 3, 4, 5))
    assert where.sum((1, 2, 3)).tolist() == [4, 3]


@pytest.mark.parametrize("name", sorted(EVERY))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_row_has_the_same_bits_in_a_batch_of_its_own(photos: str, name: str, mode: Any) -> None:
    """Of one channel too, where a convolution over a single plane rounds in another way."""
    image = Image(24, augment=(EVERY[name],), mode=mode)
    alone, together = (rows_of(photos, image, size, device="cpu") for size in (1, 6))
    assert all(torch.equal(alone[row], together[row]) for row in together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("views", [1, 2])
def test_a_masked_row_is_zeros_whatever_the_augmentations_made_of_it(
    tmp_path: Path, views: int, dtype: torch.dtype, device: str
) -> None:
    files = [encode(picture(20, 20), "PNG"), b"no image", None, encode(picture(20, 20), "JPEG")[:60]]
    lance.write_dataset(pa.table({"image": pa.array(files, pa.binary())}), str(tmp_path / "x"))
    more = {} if dtype == torch.uint8 else {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    image = Image(16, views=views, augment=(lambda images, draws: 1 - images,), dtype=dtype, **more)
    with LanceDataset(str(tmp_path / "x"), 4, transforms={"image": image}, on_error="mask", device=device) as dataset:
        (batch,) = dataset
    assert batch.valid.tolist() == [True, False, False, False]
    assert batch["image"].cpu().reshape(4, -1).bool().any(dim=1).tolist() == [True, False, False, False]


@pytest.mark.parametrize("kind", [pa.uint8(), pa.uint16(), pa.uint32(), pa.int8(), pa.int64()], ids=str)
def test_labels_are_integers_of_any_kind(tmp_path: Path, kind: pa.DataType, device: str) -> None:
    files = [encode(picture(9, 9), "PNG")] * 4
    lance.write_dataset(pa.table({"image": files, "label": pa.array([0, 3, 1, 2], kind)}), str(tmp_path / "x"))
    words: Any = {"transforms": {"image": Image(8)}, "after": [MixUp(0.8, "label", 4, p=0.0)], "device": device}
    with LanceDataset(str(tmp_path / "x"), 4, **words) as dataset:
        (batch,) = dataset
    assert batch["label"].argmax(dim=1).tolist() == [0, 3, 1, 2]


def test_a_label_of_a_row_that_is_not_valid_is_no_error(tmp_path: Path) -> None:
    """Such as -1 where there is no picture: it is a row of zeros."""
    files = [encode(picture(9, 9), "PNG"), b"no image", encode(picture(9, 9), "PNG")]
    lance.write_dataset(pa.table({"image": files, "label": [0, -1, 2]}), str(tmp_path / "x"))
    after = [MixUp(0.8, "label", 3), CutMix(1.0, "label", 3)]
    words: Any = {"transforms": {"image": Image(8)}, "after": after, "device": "cpu"}
    (batch,) = LanceDataset(str(tmp_path / "x"), 3, on_error="mask", **words)
    assert torch.allclose(batch["label"].sum(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ConfigError, match="Expected labels from 0 to 1 in 'label', got 2"):
        list(LanceDataset(str(tmp_path / "x"), 3, on_error="mask", **{**words, "after": [MixUp(0.8, "label", 2)]}))


def test_bytes_that_are_erased_are_rounded_and_clipped(photos: str) -> None:
    image = Image(16, dtype=torch.uint8, augment=(RandomErasing(1.0, value=(300.0, -4.0, 6.6)),))
    for pixels in rows_of(photos, image, 8, device="cpu").values():
        erased = (pixels[0] == 255) & (pixels[1] == 0) & (pixels[2] == 7)
        assert erased.sum() >= 4

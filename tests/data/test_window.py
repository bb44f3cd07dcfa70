from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from samadapt.data.labels import IGNORE
from samadapt.data.volume import Geometry, Volume
from samadapt.data.window import (
    GREY_LEVELS,
    PER_CASE,
    Window,
    choose_window,
    default_window,
    foreground_values,
)
from samadapt.errors import ConfigError, InputError

RNG = np.random.default_rng(0)


def volume(array, modality="unknown", display_ready=False):
    array = np.asarray(array)
    array = array if array.ndim == 4 else array[None]
    return Volume(array, Geometry(array.shape[1:], np.eye(4)), modality, Path("case"), display_ready)


def ct(mean, spread=20.0, shape=(20, 20, 10)):
    """Air at -1000, with tissue of the given HU in the middle; the mask marks the tissue."""
    values = np.full(shape, -1000, np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[5:15, 5:15, 2:8] = 1
    values[mask > 0] = RNG.normal(mean, spread, int(mask.sum()))
    return volume(values, "CT"), mask


def test_fixed_window():
    values = np.array([-300, -160, 40, 240, 900], np.float32).reshape(1, 5, 1, 1)
    np.testing.assert_allclose(Window("fixed", -160, 240).apply(values).ravel(), [0, 0, 0.5, 1, 1])


def test_percentiles_are_of_each_case():
    values = RNG.normal(100, 10, (1, 20, 20, 20)).astype(np.float32)
    once, scaled = PER_CASE.apply(values), PER_CASE.apply(values * 37 + 5)
    np.testing.assert_allclose(once, scaled, atol=1e-4)
    assert once.min() == 0
    assert once.max() == 1


@pytest.mark.parametrize("background", [0.0, -3.6, 5000.0])
def test_constant_background_is_left_out(background):
    values = RNG.normal(100, 10, (20, 20, 20)).astype(np.float32)
    padded = np.pad(values, 15, constant_values=background)[None]
    assert foreground_values(padded).size == values.size
    low, high = PER_CASE.limits(padded)
    np.testing.assert_allclose((low, high), np.percentile(values, (0.5, 99.5)), rtol=1e-4)


def test_dark_corners_of_a_full_image_count():
    values = RNG.normal(100, 10, (20, 20, 20)).astype(np.float32)
    values[0, 0, 0] = values[-1, -1, -1] = 0
    assert foreground_values(values[None]).size == values.size


def test_large_image_is_sampled_without_bias():
    values = np.zeros((1, 256, 256, 64), np.float32)
    values[...] = np.arange(64)
    sample = foreground_values(values)
    assert sample.size < 2_000_000
    np.testing.assert_allclose(np.bincount(sample.astype(int), minlength=64)[1:] / sample.size, 1 / 64, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 7.0, -1000.0, 1e30, 1e-30])
def test_constant_image_gives_zeros(value):
    out = PER_CASE.apply(np.full((1, 4, 4, 4), value, np.float32))
    assert out.dtype == np.float32
    assert (out == 0).all()


windows = st.one_of(
    st.tuples(st.just("percentile"), st.floats(0, 49), st.floats(51, 100)),
    st.tuples(st.just("fixed"), st.floats(-1e6, 0), st.floats(1, 1e6)),
).map(lambda args: Window(*args))


@given(
    array=arrays(np.float32, array_shapes(min_dims=3, max_dims=3, max_side=5).map(lambda s: (1, *s)),
                 elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    window=windows,
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_whatever_is_finite_becomes_zero_to_one(array, window):
    out = window.apply(array)
    assert out.dtype == np.float32
    assert out.shape == array.shape
    assert np.isfinite(out).all()
    assert out.min() >= 0
    assert out.max() <= 1


@given(
    arrays(np.float32, (1, 4, 4, 4), elements=st.floats(-2000, 4000, width=32)),
    windows,
)
@settings(max_examples=100, deadline=None)
def test_brighter_stays_brighter(array, window):
    order = np.argsort(array.ravel())
    assert (np.diff(window.apply(array).ravel()[order]) >= 0).all()


def test_the_image_itself_is_not_changed():
    array = RNG.normal(0, 1, (1, 4, 4, 4)).astype(np.float32)
    before = array.copy()
    PER_CASE.apply(array)
    np.testing.assert_array_equal(array, before)


def test_colour_stays_colour():
    rgb = RNG.integers(0, 256, (3, 4, 5, 1), dtype=np.uint8)
    np.testing.assert_allclose(GREY_LEVELS.apply(rgb), rgb / np.float32(255), rtol=1e-6)


def test_defaults():
    grey = np.zeros((4, 4, 4), np.float32)
    assert default_window(volume(grey, "CT")) == Window("fixed", -160, 240)
    assert default_window(volume(grey, "MR")) == PER_CASE
    assert default_window(volume(grey)) == PER_CASE
    assert default_window(volume(grey, display_ready=True)) == GREY_LEVELS
    assert default_window(volume(np.zeros((3, 4, 4, 1), np.uint8), "RGB")) == GREY_LEVELS


def test_ct_window_holds_the_labelled_tissue():
    cases = [ct(50), ct(60)]
    window = choose_window((v for v, _ in cases), (m for _, m in cases))
    assert window.kind == "fixed"
    assert window.low < -10
    assert window.high > 120
    assert window.high - window.low == pytest.approx(300, abs=1)


def test_bone_gets_a_bone_window():
    image, mask = ct(900, spread=250)
    window = choose_window([image], [mask])
    assert window.low < 300
    assert window.high > 1500
    assert window.high <= 3071


def test_a_small_class_counts_as_much_as_a_large_one():
    image, mask = ct(50)
    image.array[0, 0, 0, 0] = 700
    mask[0, 0, 0] = 2
    assert choose_window([image], [mask]).high > 700


def test_ct_without_labels_takes_soft_tissue():
    image, mask = ct(50)
    assert choose_window([image], [mask * 0]) == Window("fixed", -160, 240)


def test_mixed_modalities_take_percentiles():
    image, mask = ct(50)
    other = volume(image.array.copy(), "MR")
    assert choose_window([image, other], [mask, mask]) == PER_CASE
    assert choose_window([other, image], [mask, mask]) == PER_CASE
    assert choose_window([other], [mask]) == PER_CASE


def test_volumes_are_read_one_at_a_time():
    alive = []

    def volumes():
        for _ in range(3):
            alive.append(1)
            assert len(alive) == 1
            yield ct(50)[0]
            alive.pop()

    choose_window(volumes(), (ct(50)[1] for _ in range(3)))


def test_no_volume():
    with pytest.raises(InputError, match="no labelled volume"):
        choose_window([], [])


def test_mask_of_another_shape():
    image, mask = ct(50)
    with pytest.raises(InputError, match="shape"):
        choose_window([image], [mask[1:]])


@given(windows)
def test_kept_with_the_model(window):
    assert Window.from_dict(window.to_dict()) == window


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"kind": "fixed", "low": 3, "high": 3},
        {"kind": "fixed", "low": "x", "high": 3},
        {"kind": "sigmoid", "low": 0, "high": 1},
        {"kind": "percentile", "low": -1, "high": 99},
        {"kind": "percentile", "low": 1, "high": 101},
        {"kind": "fixed", "low": float("nan"), "high": 1},
        {"kind": "fixed", "low": 0, "high": None},
    ],
)
def test_what_is_no_window(value):
    with pytest.raises(ConfigError):
        Window.from_dict(value)


def test_what_nobody_has_labelled_is_not_looked_at():
    image, mask = ct(60)
    image.array[0, 15:] = 1500
    bone = {value: mask.copy() for value in (0, 2, IGNORE)}
    for value, one in bone.items():
        one[15:] = value
    windows = {value: choose_window([image], [one]) for value, one in bone.items()}
    assert windows[IGNORE] == windows[0]
    assert windows[2].high > windows[0].high

import dataclasses

import nibabel
import numpy as np
import pytest
import torch

from samadapt.data.cases import find_cases
from samadapt.data.coverage import Coverage
from samadapt.data.geometry import Geometry
from samadapt.data.labels import LabelMap
from samadapt.data.volume import read_volume
from samadapt.data.window import PER_CASE
from samadapt.errors import InputError
from samadapt.evaluation import unet
from samadapt.evaluation.metrics import dice
from samadapt.training.slices import read_case

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = LabelMap(("bright", "dark"))


def geometry(shape, spacing=(1, 1, 1)):
    return Geometry(shape, np.diag([*spacing, 1.0]))


@pytest.mark.parametrize(
    ("shapes", "spacing", "expected"),
    [
        ([(38, 50, 40), (33, 56, 41)], (1, 1, 1), (40, 56, 48)),
        ([(200, 200, 100)], (1, 1, 1.5), (64, 64, 64)),
        ([(256, 256, 10)], (1, 1, 7), (128, 128)),
        ([(40, 40, 40), (40, 40, 40)], (1, 1, 3), (128, 128)),
        ([(700, 500, 1)], (1, 1, 1), (128, 128)),
        ([(100, 90, 5)], (1, 1, 1), (128, 128)),
    ],
)
def test_geometry_decides_between_2d_and_3d(shapes, spacing, expected):
    assert unet.Plan.of([geometry(shape, spacing) for shape in shapes]).shape == expected


def test_colour_is_2d():
    assert unet.Plan.of([geometry((40, 40, 40))], colour=True).dimensions == 2


def test_dimensions_can_be_told_unless_there_are_no_three():
    deep, shallow = geometry((40, 40, 40)), geometry((100, 90, 10), (1, 1, 8))
    assert unet.Plan.with_dimensions(2, [deep]).shape == (128, 128)
    assert unet.Plan.with_dimensions(3, [shallow]).shape == (64, 64, 16)
    with pytest.raises(InputError, match="several slices"):
        unet.Plan.with_dimensions(3, [geometry((100, 90, 1))])
    with pytest.raises(InputError, match="grey"):
        unet.Plan.with_dimensions(3, [deep], colour=True)


@pytest.fixture
def phantoms(tmp_path):
    """Three noisy volumes with a bright and a dark ball, in an orientation that has to be turned."""

    def write(count, shape, spacing):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir()
        for seed in range(count):
            random = np.random.default_rng(seed)
            centre = np.array(shape) / 2 + random.uniform(-1, 1, 3)
            grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) * spacing
            label = np.zeros(shape, dtype=np.uint8)
            for value, side in ((1, -0.2), (2, 0.2)):
                ball = np.linalg.norm(grid - centre * spacing - np.array([side * shape[0], 0, 0]), axis=-1)
                label[ball < 0.18 * shape[0]] = value
            image = np.array([100.0, 200.0, 0.0])[label] + random.normal(0, 5, shape)
            affine = np.diag([*(spacing * np.array([1, -1, 1])), 1.0])
            nibabel.save(nibabel.Nifti1Image(image, affine), tmp_path / "images" / f"p{seed}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(label, affine), tmp_path / "labels" / f"p{seed}.nii.gz")
        return find_cases(tmp_path)

    return write


@pytest.mark.parametrize(
    ("shape", "spacing", "dimensions"), [((24, 24, 16), (1, 1, 1), 3), ((32, 32, 6), (1, 1, 5), 2)]
)
def test_learns_a_phantom_in_few_steps(phantoms, tmp_path, monkeypatch, shape, spacing, dimensions):
    monkeypatch.setattr(unet, "FRAME_SIZE", 32)
    monkeypatch.setattr(unet, "LEARNING_RATE", 1e-2)
    monkeypatch.setattr(unet, "time", Clock(steps=50))
    *training, test = phantoms(3, shape, spacing)
    reports = []
    trained = unet.train_unet(
        training, LABELS, PER_CASE, 1.0, tmp_path / "slices", progress=lambda *report: reports.append(report)
    )
    volume, truth, _ = read_case(test, LABELS)
    found = trained.segment(volume)
    assert trained.plan.dimensions == dimensions
    assert found.shape == truth.shape
    assert found.dtype == np.uint8
    assert min(dice(found, truth, LABELS).values()) > 0.6
    assert trained.steps == len(reports) == 50
    assert not trained.network.training


class Clock:
    """Stands in for the module ``time``, so that a second is so many steps on any machine."""

    def __init__(self, steps):
        self._step, self._now = 1 / steps, -1 / steps

    def monotonic(self):
        self._now += self._step
        return round(self._now, 9)


def test_a_volume_smaller_than_the_patch_comes_back_whole(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(unet, "time", Clock(steps=1))
    training = phantoms(1, (20, 22, 18), (1, 1, 1))
    trained = unet.train_unet(training, LABELS, PER_CASE, 1.0, tmp_path / "slices")
    assert trained.plan.shape == (24, 24, 24)
    assert trained.segment(read_volume(training[0].image)).shape == (20, 22, 18)


@pytest.mark.parametrize(
    ("shape", "spacing", "dimensions"), [((24, 24, 16), (1, 1, 1), 3), ((32, 32, 6), (1, 1, 5), 2)]
)
def test_what_is_drawn_where_nobody_has_labelled_has_no_effect(
    phantoms, tmp_path, monkeypatch, shape, spacing, dimensions
):
    """Nor has a class that nobody has looked for, which another case shows."""
    monkeypatch.setattr(unet, "FRAME_SIZE", 32)
    one, two = phantoms(2, shape, spacing)
    covers = Coverage(tuple(range(1, shape[2], 2)), ("bright",))
    cases = [dataclasses.replace(one, coverage=covers), two]
    found = []
    for value in (0, 2):
        image = nibabel.load(one.label)
        mask = np.asarray(image.dataobj).copy()
        mask[:, :, ::2] = value
        mask[(mask == 2) & (value == 0)] = 0
        nibabel.save(nibabel.Nifti1Image(mask, image.affine), one.label)
        monkeypatch.setattr(unet, "time", Clock(steps=4))
        trained = unet.train_unet(cases, LABELS, PER_CASE, 1.0, tmp_path / f"slices {value}")
        assert trained.plan.dimensions == dimensions
        found.append(trained.network.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

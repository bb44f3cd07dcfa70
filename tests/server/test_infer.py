"""The infer tasks without a server: label maps, slices, formats, and the cache of models and images."""

import json
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from PIL import Image

from samadapt.config import AppConfig
from samadapt.data.labels import LabelMap
from samadapt.errors import InputError
from samadapt.inference.examine import Examination
from samadapt.project import Project
from samadapt.server import infer, models
from samadapt.server.labels import LabelSource

SHAPE = (6, 8, 5)
AFFINE = np.diag([1.0, 1.0, 3.0, 1.0])


class Published:
    """Stands in for ``Models`` with a model of the given labels (None: nothing published)."""

    def __init__(self, labels):
        self.learned = labels
        self.volume = models.Models(AppConfig(), Project("nowhere")).volume
        self.cache = None

    def trained(self):
        return self.learned is not None

    def current(self):
        return models.Served(SimpleNamespace(info=SimpleNamespace(labels=self.learned, training={})), "v0007")

    prompted = current


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.float32), AFFINE), path)
    return str(path)


def labels_of(tmp_path, *names):
    return LabelSource(LabelMap(names) if names else None, tmp_path, Project(tmp_path))


def found(mask, classes):
    """What ``examine`` gives: the mask, and a model that is rather sure of it."""
    slices = mask.shape[2]
    sure = Examination(
        2,
        np.zeros((slices, classes), int),
        np.linspace(0, 1, slices),
        np.zeros((slices, classes)),
        np.full(classes, 0.9),
    )
    return mask, sure


@pytest.fixture
def asked(monkeypatch):
    """Models that ``examine`` was asked for; its mask holds value n in slice n of the model's own order."""
    calls = []

    def examine(model, volume, progress=None, cache=None):
        calls.append(model)
        mask = np.zeros(volume.geometry.shape, np.uint8)
        for value in range(1, len(model.info.labels.names) + 1):
            mask[:, :, value] = value
        return found(mask, len(model.info.labels.names))

    monkeypatch.setattr(infer, "examine", examine)
    return calls


def run(task, image, **request):
    file, params = task({"image": image, "result_extension": ".nii.gz", **request})
    mask = nibabel.load(file)
    np.testing.assert_array_equal(mask.affine, AFFINE)
    return np.asarray(mask.dataobj), params


def test_masks_follow_the_label_map_of_the_app_not_the_model(tmp_path, image, asked):
    task = infer.Segmentation(Published(LabelMap(("b", "A", "gone"))), labels_of(tmp_path, "a", "b", "new"))
    mask, params = run(task, image)
    assert params["label_names"] == {"a": 1, "b": 2, "new": 3}
    assert params["model_version"] == "v0007"
    assert params["message"] == "not learned yet: new"
    assert [np.unique(mask[:, :, k]).tolist() for k in range(5)] == [[0], [2], [1], [0], [0]]


def test_every_mask_says_what_it_is_worth_and_where_the_model_is_least_sure(tmp_path, image, asked):
    _, params = run(infer.Segmentation(Published(LabelMap(("a", "b"))), labels_of(tmp_path, "a", "b")), image)
    assert params["quality"]["dice"] == {"a": 0.9, "b": 0.9}
    assert params["quality"]["unsure_slices"][:2] == [4, 3]


def test_a_structure_that_is_not_there_is_said_to_be_not_found_and_has_no_figure(tmp_path, image, monkeypatch):
    def examine(model, volume, **_):
        mask, sure = found(np.ones(volume.geometry.shape, np.uint8), 2)
        return mask, replace(sure, overlap=np.array([0.9, np.nan]))

    monkeypatch.setattr(infer, "examine", examine)
    _, params = run(infer.Segmentation(Published(LabelMap(("a", "b"))), labels_of(tmp_path, "a", "b")), image)
    assert params["quality"]["dice"] == {"a": 0.9}
    assert params["quality"]["mean"] == 0.9
    assert params["quality"]["not_found"] == ["b"]
    json.dumps(params, allow_nan=False)


def test_label_prompt_restricts_the_classes(tmp_path, image, asked):
    task = infer.Segmentation(Published(LabelMap(("a", "b"))), labels_of(tmp_path, "a", "b"))
    mask, params = run(task, image, label_prompt=[2])
    assert np.unique(mask).tolist() == [0, 2]
    assert "message" not in params


def test_a_model_that_finds_nothing_says_so(tmp_path, image, monkeypatch):
    monkeypatch.setattr(
        infer, "examine", lambda model, volume, **_: found(np.zeros(volume.geometry.shape, np.uint8), 1)
    )
    task = infer.Segmentation(Published(LabelMap(("a",))), labels_of(tmp_path, "a", "new"))
    mask, params = run(task, image)
    assert not mask.any()
    assert params["message"] == f"not learned yet: new; a: {infer.NONE_OF_THEM}"


def test_nothing_learned_is_an_empty_mask_and_a_message(tmp_path, image, asked):
    mask, params = run(infer.Segmentation(Published(None), labels_of(tmp_path)), image)
    assert mask.shape == SHAPE
    assert not mask.any()
    assert params["message"] == infer.NOTHING_LEARNED
    assert asked == []


@pytest.fixture
def clicked(monkeypatch):
    """Prompts and slices that the click functions were asked for; they answer with everything."""
    calls = []

    def segment_slice(model, volume, axis, index, prompts, cache):
        calls.append((index, prompts))
        return np.ones([size for a, size in enumerate(volume.geometry.shape) if a != axis][::-1], bool)

    def segment_object(model, volume, prompts, cache):
        calls.append((None, prompts))
        return np.ones(volume.geometry.shape, bool)

    monkeypatch.setattr(infer, "segment_slice", segment_slice)
    monkeypatch.setattr(infer, "segment_object", segment_object)
    return calls


@pytest.mark.parametrize(
    ("request_", "index"),
    [
        ({"foreground": [[1, 1, 1], [2, 2, 3]]}, 3),  # the last click says which slice
        ({"foreground": [[1, 1, 1], [2, 2, 3]], "slice": 1}, 1),
        ({"foreground": [[1, 1, 1]], "background": [[2, 2, 1], [2, 2, 3]]}, 1),
        ({"roi": [0, 3, 0, 3, 4, 1]}, 2),
        ({"roi": [0, 3, 0, 3, 4, 1], "slice": 0}, 0),
    ],
)
def test_2d_clicks_fill_one_slice_with_the_prompts_on_it(tmp_path, image, clicked, request_, index):
    mask, params = run(infer.Clicks(Published(None), labels_of(tmp_path), 2), image, label="tail", **request_)
    ((asked, prompts),) = clicked
    assert asked == index
    assert all(point[2] == index for point in prompts.foreground + prompts.background)
    assert set(np.nonzero(mask)[2]) == {index}
    assert params["label_names"] == {"tail": 1}


def test_3d_clicks_pass_on_all_prompts(tmp_path, image, clicked):
    mask, _ = run(infer.Clicks(Published(None), labels_of(tmp_path), 3), image, foreground=[[1, 1, 1], [2, 2, 3]])
    ((_, prompts),) = clicked
    assert prompts.foreground == [(1, 1, 1), (2, 2, 3)]
    assert mask.all()


@pytest.mark.parametrize("request_", [{}, {"background": [[1, 1, 1]]}, {"foreground": [[1, 1, 1]], "slice": 0}])
def test_clicks_without_anything_to_go_by_are_refused(tmp_path, image, clicked, request_):
    with pytest.raises(InputError):
        run(infer.Clicks(Published(None), labels_of(tmp_path), 2), image, **request_)


def test_a_2d_image_gets_a_png_by_default(tmp_path, clicked):
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((7, 9), np.uint8)).save(path)
    file, _ = infer.Clicks(Published(None), labels_of(tmp_path), 2)({"image": str(path), "foreground": [[8, 6]]})
    assert file.endswith(".png")
    assert np.asarray(Image.open(file)).shape == (7, 9)


def test_one_slice_that_lies_in_space_stays_a_nifti(tmp_path, clicked):
    """A PNG would lose where it lies."""
    path = tmp_path / "slice.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 7, 1), np.float32), AFFINE), path)
    file, _ = infer.Clicks(Published(None), labels_of(tmp_path), 2)({"image": str(path), "foreground": [[8, 6, 0]]})
    assert file.endswith(".nii.gz")
    np.testing.assert_allclose(nibabel.load(file).affine, AFFINE)


def test_finding_nothing_is_said(tmp_path, image, monkeypatch):
    monkeypatch.setattr(infer, "segment_object", lambda model, volume, prompts, cache: np.zeros(SHAPE, bool))
    _, params = run(infer.Clicks(Published(None), labels_of(tmp_path), 3), image, roi=[1, 1, 1, 1, 1, 1])
    assert "nothing was found" in params["message"]


def test_a_refused_answer_leaves_no_file_behind(tmp_path, image, clicked, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError):
        infer.Clicks(Published(None), labels_of(tmp_path), 3)(
            {"image": image, "foreground": [[1, 1, 1]], "result_extension": ".png"}
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.nii.gz"]


class Fake:
    """An ``AdaptedModel`` as far as ``Models`` is concerned."""

    def __init__(self, source):
        self.source = source

    @property
    def info(self):
        return SimpleNamespace(answers_prompts=self.source != "plain" and self.source.stem == "v0002")

    def merge(self):
        pass

    def eval(self):
        return self

    def to(self, device):
        return self


def test_models_load_once_and_again_when_another_version_is_published(tmp_path, monkeypatch):
    loads = []

    def load(source, **options):
        loads.append(source)
        return Fake(source)

    monkeypatch.setattr(models.recipes, "build", lambda *arguments: load("plain"))
    monkeypatch.setattr(models.AdaptedModel, "load", load)
    monkeypatch.setattr(models, "read_info", lambda path: SimpleNamespace(backbone="lite_medsam"))
    project = Project(tmp_path)
    cache = models.Models(AppConfig(), project)
    assert loads == []
    assert not cache.trained()
    assert cache.current().version == models.PLAIN
    assert cache.current() is cache.current()
    for version in ("v0001", "v0002"):
        path = project.models / f"{version}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        project.publish(path)
        assert cache.trained()
        assert cache.current().version == version
        assert cache.current() is cache.current()
    assert [getattr(source, "stem", source) for source in loads] == ["plain", "v0001", "v0002"]


def test_clicks_are_answered_by_the_plain_model_where_a_training_found_it_better(tmp_path, monkeypatch):
    """``Fake`` says so of every version but v0002."""
    monkeypatch.setattr(models.recipes, "build", lambda *arguments: Fake("plain"))
    monkeypatch.setattr(models.AdaptedModel, "load", lambda source, **options: Fake(source))
    monkeypatch.setattr(models, "read_info", lambda path: SimpleNamespace(backbone="lite_medsam"))
    project = Project(tmp_path)
    project.models.mkdir(parents=True)
    cache = models.Models(AppConfig(), project)
    for version, answering in (("v0001", models.PLAIN), ("v0002", "v0002"), ("v0003", models.PLAIN)):
        path = project.models / f"{version}.safetensors"
        path.write_bytes(b"")
        project.publish(path)
        assert cache.prompted().version == answering
        assert cache.current().version == version
    assert cache.prompted() is cache.prompted()


def test_images_stay_in_memory_until_their_file_changes(tmp_path, image):
    cache = models.Models(AppConfig(), Project(tmp_path))
    first = cache.volume(image)
    assert cache.volume(image) is first
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 3, 3), np.float32), AFFINE), image)
    assert cache.volume(image).geometry.shape == (3, 3, 3)

"""Where the label map comes from, and that its indices never move."""

import json

import pytest

from samadapt.data.coverage import NAMED, Coverage
from samadapt.data.labels import LabelMap
from samadapt.project import Project
from samadapt.server.labels import LabelSource, label_warnings, newcomers


class Store:
    """Final labels as ``SafeDatastore.json`` lists them: image -> (time, label_info, *drawn values)."""

    def __init__(self, labels):
        self.labels = labels

    complete = True

    def knows_all_labels(self):
        return self.complete

    def json(self):
        def entry(ts, info, *drawn):
            told = {"ts": ts, "name": "x", "label_info": info}
            return {"labels": {"final": {"info": {**told, "drawn": list(drawn)} if drawn else told}}}

        return {"objects": {"plain": {"labels": {}}, **{image: entry(*label) for image, label in self.labels.items()}}}


def named(*names):
    return [{"name": name, "idx": index} for index, name in enumerate(names, start=1)]


@pytest.fixture
def source(tmp_path):
    return LabelSource(None, tmp_path, Project(tmp_path))


def test_nothing_known_at_first(source):
    assert source.current() is None
    assert source.indices() == {}


def test_names_come_in_the_order_of_submission(source):
    source.learn_from(Store({"b": (20, named("c", "a")), "a": (10, named("a", "b"))}))
    assert source.indices() == {"a": 1, "b": 2, "c": 3}


def test_names_keep_their_order_when_labels_change_or_the_server_restarts(source, tmp_path):
    source.learn_from(Store({"a": (10, named("a", "b"))}))
    source.learn_from(Store({"a": (99, named("b", "a")), "b": (50, named("z", "b"))}))
    assert source.indices() == {"a": 1, "b": 2, "z": 3}
    assert LabelSource(None, tmp_path, Project(tmp_path)).indices() == source.indices()


def test_a_name_that_nobody_draws_any_more_leaves_the_list(source):
    source.learn_from(Store({"a": (10, named("mistake", "b"))}))
    source.learn_from(Store({"a": (20, named("mistake", "b"), 2)}))  # listed, and not drawn
    assert source.indices() == {"b": 1}
    source.learn_from(Store({"a": (30, named("mistake", "b"), 7)}))
    assert source.indices() == {}
    assert source.current() is None


def test_no_name_leaves_while_a_label_without_names_follows_their_order(source):
    source.learn_from(Store({"a": (10, named("a", "b"))}))
    source.learn_from(Store({"a": (20, named("b")), "b": (30, None)}))
    assert source.indices() == {"a": 1, "b": 2}


def test_no_name_leaves_while_the_labels_cannot_be_seen(source):
    source.learn_from(Store({"a": (10, named("a", "b"))}))
    away = Store({})
    away.complete = False
    source.learn_from(away)
    assert source.indices() == {"a": 1, "b": 2}


def test_names_that_differ_in_form_alone_are_one(source):
    source.learn_from(
        Store({"a": (10, named("M\u00fcller", "liver")), "b": (20, named(" LIVER", "mu\u0308LLER", "x"))})
    )
    assert source.indices() == {"M\u00fcller": 1, "liver": 2, "x": 3}


def test_labels_json_beside_the_images_wins_over_submitted_names(source, tmp_path):
    source.learn_from(Store({"a": (10, named("a"))}))
    (tmp_path / "labels.json").write_text(json.dumps(["x", "y"]))
    source.learn_from(Store({"a": (10, named("b"))}))
    assert source.indices() == {"x": 1, "y": 2}


def test_configured_labels_win_over_everything(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(["x"]))
    source = LabelSource(LabelMap(("p", "q")), tmp_path, Project(tmp_path))
    source.learn_from(Store({"a": (10, named("b"))}))
    assert source.indices() == {"p": 1, "q": 2}


def test_background_is_no_structure(source):
    source.learn_from(Store({"a": (1, [{"name": "background", "idx": 0}, {"name": "liver", "idx": 4}])}))
    assert source.indices() == {"liver": 1}


FRONT_BACK = LabelMap(("front", "back"))


@pytest.mark.parametrize(
    ("info", "present", "labels", "words"),
    [
        (named("front", "back"), {1, 2}, FRONT_BACK, []),
        (named("Front ", "BACK"), {1, 2}, FRONT_BACK, []),
        (named("front", "spleen"), {1}, FRONT_BACK, []),
        (named("front", "spleen"), {1, 2}, FRONT_BACK, ["'spleen'", "front, back", "background", "labels.json"]),
        (named("front", "front"), {1, 2}, FRONT_BACK, ["values 1, 2", "'front'", "one structure"]),
        (named("front"), {1, 7}, FRONT_BACK, ["value 7", "no name"]),
        (None, {1, 2}, FRONT_BACK, ["no names", "1 = front, 2 = back"]),
        (None, {1, 255}, FRONT_BACK, ["no names", "1 = front, 2 = back, 255 = not labelled"]),
        (None, {1}, None, ["no names", "nothing can be learned"]),
        (named("front"), set(), FRONT_BACK, ["empty"]),
    ],
)
def test_an_annotator_is_told_what_is_odd_about_a_label(info, present, labels, words):
    submitted = {} if info is None else {"label_info": info}
    warnings = label_warnings(submitted, present, labels)
    assert len(warnings) == bool(words)
    assert all(word in warnings[0] for word in words)


def test_a_name_that_was_not_there_before_is_told_in_case_it_is_mistyped():
    assert newcomers(named_info("front", "Back"), FRONT_BACK) == []
    (told,) = newcomers(named_info("frnot", "back", "ignore"), FRONT_BACK)
    assert all(word in told for word in ("'frnot'", "new", "front, back", "did you mean 'front'"))
    (told,) = newcomers(named_info("spleen"), FRONT_BACK)
    assert "did you mean" not in told
    assert newcomers({**named_info("spleen"), "drawn": []}, FRONT_BACK) == []
    assert newcomers(named_info("spleen"), None) == []  # the first label names them


def named_info(*names):
    return {"label_info": named(*names)}


def test_what_is_to_be_ignored_is_no_structure(source):
    source.learn_from(Store({"a": (1, named("Ignore", "liver", "unlabelled"))}))
    assert source.indices() == {"liver": 1}
    source.learn_from(Store({"a": (1, named("Ignore", "liver")), "b": (2, named("unlabeled"))}))
    assert source.indices() == {"liver": 1}


@pytest.mark.parametrize(
    ("info", "present", "coverage", "slices", "words"),
    [
        (named("front", "back", "ignore"), {1, 2, 3}, Coverage(), (8, 8), []),
        (named("front", "back"), {1, 2}, Coverage((1, 2)), (2, 8), ["2 of 8 slices are labelled"]),
        (named("front", "back"), {1, 2}, Coverage(()), (0, 8), ["nothing is learned from it"]),
        (named("front"), {1}, Coverage(classes=NAMED), (8, 8), ["does not speak of back"]),
        (None, {2}, Coverage(classes=NAMED), (8, 8), ["no names", "does not speak of front"]),
        (named("front", "back"), {1, 2}, Coverage(classes=("back",)), (8, 8), ["'front' is drawn", "speak of front"]),
        (named("front", "back"), {1, 2}, Coverage(classes=("Back", "FRONT")), (8, 8), []),
    ],
)
def test_an_annotator_is_told_what_counts_as_not_labelled(info, present, coverage, slices, words):
    submitted = {} if info is None else {"label_info": info}
    warnings = label_warnings(submitted, present, FRONT_BACK, coverage, slices)
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))

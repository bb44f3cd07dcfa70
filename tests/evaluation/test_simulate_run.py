"""One run of a simulation: what is chosen, learned from, measured, and how it goes on after a kill."""

import json
import re
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from samadapt.activelearning.strategy import Proposal, Strategy
from samadapt.data.geometry import Geometry
from samadapt.data.slices import take_slice
from samadapt.data.view import ModelView
from samadapt.data.volume import Volume
from samadapt.data.window import PER_CASE
from samadapt.errors import StateError
from samadapt.evaluation import simulate_pool, simulate_run
from samadapt.evaluation.label_efficiency import area_under_budget_curve
from samadapt.evaluation.simulate_run import Job, Protocol, execute, finished, suggested, turned_index
from tiny import write_studies

pytestmark = pytest.mark.usefixtures("tiny_backbone")

AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])
USELESS = ("case_0", "case_1", "case_2")


class Ordered(Strategy):
    """Proposes cases by id."""

    name = "ordered"
    about = "by id"
    key = staticmethod(lambda case: case)

    def rank(self, pool, count=1):
        ids = sorted((candidate.id for candidate in pool.unlabelled), key=self.key)
        return [Proposal(case, 0.0, f"{case} is next", [1, 2]) for case in ids[:count]]


class Oracle(Ordered):
    """Knows which labels show anything."""

    key = staticmethod(lambda case: (case in USELESS, case))


class Late(Oracle):
    """Chooses as the oracle does, by another name."""


class Worst(Ordered):
    """Prefers those that show nothing."""

    key = staticmethod(lambda case: (case not in USELESS, case))


class Again(Ordered):
    """Proposes labelled cases."""

    def rank(self, pool, count=1):
        return [Proposal((pool.labelled or pool.unlabelled)[0].id, 0.0, "again")]


class Blind(Ordered):
    """Draws by the pool's seed alone."""

    def rank(self, pool, count=1):
        order = np.random.default_rng(pool.seed).permutation([candidate.id for candidate in pool.unlabelled])
        return [Proposal(str(case), 0.0, "drawn") for case in order[:count]]


STRATEGIES = {"ordered": Ordered, "oracle": Oracle, "late": Late, "worst": Worst, "again": Again, "blind": Blind}


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """Eight cases, the first three without anything to learn from."""
    monkeypatch.setattr(simulate_pool, "names", lambda: list(STRATEGIES))
    monkeypatch.setattr(
        simulate_pool,
        "strategy",
        lambda name, entropy: simulate_pool.Epistemic(entropy) if name == "epistemic" else STRATEGIES[name](),
    )
    folder = tmp_path / "studies"
    write_studies(folder, 8)
    for name in USELESS:
        empty = nibabel.Nifti1Image(np.zeros((36, 30, 6), np.uint8), AFFINE)
        nibabel.save(empty, folder / "labels" / "final" / f"{name}.nii.gz")
    return folder


@pytest.fixture
def job(studies, tmp_path):
    """Three rounds of one case each; six cases in the pool, two to test on."""
    protocol = Protocol(rounds=3, per_round=1, slices_per_case=2, steps=4, copies=0, annotator="full")
    return Job(
        studies=str(studies),
        labels=["bright", "dark"],
        recipe="autosam_linear",
        strategy="ordered",
        unit="volumes",
        seed=0,
        pool=[f"case_{n}" for n in range(6)],
        testing=["case_6", "case_7"],
        window=PER_CASE.to_dict(),
        image_size=64,
        protocol=protocol,
        settings={"image_size": "64"},
        shared=str(tmp_path / "shared"),
    )


@pytest.fixture
def play(job, tmp_path):
    """``execute`` in a new folder: its rounds."""

    def call(name="run", **changes):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        protocol = {key: changes.pop(key) for key in list(changes) if hasattr(job.protocol, key)}
        return execute(replace(job, protocol=replace(job.protocol, **protocol), **changes), folder)["rounds"]

    return call


def without_times(rounds):
    return [{key: value for key, value in done.items() if key != "compute"} for done in rounds]


def test_an_oracle_beats_the_worst_case(play):
    found = {name: play(name, strategy=name, recipe="unet", steps=12) for name in ("oracle", "worst")}
    areas = {
        name: area_under_budget_curve([r["slices"] for r in rounds], [r["dice"] for r in rounds], 6, 18)
        for name, rounds in found.items()
    }
    assert areas["worst"] == 0  # three labels that show nothing teach nothing
    assert areas["oracle"] > 0.1


def test_budgets_add_up(play):
    rounds = play()
    assert [done["chosen"][0]["id"] for done in rounds] == ["case_0", "case_1", "case_2"]
    assert rounds[0]["chosen"][0]["reason"] == "case_0 is next"
    assert [done["volumes"] for done in rounds] == [1, 2, 3]
    assert [done["slices"] for done in rounds] == [6, 12, 18]
    # nothing is shown, so that each case is opened (20 s) and six slices are looked at (1 s)
    assert [done["seconds"] for done in rounds] == [26, 52, 78]
    assert all(set(done["cases"]) == {"case_6", "case_7"} for done in rounds)


def test_drawing_by_hand_costs_each_structure_of_each_slice(play):
    (done,) = play(strategy="oracle", rounds=1)
    assert (done["clicks"], done["outlines"]) == (0, 8)  # two boxes on slices 1 to 4
    assert done["seconds"] == 20 + 6 + 8 * 30


def test_the_pool_may_run_out(play):
    assert len(play(rounds=9, steps=1)) == 6


def test_a_kill_between_rounds_changes_nothing(play, monkeypatch, tmp_path):
    whole = play("whole", strategy="oracle")
    real = simulate_run._Run._train

    def killed(self, number, known):
        if number == 2:
            raise KeyboardInterrupt
        real(self, number, known)

    monkeypatch.setattr(simulate_run._Run, "_train", killed)
    apart = {"strategy": "oracle", "shared": str(tmp_path / "apart")}  # else it would find what `whole` has trained
    with pytest.raises(KeyboardInterrupt):
        play("parted", **apart)
    assert len(finished(tmp_path / "parted")["rounds"]) == 2
    monkeypatch.setattr(simulate_run._Run, "_train", real)
    assert without_times(play("parted", **apart)) == without_times(whole)


def test_what_another_strategy_has_trained_from_the_same_labels_is_not_trained_again(play, monkeypatch, tmp_path):
    by_oracle = play("a", strategy="oracle")
    monkeypatch.setattr(simulate_run._Run, "_fit", None)
    assert without_times(play("b", strategy="late")) == without_times(by_oracle)
    with pytest.raises(TypeError):  # other labels
        play("c", strategy="oracle", unit="slices")
    with pytest.raises(TypeError):  # other settings
        play("d", strategy="late", steps=5)
    models = [(tmp_path / name / "model-2.safetensors").read_bytes() for name in "ab"]
    assert models[0] == models[1]


def test_only_the_last_trained_models_are_kept(play, monkeypatch, tmp_path):
    monkeypatch.setattr(simulate_run, "TRAINED_KEPT", 2)
    play(strategy="oracle", rounds=4, steps=1)
    assert len(list((tmp_path / "shared" / simulate_run.TRAINED).iterdir())) == 4  # a model and a record each


def test_finished_rounds_are_not_played_again(play, monkeypatch):
    rounds = play()
    monkeypatch.setattr(simulate_run._Run, "_choose", None)
    assert play() == rounds


def test_rounds_of_another_job_are_not_gone_on_with(play):
    play(strategy="worst", rounds=2)
    assert [done["chosen"][0]["id"] for done in play(strategy="oracle", rounds=2)] == ["case_3", "case_4"]


def test_the_same_seed_draws_the_same_and_another_does_not(play):
    first, same, other = (
        [done["chosen"][0]["id"] for done in play(name, strategy="blind", seed=seed, rounds=4, steps=1)]
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first == same
    assert first != other


@pytest.mark.parametrize("unit", ["slices", "scattered"])
def test_slices_are_as_many_as_in_whole_cases(play, unit):
    rounds = play(strategy="oracle", unit=unit, rounds=2)
    assert [done["slices"] for done in rounds] == [6, 12]
    labelled = [(one["id"], index) for done in rounds for one in done["chosen"] for index in one["slices"]]
    assert len(set(labelled)) == 12


def test_suggested_slices_come_from_more_cases(play):
    (done,) = play(strategy="oracle", unit="slices", rounds=1)
    assert [(one["id"], one["slices"]) for one in done["chosen"]] == [(f"case_{n}", [1, 2]) for n in (3, 4, 5)]
    assert done["volumes"] == 3


def test_trainings_see_labelled_slices_alone(play, monkeypatch):
    seen = []
    real = simulate_run.Trainer

    def noting(model, learning, *rest, **more):
        seen.append({case.id: (list(case.learned_from), case.slices_of) for case in learning})
        return real(model, learning, *rest, **more)

    monkeypatch.setattr(simulate_run, "Trainer", noting)
    play(strategy="oracle", unit="slices", rounds=1)
    assert seen == [dict.fromkeys(["case_3", "case_4", "case_5"], ([1, 2], {1: [1, 2], 2: [1, 2]}))]


def test_a_strategy_that_proposes_labelled_cases_is_refused(play):
    with pytest.raises(StateError, match=re.escape("leave it out of the simulation")):
        play(strategy="again")


def test_epistemic_takes_the_first_case_and_then_the_largest_entropy(play, monkeypatch):
    entropies = {f"case_{n}": value for n, value in enumerate([0.5, 0.1, 0.3, 0.9, 0.2, 0.4])}
    asked = []

    def entropy(model, volume, seed, cache):
        asked.append(volume.path.name.removesuffix(".nii.gz"))
        return entropies[asked[-1]]

    monkeypatch.setattr(simulate_run, "mean_entropy", entropy)
    rounds = play(strategy="epistemic", pool=[f"case_{n}" for n in (3, 4, 5)])
    assert [done["chosen"][0]["id"] for done in rounds] == ["case_3", "case_5", "case_4"]
    assert asked == ["case_4", "case_5", "case_4"]


@pytest.mark.parametrize(
    ("named", "count", "wanted"),
    [
        ([7, 2, 5], 2, [2, 7]),
        ([7, 2, 7], 2, [2, 7]),
        ([], 2, [2, 7]),  # the middles of both halves
        ([2], 2, [2, 7]),
        ([9], 20, list(range(10))),
    ],
)
def test_suggested_slices_come_first_then_evenly_spread_ones(named, count, wanted):
    assert suggested(Proposal("case", 1.0, "why", named), 10, count) == wanted


@pytest.mark.parametrize("affine", [np.diag([-1.0, -1, 3, 1]), np.diag([1.0, 1, -3, 1]), np.eye(4)[[2, 0, 1, 3]]])
def test_a_slice_of_the_stored_image_is_found_among_the_models(affine):
    shape = (5, 6, 7)
    geometry = Geometry(shape, affine)
    axis = geometry.acquisition_axis
    array = np.broadcast_to(
        np.arange(shape[axis], dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)]), shape
    )
    volume = Volume(array[None].copy(), geometry, "MR", None)
    view = ModelView(volume, PER_CASE, 0, 64, axis)
    turned = view.turn.forward(volume.array[0])
    for index in range(shape[axis]):
        assert (take_slice(turned, view.axis, turned_index(geometry, index)) == index).all()


def test_a_class_that_nobody_looked_for_in_a_test_case_has_no_score(job, studies, tmp_path, monkeypatch):
    """The model finds that class all over the image."""
    monkeypatch.setattr(
        simulate_run, "segment", lambda model, volume, cache: np.full(volume.geometry.shape, 2, np.uint8)
    )
    names = [{"name": name, "idx": n} for n, name in enumerate(job.labels, start=1)]
    final = {"ext": ".nii.gz", "info": {"label_info": names, "labelled_classes": ["bright"]}}
    objects = {"case_6": {"image": {"ext": ".nii.gz", "info": {}}, "labels": {"final": final}}}
    (studies / "datastore_v2.json").write_text(json.dumps({"objects": objects}))
    file = studies / "labels" / "final" / "case_6.nii.gz"
    label = nibabel.load(file)
    only = np.where(np.asarray(label.dataobj) == 1, 1, 0).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(only, label.affine), file)
    one_round = replace(job, protocol=replace(job.protocol, rounds=1))
    (played,) = execute(one_round, tmp_path / "run")["rounds"]
    assert played["cases"]["case_6"]["dark"] is None
    assert played["cases"]["case_7"]["dark"] is not None

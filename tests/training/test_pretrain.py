"""Pretraining without labels, on small phantoms with small random backbones: what it writes, resume, refusals."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samadapt import backbones, cli, recipes
from samadapt.backbones import registry
from samadapt.backbones.sam_vit import build_sam_vit
from samadapt.backbones.tiny_vit import build_lite_medsam, build_mobile_sam
from samadapt.data.cases import find_cases
from samadapt.errors import ConfigError, InputError, StateError, WeightsError
from samadapt.files import sha256_of
from samadapt.model import AdaptedModel
from samadapt.training import pretrain_loop
from samadapt.training.masking import PATCH, SHARE, distance, draw_hidden, hide, reconstruction, reconstruction_loss
from samadapt.training.pretrain import Pretraining, pretrain
from samadapt.training.unlabelled import ImageSampler, prepare_images
from tiny import SIZE, write_phantom

TESTS = Path(__file__).resolve().parents[1]
BASE_SIZE = 96  # the tests' bases were "published" at this size and are pretrained at SIZE

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = {"dims": (8, 16, 16, 32), "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 4)}
SMALL = {
    "lite_medsam": partial(build_lite_medsam, **VIT),
    "mobile_sam": partial(build_mobile_sam, **VIT),
    "sam_vit_b": partial(build_sam_vit, name="sam_vit_b", dim=32, depth=2, heads=4, global_blocks=(1,), window=3),
}
QUICKEST = "mobile_sam"


def register_small(put) -> None:
    """The registry's own entries, with models of a few thousand weights; ``put(name, entry)`` sets one."""
    for name, build in SMALL.items():
        key = backbones.spec(name).signature[0]
        shape = tuple(build(SIZE).state_dict()[key].shape)
        put(name, replace(backbones.spec(name), build=build, image_size=BASE_SIZE, signature=(key, shape)))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    register_small(partial(monkeypatch.setitem, registry._SPECS))


@pytest.fixture
def studies(tmp_path):
    folder = tmp_path / "studies"
    folder.mkdir()
    for number in range(4):
        write_phantom(folder / f"case_{number}.nii.gz", seed=number)
    return folder


def write_base(path: Path, name: str = QUICKEST) -> Path:
    torch.manual_seed(1)
    state = backbones.build(name).state_dict()
    if name == "mobile_sam":  # the published file carries a classifier that nothing uses
        state |= {key: torch.rand(3) for key in backbones.spec(name).unused_keys}
    torch.save(state, path)
    return path


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base.pth")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "weights.safetensors"


def wanted(base: Path, steps: int, name: str = QUICKEST, size: int = SIZE) -> Pretraining:
    return Pretraining(name, base, size, minutes=None, steps=steps)


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- masking


def test_the_same_share_is_hidden_in_every_image_and_the_places_differ():
    hidden = draw_hidden(8, 128, seed=3)
    assert set(hidden.flatten(1).sum(1).tolist()) == {round(SHARE * (128 // PATCH) ** 2)}
    assert len({tuple(row.tolist()) for row in hidden.flatten(1)}) == 8
    assert torch.equal(hidden, draw_hidden(8, 128, seed=3))
    assert not torch.equal(hidden, draw_hidden(8, 128, seed=4))


def test_nothing_of_a_hidden_patch_reaches_the_encoder_and_nothing_visible_enters_the_loss():
    random_numbers = torch.Generator().manual_seed(0)
    images, others, predicted = (torch.rand(2, 3, SIZE, SIZE, generator=random_numbers) for _ in range(3))
    hidden = draw_hidden(2, SIZE, seed=0)
    pixels = torch.nn.functional.interpolate(hidden.float(), scale_factor=PATCH).bool()
    assert torch.equal(hide(images, hidden), hide(torch.where(pixels, others, images), hidden))
    loss = reconstruction_loss(predicted, images, hidden)
    assert loss == reconstruction_loss(torch.where(pixels, predicted, others), images, hidden)
    assert loss != reconstruction_loss(torch.where(pixels, others, predicted), images, hidden)


def test_the_right_prediction_has_no_loss_and_shows_the_image():
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B,3,c,c,PATCH,PATCH)
    mean = patches.mean(dim=(1, 4, 5)).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    deviation = patches.std(dim=(1, 4, 5), correction=0).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    predicted = (images - mean) / deviation[:, None]
    hidden = draw_hidden(2, SIZE, seed=0)
    assert reconstruction_loss(predicted, images, hidden) < 1e-6
    assert reconstruction_loss(torch.zeros_like(images), images, hidden) == pytest.approx(1, abs=1e-3)
    assert torch.allclose(reconstruction(predicted, images, hidden), images, atol=1e-5)


def test_open_files_do_not_grow_with_the_images(studies, tmp_path):
    for number in range(30):
        write_phantom(studies / f"more_{number}.nii.gz", seed=number, shape=(12, 12, 2))

    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    images = prepare_images(find_cases(studies), SIZE, tmp_path / "slices", lambda *_: None, pytest.fail)
    batch = ImageSampler(images, SIZE, 64, 0).batch(0)
    assert len(images) == 34
    assert batch.shape == (64, 3, SIZE, SIZE)
    assert opened() <= before + 2


# ---- what it learns and writes


def write_ramp(path: Path, seed: int) -> None:
    """A volume that is told from a few of its pixels: grey values rise evenly in one direction."""
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    i, j, _ = np.meshgrid(np.arange(36), np.arange(36), np.arange(6), indexing="ij")
    values = (np.cos(angle) * i + np.sin(angle) * j).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, 3.0, 1.0])), path)


def test_the_loss_falls(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_loop, "ENCODER_RATE", 1e-3)  # a random encoder has nothing to preserve
    for number in range(4):
        write_ramp(tmp_path / f"ramp_{number}.nii.gz", seed=number)
    base = write_base(tmp_path / "base.pth", "sam_vit_b")
    first = pretrain(find_cases(tmp_path), tmp_path / "out" / "first.safetensors", wanted(base, 1, "sam_vit_b"))
    last = pretrain(find_cases(tmp_path), tmp_path / "out" / "last.safetensors", wanted(base, 40, "sam_vit_b"))
    assert first.loss == pytest.approx(1, abs=0.01)
    assert last.loss < 0.8
    assert first.shown_before == last.shown_before == pytest.approx(1, abs=0.01)
    assert last.shown_after < 0.8


def test_embeddings_stay_near_the_base(studies, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_loop, "ENCODER_RATE", 1e-3)
    base = write_base(tmp_path / "base.pth", "sam_vit_b")
    image = hide(torch.rand(2, 3, SIZE, SIZE), draw_hidden(2, SIZE, 0))
    drift = []
    for weight in (0.0, 1.0):
        monkeypatch.setattr(pretrain_loop, "ANCHOR", weight)
        output = tmp_path / f"anchor_{weight}.safetensors"
        pretrain(find_cases(studies), output, wanted(base, 30, "sam_vit_b"))
        with torch.no_grad():
            one, other = (backbones.load("sam_vit_b", file, SIZE).embed(image) for file in (base, output))
        drift.append(float(distance(other, one)))
    assert drift[1] < 0.5 * drift[0]


@pytest.mark.parametrize("name", SMALL)
def test_the_output_is_the_base_with_another_encoder(studies, tmp_path, output, name):
    base = write_base(tmp_path / "base.pth", name)
    result = pretrain(find_cases(studies), output, wanted(base, 3, name))
    before, after = torch.load(base), load_file(output)
    assert after.keys() == before.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    fixed = {key for key in before if "running_" in key or "num_batches" in key}
    fixed |= {key for key in before if key == "image_encoder.pos_embed" or "blocks.1.attn.rel_pos" in key}
    fixed |= backbones.spec(name).unused_keys
    assert changed
    assert changed <= {key for key in before if key.startswith("image_encoder.")} - fixed
    assert {key for key in before if key.endswith(("qkv.weight", "neck.0.weight"))} <= changed
    assert (result.sha256, result.base_sha256) == (sha256_of(output), sha256_of(base))
    assert (result.images, result.steps, result.skipped) == (4, 3, [])
    assert sorted(path.name for path in output.parent.iterdir()) == ["weights.png", "weights.safetensors"]
    assert result.picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [SIZE, BASE_SIZE, 128])
def test_the_output_is_a_base_at_any_size(studies, tmp_path, output, name, size):
    base = write_base(tmp_path / "base.pth", name)
    pretrain(find_cases(studies), output, wanted(base, 1, name))
    model = recipes.build("lora", ["one"], name, output, size)
    assert model.info.weights_sha256 == sha256_of(output)
    with torch.no_grad():
        image = torch.rand(1, 3, size, size)
        assert not torch.equal(model.embed(image), backbones.load(name, base, size).embed(image))


def test_a_model_adapted_on_it_refuses_another_base(studies, base, tmp_path, output):
    pretrain(find_cases(studies), output, wanted(base, 1))
    recipes.build("lora", ["one"], QUICKEST, output, SIZE).save(tmp_path / "model.safetensors")
    assert AdaptedModel.load(tmp_path / "model.safetensors", output).info.weights_sha256 == sha256_of(output)
    with pytest.raises(WeightsError, match="trained on mobile_sam weights"):
        AdaptedModel.load(tmp_path / "model.safetensors", base)


def test_it_is_refused_as_the_base_of_another_backbone_by_name(studies, base, output):
    pretrain(find_cases(studies), output, wanted(base, 1))
    for other in ("lite_medsam", "sam_vit_b"):
        with pytest.raises(WeightsError, match="It is a checkpoint of mobile_sam"):
            backbones.load(other, output)


def test_it_goes_on_from_its_own_output(studies, base, tmp_path, output):
    first = pretrain(find_cases(studies), output, wanted(base, 1))
    second = pretrain(find_cases(studies), tmp_path / "second.safetensors", wanted(output, 1))
    assert second.base_sha256 == first.sha256
    assert not same_tensors(output, tmp_path / "second.safetensors")


# ---- resume


@pytest.fixture
def often(monkeypatch):
    """A checkpoint and a report after every step."""
    for name in ("CHECKPOINT_SECONDS", "REPORT_SECONDS"):
        monkeypatch.setattr(pretrain_loop, name, 0.0)
    monkeypatch.setattr(pretrain_loop, "CHECKPOINT_SHARE", 1e9)


def stop_at(step: int):
    def report(message: str, share: float) -> None:
        if message.startswith(f"step {step},"):
            raise KeyboardInterrupt

    return report


def test_a_resumed_run_ends_with_the_same_bits(studies, base, tmp_path, output, often):
    whole = pretrain(find_cases(studies), tmp_path / "whole.safetensors", wanted(base, 8))
    notes: list[str] = []
    for step in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            pretrain(find_cases(studies), output, wanted(base, 8), stop_at(step))
        assert not output.exists()
    result = pretrain(find_cases(studies), output, wanted(base, 8), note=notes.append)
    assert notes == ["Going on from step 6."]
    assert (result.steps, result.loss) == (8, whole.loss)
    assert same_tensors(output, whole.weights)


def test_killed_at_any_moment_it_leaves_no_half_written_output_and_goes_on(studies, base, tmp_path, output):
    program = f"""
import sys; sys.path[:0] = [{str(TESTS / "training")!r}, {str(TESTS)!r}, {str(TESTS.parent / "lib")!r}]
import torch; torch.set_num_threads(1)
from pathlib import Path
import test_pretrain as t
t.register_small(t.registry._SPECS.__setitem__)
t.pretrain_loop.CHECKPOINT_SECONDS = 0.0; t.pretrain_loop.CHECKPOINT_SHARE = 1e9
t.pretrain(t.find_cases({str(studies)!r}), Path({str(output)!r}), t.wanted(Path({str(base)!r}), 40))
"""
    part = output.with_name("weights.safetensors.part")
    moments = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not (part / "checkpoint.safetensors").is_file() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        error = process.communicate()[1].decode()
        assert "Error" not in error, error[-2000:]
        if output.exists():
            assert load_file(output).keys() == torch.load(base).keys()
        else:
            assert part.is_dir()
    result = pretrain(find_cases(studies), output, wanted(base, 40))
    whole = pretrain(find_cases(studies), tmp_path / "whole.safetensors", wanted(base, 40))
    assert result.steps == 40
    assert same_tensors(output, whole.weights)
    assert sorted(path.name for path in output.parent.iterdir()) == ["weights.png", "weights.safetensors"]


def test_a_finished_run_gives_its_result_again(studies, base, output):
    first = pretrain(find_cases(studies), output, wanted(base, 2))
    written = output.stat().st_mtime_ns
    (output.parent / "weights.safetensors.part").mkdir()  # as left by a kill right after the last rename
    assert pretrain(find_cases(studies), output, wanted(base, 2)) == first
    assert output.stat().st_mtime_ns == written
    assert not (output.parent / "weights.safetensors.part").exists()


def test_other_settings_neither_replace_a_file_nor_continue_a_run(studies, base, output, often):
    with pytest.raises(KeyboardInterrupt):
        pretrain(find_cases(studies), output, wanted(base, 4), stop_at(2))
    with pytest.raises(StateError, match=r"\.part: an unfinished run .*image-size 64 there, 96 here.*delete"):
        pretrain(find_cases(studies), output, wanted(base, 4, size=96))
    assert pretrain(find_cases(studies), output, wanted(base, 4)).steps == 4
    with pytest.raises(StateError, match=r"exists already and was made with other settings .*steps 4 there, 5 here"):
        pretrain(find_cases(studies), output, wanted(base, 5))
    output.write_bytes(b"something else")
    with pytest.raises(StateError, match=r"weights\.safetensors: exists already\. Choose another name"):
        pretrain(find_cases(studies), output, wanted(base, 4))
    assert output.read_bytes() == b"something else"


def test_images_that_came_meanwhile_join(studies, base, output, often):
    with pytest.raises(KeyboardInterrupt):
        pretrain(find_cases(studies), output, wanted(base, 4), stop_at(2))
    write_phantom(studies / "new.nii.gz", seed=9)
    notes: list[str] = []
    result = pretrain(find_cases(studies), output, wanted(base, 4), note=notes.append)
    assert result.images == 5
    assert any("images have changed" in note for note in notes)


def test_two_processes_cannot_write_one_file(studies, base, output, often):
    def another(message: str, share: float) -> None:
        if message.startswith("step 1,"):
            with pytest.raises(StateError, match="another process"):
                pretrain(find_cases(studies), output, wanted(base, 2))

    assert pretrain(find_cases(studies), output, wanted(base, 2), another).steps == 2


# ---- refusals


def test_an_unreadable_image_is_named_and_left_out(studies, base, output):
    (studies / "broken.nii.gz").write_bytes(b"not an image")
    (studies / "gone.nii.gz").symlink_to(studies / "nowhere.nii.gz")
    notes: list[str] = []
    result = pretrain(find_cases(studies), output, wanted(base, 1), note=notes.append)
    assert sorted(result.skipped) == ["broken", "gone"]
    assert result.images == 4
    assert all(any(note.startswith(name) for note in notes) for name in result.skipped)


def test_no_image_left_is_an_error_and_leaves_nothing(tmp_path, base, output):
    studies = tmp_path / "bad"
    studies.mkdir()
    (studies / "broken.nii.gz").write_bytes(b"not an image")
    with pytest.raises(InputError, match="no image is left"):
        pretrain(find_cases(studies), output, wanted(base, 1))
    assert list(output.parent.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_before_the_work(studies, base, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\)"):
        pretrain(find_cases(studies), tmp_path / "file" / "w.safetensors", wanted(base, 1))
    with pytest.raises(ConfigError, match=r"not written as \.pth"):
        pretrain(find_cases(studies), tmp_path / "w.pth", wanted(base, 1))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        pretrain(find_cases(studies), tmp_path / "folder.safetensors", wanted(base, 1))


def test_an_output_among_the_images_is_refused(studies, base):
    before = sorted(studies.iterdir())
    with pytest.raises(ConfigError, match="would count as one of the images"):
        pretrain(find_cases(studies), studies / "w.safetensors", wanted(base, 1))
    assert sorted(studies.iterdir()) == before


def test_impossible_plans_are_refused(studies, base, output):
    with pytest.raises(ConfigError, match="unknown backbone 'sam'"):
        pretrain(find_cases(studies), output, wanted(base, 1, "sam"))
    with pytest.raises(ConfigError, match="image size of 50"):
        pretrain(find_cases(studies), output, wanted(base, 1, size=50))
    with pytest.raises(ConfigError, match="needs an end"):
        Pretraining(QUICKEST, base, SIZE, minutes=None, steps=None)
    with pytest.raises(WeightsError, match="It is a checkpoint of mobile_sam"):
        pretrain(find_cases(studies), output, wanted(base, 1, "sam_vit_b"))
    assert not output.exists()


# ---- the command


def run(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["samadapt", "pretrain", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return (ended.value.code or 0, *capsys.readouterr())


def test_the_command_writes_weights_that_train_takes(studies, base, output, monkeypatch, capsys):
    words = [studies, "--output", output, "--backbone", QUICKEST, "--weights", base, "--image-size", SIZE]
    code, out, err = run(monkeypatch, capsys, *words, "--steps", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["weights"], found["sha256"], found["steps"]) == (str(output), sha256_of(output), 2)
    assert Path(found["picture"]).is_file()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nowhere", "--output", "w.safetensors"], "no such folder"),
        (["EMPTY", "--output", "w.safetensors"], "no image found"),
        (["STUDIES", "--output", "w.safetensors", "--backbone", "mobilesam"], "Did you mean 'mobile_sam'"),
        (["STUDIES", "--output", "w.safetensors", "--image-size", "100"], "multiple of 32"),
        (["STUDIES", "--output", "w.safetensors", "--weights", "nowhere.pth"], "No such file"),
        (["STUDIES", "--output", "w.safetensors", "--steps", "0"], "needs an end"),
        (["STUDIES"], "--output"),
    ],
)
def test_bad_input_is_one_message(studies, tmp_path, monkeypatch, capsys, words, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "STUDIES": studies}
    code, out, err = run(monkeypatch, capsys, *(places.get(word, word) for word in words))
    assert (code, out) == (2, "")
    assert part in err
    assert "Traceback" not in err

"""``--conf``: every value checked, every error says what would be valid."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import samadapt
from samadapt.config import BACKBONES, AppConfig, parse_values
from samadapt.errors import ConfigError


def test_defaults_are_the_dataclass_defaults():
    assert AppConfig.from_strings({}) == AppConfig()


def test_every_default_of_a_text_key_passes_its_own_check():
    text = {"backbone": AppConfig.backbone, "recipe": AppConfig.recipe, "context": "auto", "max_train_minutes": "auto"}
    assert AppConfig.from_strings(text) == AppConfig()


def test_values_are_converted(tmp_path):
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"x")
    config = AppConfig.from_strings(
        {"backbone": "mobile_sam", "weights": str(weights), "labels": "liver, tumour", "image_size": "128"}
    )
    assert config.backbone == "mobile_sam"
    assert config.weights == weights
    assert config.labels.names == ("liver", "tumour")
    assert config.image_size == 128
    assert AppConfig.from_strings({"image_size": "auto"}).image_size is None


def test_an_unknown_key_lists_the_valid_ones_and_guesses():
    with pytest.raises(ConfigError) as caught:
        AppConfig.from_strings({"bakbone": "lite_medsam"})
    text = str(caught.value)
    assert "bakbone" in text
    assert "Did you mean 'backbone'?" in text
    assert all(field.name in text for field in dataclasses.fields(AppConfig))


@pytest.mark.parametrize(
    ("given", "labelled", "seconds"), [("auto", 1, 120), ("auto", 5, 300), ("auto", 90, 480), ("2", 90, 120)]
)
def test_the_time_of_a_training_follows_the_labelled_cases_unless_it_is_given(given, labelled, seconds):
    assert AppConfig.from_strings({"max_train_minutes": given}).train_seconds(labelled) == seconds


@pytest.mark.parametrize(
    ("key", "value", "needle"),
    [
        ("backbone", "sam_vit_c", "sam_vit_b"),
        ("recipe", "lorra", "Did you mean 'lora'?"),
        ("recipe", "ft/lite_medsam/decoder/lor", "peft/TUNER"),
        ("weights", "/nowhere/w.pth", "No such file"),
        ("image_size", "100", "multiple of 32"),
        ("image_size", "big", "auto"),
        ("context", "7", "0 to 1"),
        ("max_train_minutes", "soon", "number from"),
        ("max_train_minutes", "nan", "number from"),
        ("max_steps", "1.5", "whole number"),
        ("form", "paper", "reference"),
        ("clip", "/nowhere", "No such folder"),
        ("ladder_weights", "/nowhere/w.pth", "No such file"),
        ("slices_per_case", "0", "whole number"),
    ],
)
def test_a_bad_value_names_key_and_remedy(key, value, needle):
    with pytest.raises(ConfigError) as caught:
        AppConfig.from_strings({key: value})
    assert caught.value.where == key
    assert needle in caught.value.remedy


@given(st.dictionaries(st.text(), st.text(), max_size=3))
def test_any_unknown_keys_are_a_config_error(values):
    if values.keys() <= {field.name for field in dataclasses.fields(AppConfig)}:
        return
    with pytest.raises(ConfigError) as caught:
        AppConfig.from_strings(values)
    assert caught.value.remedy


def test_parse_values_can_be_restricted():
    assert parse_values({"max_steps": "3"}, allowed=["max_steps"]) == {"max_steps": 3}
    with pytest.raises(ConfigError):
        parse_values({"backbone": "lite_medsam"}, allowed=["max_steps"])


def test_describe_covers_every_key():
    assert [key for key, _, _ in AppConfig.describe()] == [field.name for field in dataclasses.fields(AppConfig)]
    assert all(text for _, _, text in AppConfig.describe())


def test_backbones_are_those_of_the_registry():
    from samadapt import backbones

    assert list(BACKBONES) == backbones.names()


def test_importing_the_config_does_not_import_torch():
    code = (
        "import sys, samadapt.config, samadapt.server; sys.exit('torch' in sys.modules or 'monailabel' in sys.modules)"
    )
    library = Path(samadapt.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(library)}, check=False).returncode == 0

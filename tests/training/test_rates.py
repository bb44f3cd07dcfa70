"""Who learns at which rate."""

import pytest

from samadapt import recipes
from samadapt.training.loop import parameter_groups
from tiny import BACKBONES

RECIPE = recipes.get("lora_late", learning_rate=1.0, head_learning_rate=2.0, transformer_learning_rate=3.0)


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch):
    monkeypatch.setattr("samadapt.backbones.load", lambda *names, **sizes: BACKBONES["per_head"]())


def rates(name):
    """Parameter name -> rate of the recipe's model."""
    model = recipes.build(name, labels=["a", "b"])
    own = {key: parameter for key, parameter in model.trainable().items() if parameter.requires_grad}
    groups = parameter_groups(own, RECIPE, model.head.pretrained)
    by_tensor = {id(parameter): group["peak"] for group in groups for parameter in group["params"]}
    assert len(by_tensor) == len(own)
    return {key: by_tensor[id(parameter)] for key, parameter in own.items()}


@pytest.mark.parametrize("name", ["lora_late", "samed", "ft/lite_medsam/decoder/vanilla"])
def test_the_trained_transformer_learns_gently_and_what_is_new_behind_it_does_not(name):
    found = rates(name)
    transformer = {rate for key, rate in found.items() if key.startswith("head.classes.transformer.")}
    new = {rate for key, rate in found.items() if "class_tokens" in key or "classes.hypernetworks" in key}
    assert (transformer, new) == ({3.0}, {2.0})


@pytest.mark.parametrize("name", ["ft/lite_medsam/decoder/lora", "ft/lite_medsam/decoder/adapter"])
def test_what_is_new_inside_the_transformer_learns_at_the_heads_rate(name):
    found = {key: rate for key, rate in rates(name).items() if key.startswith("head.classes.transformer.")}
    assert found
    assert set(found.values()) == {2.0}


def test_every_layer_of_the_encoder_learns_at_the_adapters_rate():
    assert {rate for key, rate in rates("lora").items() if not key.startswith("head.")} == {1.0}

"""In reference form every recipe trains exactly as many parameters as its paper's published code (methods.md, 8.5)."""

from __future__ import annotations

import pytest

from samadapt import recipes

STUDY = {
    # finetune-SAM with one class beside the background, at 1024 px (methods.md, 5.1)
    "mobile_sam": {
        "decoder/vanilla": 3_924_239,
        "encoder+decoder/vanilla": 9_989_771,
        "decoder/adapter": 132_352,
        "encoder+decoder/adapter": 321_760,
        "decoder/lora": 656_527,
        "encoder+decoder/lora": 774_927,
    },
    "sam_vit_b": {
        "decoder/vanilla": 3_924_239,
        "encoder+decoder/vanilla": 93_595_151,
        "decoder/adapter": 132_352,
        "encoder+decoder/adapter": 3_682_816,
        "decoder/lora": 656_527,
        "encoder+decoder/lora": 705_679,
    },
    "sam_vit_h": {
        "decoder/vanilla": 3_924_239,
        "encoder+decoder/vanilla": 640_950_287,
        "decoder/adapter": 132_352,
        "encoder+decoder/adapter": 9_981_952,
        "decoder/lora": 656_527,
        "encoder+decoder/lora": 738_447,
    },
}
ALL_BLOCKS = {
    "mobile_sam": {"adapter": 528_160},
    "sam_vit_b": {"adapter": 10_783_744, "lora": 803_983},
    "sam_vit_h": {"adapter": 78_929_152, "lora": 1_311_887},
}


def trained(recipe, classes, backbone="sam_vit_b", size=None):
    return recipes.count(recipe, classes, backbone, size)["trainable_parameters"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [(f"ft/{backbone}/{rest}", count) for backbone, row in STUDY.items() for rest, count in row.items()],
)
def test_the_eighteen_combinations(name, expected):
    assert trained(recipes.reference(name), 1) == expected


@pytest.mark.parametrize(
    ("backbone", "method", "expected"),
    [(backbone, method, count) for backbone, row in ALL_BLOCKS.items() for method, count in row.items()],
)
def test_the_combinations_on_all_blocks(backbone, method, expected):
    from dataclasses import replace

    recipe = recipes.reference(f"ft/{backbone}/encoder+decoder/{method}")
    assert trained(replace(recipe, adapter=replace(recipe.adapter, blocks=None)), 1) == expected


@pytest.mark.parametrize(
    ("backbone", "expected"), [("sam_vit_b", 147_456), ("sam_vit_l", 393_216), ("sam_vit_h", 655_360)]
)
def test_lora_of_samed(backbone, expected):
    counts = recipes.count(recipes.reference("samed"), 8, backbone, 512)
    assert counts["encoder_parameters"] == expected
    assert counts["trainable_parameters"] == expected + 6_220 + 4_759_945  # prompt encoder, decoder with nine tokens


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("sam_lst", 8, 2_856_737),
        ("autosam_vit", 3, 3_646_880),
        ("autosam_vit", 8, 3_649_440),
        ("autosam_cnn", 3, 20_686_340),
        ("autosam_linear", 3, 75_140),
    ],
)
def test_heads_and_ladder(name, classes, expected):
    assert trained(recipes.reference(name), classes) == expected

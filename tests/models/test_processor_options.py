"""Options of a processor that it does not have are refused by name, not dropped without a word."""

import pytest

from llava.estimate.hub import own_processor
from llava.train.arguments import parse_arguments
from tests.models.test_training import saved, words_of


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("gemma3", ["--max_pixels", "3136"], "--max_pixels 3136: .*Gemma3ImageProcessor.* are .*size"),
        ("internvl", ["--min_pixels", "64"], "--min_pixels 64: .*GotOcr2ImageProcessor"),
        ("internvl", ["--processor_option", "max_patchs=1"], '--processor_option max_patchs=1: .* max_patches'),
        ("qwen2_5_vl", ["--processor_option", "foo=3"], "--processor_option foo=3: .*Qwen2VLImageProcessor"),
        ("qwen2_5_vl", ["--min_pixels", "9000", "--max_pixels", "100"], "at most the most, got 9000 and 100"),
        ("qwen2_5_vl", ["--max_pixels", "1"], "at most the most, got 64 and 1"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_refused(in_golden, tmp_path, name, flags, message):
    arguments = parse_arguments(words_of(tmp_path / "out", saved(tmp_path / "model", name), *flags))
    with pytest.raises(ValueError, match=message):
        own_processor(arguments)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("gemma3", ["--processor_option", "do_pan_and_scan=true"]),
        ("internvl", ["--processor_option", "max_patches=1"]),
        ("qwen2_vl", ["--min_pixels", "100", "--max_pixels", "1024"]),
    ],
)
def test_an_option_with_effect_is_taken(in_golden, tmp_path, name, flags):
    arguments = parse_arguments(words_of(tmp_path / "out", saved(tmp_path / "model", name), *flags))
    settings = own_processor(arguments).image_processor.to_dict()
    wanted = {"gemma3": ("do_pan_and_scan", True), "internvl": ("max_patches", 1)}
    key, value = wanted.get(name, ("size", {"shortest_edge": 100, "longest_edge": 1024}))
    assert settings[key] == value

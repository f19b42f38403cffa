"""What a sampling command asks for: options to settings and images."""

from __future__ import annotations

from dataclasses import replace

from fpdm.config import SamplerConfig
from fpdm.request import choose_images, parse_integers, parser, sampler_config

SETTINGS = SamplerConfig(steps=2, iters=2, batch=3)


def chosen(argv: list[str], classes: int = 3) -> tuple[list[int], list[int], int]:
    return choose_images(parser().parse_args(argv), classes)


def test_choice_of_images() -> None:
    assert chosen(["--count", "6"]) == ([0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5], 2)
    assert chosen(["--labels", "all"]) == ([0, 1, 2], [0, 1, 2], 2)
    assert chosen(["--labels", "all", "--count", "5"])[0] == [0, 1, 2, 0, 1]
    assert chosen(["--labels", "2,0-1"])[0] == [2, 0, 1]
    assert chosen(["--seeds", "7,3-5"])[:2] == ([0, 0, 1, 2], [7, 3, 4, 5])
    assert chosen(["--seed", str(2**63), "--count", "2"])[1] == [2**63, 2**63 + 1]
    labels, seeds, columns = chosen([], 10)
    assert (len(labels), columns, seeds[-1]) == (80, 8, 79)
    # of one label a square, not a column
    assert chosen(["--labels", "7", "--count", "64"], 10)[2] == 8
    assert len(chosen([], 1000)[0]) == 16
    assert parse_integers("x", "1, 3-4") == [1, 3, 4]


def test_cost_on_the_command_line() -> None:
    def settings(base: SamplerConfig, *argv: str) -> SamplerConfig:
        return sampler_config(base, parser().parse_args(list(argv)))

    assert settings(SETTINGS) == SETTINGS
    assert settings(SETTINGS, "--budget", "20") == replace(SETTINGS, iters=None, budget=20)
    explicit = settings(SETTINGS, "--schedule", "3,1,2")
    assert explicit == replace(
        SETTINGS, iters=None, steps=3, allocation="explicit", schedule=(3, 1, 2)
    )
    back = settings(explicit, "--iters", "4")
    assert back == replace(explicit, iters=4, allocation="constant", schedule=())
    assert settings(SETTINGS, "--gamma", "0.3", "--reuse", "blend") == replace(
        SETTINGS, reuse="blend", reuse_gamma=0.3
    )
    # of the run beside it
    assert settings(SETTINGS, "--gamma", "0.3", "--compare", "blend").reuse_gamma == 0.3
    # the source's own, of a mode that is switched off
    blend = settings(SETTINGS, "--gamma", "0.3", "--reuse", "blend")
    assert settings(blend, "--reuse", "none") == replace(blend, reuse="none")

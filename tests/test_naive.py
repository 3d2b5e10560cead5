"""Golden values are worked out by hand beside each test, from the published constants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energymodel.naive import (
    EXPLANATIONS,
    ecologits_joules,
    flops_tdp_joules,
    load_naive_rules,
    tdp_time_joules,
    vidur_board_watts,
    vidur_energy_joules,
)
from energymodel.specs import GpuSpec

RULES = load_naive_rules()
A100 = {"peak_flops_per_s": 312e12, "idle_watts": 100.0, "max_watts": 400.0}

flops = st.floats(0.0, 1e18)
seconds = st.floats(1e-6, 1e6)


def gpu(name: str, idle_watts: float | None) -> GpuSpec:
    return GpuSpec(
        name=name,
        title=name,
        aliases=(),
        architecture="ampere",
        peak_flops_per_s={"bf16": 312e12},
        hbm_bytes=80e9,
        hbm_bytes_per_s=2.039e12,
        l2_bytes=40e6,
        link_bytes_per_s=300e9,
        tdp_watts=400.0,
        sm_count=108,
        boost_clock_hz=1.41e9,
        idle_watts=idle_watts,
        sources={},
    )


def test_flops_tdp_of_an_a100_is_1_28_pj_per_flop() -> None:
    # 400 W / 312 TFLOP/s = 1.28205 pJ/FLOP; 2 * 8e9 parameters * 1000 tokens = 1.6e13 FLOP
    assert flops_tdp_joules(1.6e13, tdp_watts=400.0, peak_flops_per_s=312e12) == pytest.approx(
        20.512820512820513
    )


def test_flops_tdp_of_the_paper() -> None:
    # Fernandez et al., footnote 5: 300 W / 309.7 TFLOP/s = 0.9687 pJ/FLOP
    joules = flops_tdp_joules([1e12, 2e12], tdp_watts=300.0, peak_flops_per_s=309.7e12)
    assert joules == pytest.approx([0.9687, 1.9374], rel=1e-4)


def test_tdp_time_of_two_gpus_for_an_hour_is_0_8_kwh() -> None:
    assert tdp_time_joules(3600.0, tdp_watts=400.0, num_gpus=2) == pytest.approx(0.8 * 3.6e6)


@pytest.mark.parametrize(
    ("mfu", "watts"),
    [
        (0.0, 100.0),
        (0.45, 400.0),
        (0.9, 400.0),
        # 100 + 300 * 0.5**0.7, 0.5**0.7 = exp(-0.7 * 0.693147) = 0.615572
        (0.225, 284.6717),
        # 100 + 300 * 0.1**0.7, 0.1**0.7 = 10**-0.7 = 0.199526
        (0.045, 159.8579),
    ],
)
def test_vidur_energy_on_an_a100_for_ten_seconds(mfu: float, watts: float) -> None:
    joules = vidur_energy_joules(mfu * 312e12 * 10.0, 10.0, rule=RULES.vidur_energy, **A100)
    assert joules == pytest.approx(10.0 * watts, rel=1e-6)


def test_vidur_energy_spreads_the_work_over_the_gpus() -> None:
    one = vidur_energy_joules(1e14, 1.0, rule=RULES.vidur_energy, **A100)
    two = vidur_energy_joules(2e14, 1.0, rule=RULES.vidur_energy, num_gpus=2, **A100)
    assert two == pytest.approx(2 * one)


def test_vidur_energy_of_no_time_is_zero() -> None:
    joules = vidur_energy_joules([0.0, 1e12], [0.0, 1.0], rule=RULES.vidur_energy, **A100)
    assert joules[0] == 0.0
    assert joules[1] > 100.0


@given(st.lists(st.tuples(flops, seconds), min_size=1, max_size=20))
def test_vidur_energy_lies_between_idle_and_maximum(steps: list[tuple[float, float]]) -> None:
    work, time = np.array(steps).T
    joules = vidur_energy_joules(work, time, rule=RULES.vidur_energy, **A100)
    assert np.all(joules >= 100.0 * time * (1 - 1e-12))
    assert np.all(joules <= 400.0 * time * (1 + 1e-12))


def test_vidur_takes_its_authors_watts_and_falls_back_to_published_ones() -> None:
    rule = RULES.vidur_energy
    assert vidur_board_watts(rule, gpu("a100", 55.0)) == (100.0, 400.0)
    assert vidur_board_watts(rule, gpu("another", 30.0)) == (30.0, 400.0)
    assert vidur_board_watts(rule, gpu("another", None)) is None


def test_ecologits_of_an_8b_model() -> None:
    # exp(-0.0112059 * 64) = exp(-0.717179) = 0.488128; 1.166527e-6 * 0.488128 * 8 = 4.555321e-6 Wh
    # + 4.052928e-5 Wh = 4.508460e-5 Wh = 0.1623046 J a token
    joules = ecologits_joules([0, 1, 1000], active_parameters=8e9, rule=RULES.ecologits)
    assert joules == pytest.approx([0.0, 0.1623046, 162.3046], rel=1e-6)


def test_ecologits_multiplies_by_gpus_and_takes_a_batch() -> None:
    rule = RULES.ecologits
    one = ecologits_joules(10, active_parameters=70e9, rule=rule)
    four = ecologits_joules(10, active_parameters=70e9, rule=rule, num_gpus=4)
    assert four == pytest.approx(4 * one)
    alone = ecologits_joules(10, active_parameters=70e9, rule=rule, batch=0.0)
    # 10 * 3600 * (1.1665273e-6 * 70 + 4.0529281e-5)
    assert alone == pytest.approx(4.398703, rel=1e-6)


@given(st.floats(0.0, 1e20), st.floats(0.0, 100.0))
def test_rules_are_linear_in_the_work(amount: float, factor: float) -> None:
    for rule in (
        lambda x: flops_tdp_joules(x, tdp_watts=400.0, peak_flops_per_s=312e12),
        lambda x: tdp_time_joules(x, tdp_watts=400.0),
        lambda x: ecologits_joules(x, active_parameters=8e9, rule=RULES.ecologits),
    ):
        assert rule(factor * amount) == pytest.approx(factor * rule(amount), rel=1e-12, abs=1e-300)


def test_every_rule_is_explained_in_a_line() -> None:
    assert set(EXPLANATIONS) == {
        "flops_tdp",
        "output_flops_tdp",
        "tdp_time",
        "vidur_energy",
        "ecologits",
    }
    assert all(text and "\n" not in text for text in EXPLANATIONS.values())


def test_published_constants_carry_their_source() -> None:
    assert "2507.11417" in RULES.vidur_energy.source
    assert "0.9.3" in RULES.ecologits.source

"""Expert time: what step times made from a known law tell, and what they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from ep_rebalance.load.window import PHASES, LoadSample
from ep_rebalance.placement import Placement
from ep_rebalance.planning.cost_model import TokenCost
from ep_rebalance.planning.expert_time import (
    ASSUMED_ERROR,
    ASSUMED_FRACTION,
    LEAST_SNAPSHOTS,
    ExpertTime,
    ExpertTimeEstimate,
    as_known,
)
from ep_rebalance.planning.step_model import StepModel, Waiting, fitted
from ep_rebalance.planning.step_work import StepWork, mean_work

BOTH_A = np.array([True, True])
SECONDS, TOKENS = 0.05, 2e4
"""Of a usual step, and of its mean rank."""

Imbalance = Callable[[int, np.random.Generator], float]


def wavering(number: int, rng: np.random.Generator) -> float:
    return 1.3 + 0.1 * float(rng.normal())


def one_commit(number: int, rng: np.random.Generator) -> float:
    return 1.4 if number < 50 else 1.05


def steady(number: int, rng: np.random.Generator) -> float:
    return 1.3


@dataclass(frozen=True, kw_only=True)
class Law:
    """A server whose steps take a constant, the time of all tokens and that of the busiest rank's.

    fractions: of a step with the usual tokens and an imbalance of 1.3 that wait for the busiest rank, by
        phase.
    prefill: part of a step's tokens, from and to.
    tokens: of the mean rank over TOKENS, from and to.
    noise: standard deviation of a mean step.
    lasting: correlation of successive deviations.
    outliers: part of the snapshots that take 2 to 10 times as long.
    drift: part by which the last step is longer than the first.
    """

    fractions: tuple[float, float] = (0.3, 0.3)
    imbalance: Imbalance = wavering
    prefill: tuple[float, float] = (1.0, 1.0)
    tokens: tuple[float, float] = (0.6, 1.4)
    noise: float = 0.02
    lasting: float = 0.0
    outliers: float = 0.0
    drift: float = 0.0
    slopes_A: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slopes_A", np.array(self.fractions) / 1.3 / TOKENS * SECONDS)

    def serve(self, rng: np.random.Generator, count: int) -> list[StepWork]:
        works, deviation = [], 0.0
        for number in range(count):
            part, tokens = rng.uniform(*self.prefill), TOKENS * rng.uniform(*self.tokens)
            mean_A = tokens * np.array([part, 1.0 - part])
            busiest_A = mean_A * max(self.imbalance(number, rng), 1.0)
            rest = 1.0 - max(self.fractions)
            seconds = SECONDS * rest * (0.3 + 0.7 * tokens / TOKENS) + busiest_A @ self.slopes_A
            fresh = np.sqrt(1.0 - self.lasting**2) * rng.normal()
            deviation = self.lasting * deviation + fresh
            seconds *= (1.0 + self.noise * deviation) * (1.0 + self.drift * number / count)
            if rng.uniform() < self.outliers:
                seconds *= rng.uniform(2.0, 10.0)
            works.append(StepWork(seconds=seconds, mean_A=mean_A, busiest_A=busiest_A))
        return works

    def truth(self, work: StepWork) -> float:
        return float(work.busiest_A @ self.slopes_A / work.seconds)


def model_of(works: list[StepWork], phases_A: NDArray[np.bool_] = BOTH_A) -> StepModel:
    return fitted(works, np.arange(len(works), dtype=np.float64), phases_A)


def known(model: StepModel, work: StepWork) -> ExpertTime:
    return as_known(model.waiting(work))


def learned(law: Law, seed: int, count: int) -> tuple[ExpertTime, float]:
    """(what was learned, the truth) at a usual step, of now if there is a drift."""
    works = law.serve(np.random.default_rng(seed), count)
    usual = mean_work(replace(law, noise=0.0, outliers=0.0, drift=0.0).serve(
        np.random.default_rng(seed), count))  # fmt: skip
    newest = replace(usual, seconds=usual.seconds * (1.0 + law.drift))
    return known(model_of(works), newest), law.truth(usual)


@pytest.mark.parametrize(
    ("law", "count"),
    [
        pytest.param(Law(), 200, id="usual"),
        pytest.param(Law(fractions=(0.05, 0.05)), 200, id="little waits"),
        pytest.param(Law(fractions=(0.8, 0.8)), 200, id="most waits"),
        pytest.param(Law(), 24, id="few snapshots"),
        pytest.param(Law(tokens=(1.0, 1.0)), 200, id="the same tokens always"),
        pytest.param(Law(prefill=(0.0, 1.0)), 200, id="both phases"),
        pytest.param(Law(fractions=(0.6, 0.05), prefill=(0.0, 1.0)), 200, id="phases differ"),
        pytest.param(Law(prefill=(0.0, 0.0)), 200, id="decode alone"),
        pytest.param(Law(outliers=0.1), 200, id="outliers"),
        pytest.param(Law(drift=0.1), 200, id="drift"),
        pytest.param(Law(lasting=0.9), 200, id="deviations that last"),
        pytest.param(Law(imbalance=one_commit), 120, id="one commit"),
        pytest.param(Law(imbalance=one_commit, drift=0.1), 120, id="one commit, drift"),
        pytest.param(Law(noise=0.1), 200, id="much noise"),
    ],
)
def test_the_fraction_of_a_known_law_is_learned_within_its_error(law: Law, count: int) -> None:
    off, errors = [], []
    for seed in range(40):
        told, truth = learned(law, seed, count)
        assert told.source == "learned"
        off.append((told.fraction - truth) / told.standard_error)
        errors.append(told.standard_error)
    assert np.mean(np.abs(off) < 2) >= 0.9
    assert np.max(np.abs(off)) < 4
    assert abs(np.mean(off)) < 0.75
    assert np.mean(errors) < ASSUMED_ERROR / 2


def test_more_steps_and_less_noise_tell_more() -> None:
    errors = [
        learned(law, 0, count)[0].standard_error
        for law, count in ((Law(noise=0.05), 30), (Law(noise=0.05), 200), (Law(noise=0.01), 200))
    ]
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]


def test_noise_that_lasts_as_the_imbalance_does_widens_the_error() -> None:
    lasting, passing = (
        np.mean(
            [
                learned(Law(imbalance=one_commit, lasting=part), seed, 120)[0].standard_error
                for seed in range(10)
            ]
        )
        for part in (0.9, 0.0)
    )
    assert lasting > 1.3 * passing


@pytest.mark.parametrize(
    "law",
    [
        pytest.param(Law(imbalance=steady), id="the imbalance stays"),
        pytest.param(Law(imbalance=steady, tokens=(1.0, 1.0)), id="nothing varies"),
        pytest.param(Law(imbalance=steady, tokens=(1.0, 1.0), noise=0.0), id="all are the same"),
        pytest.param(Law(imbalance=lambda number, rng: 1.0), id="even"),
        pytest.param(Law(noise=1.0), id="noise is as long as steps are"),
    ],
)
def test_what_steps_do_not_tell_stays_as_assumed(law: Law) -> None:
    for seed in range(10):
        works = law.serve(np.random.default_rng(seed), 100)
        works = [work for work in works if work.seconds > 0]
        told = known(model_of(works), mean_work(works))
        assert told.source == "assumed"
        assert told.reason
        assert told.fraction == pytest.approx(ASSUMED_FRACTION, abs=0.25)
        assert told.standard_error > 0.15


@pytest.mark.parametrize("times", [30.0, 100.0, 1e4, 1e7])
@pytest.mark.parametrize("count", [16, 200])
def test_one_pause_does_not_change_what_is_assumed(count: int, times: float) -> None:
    """Such as that of an engine that compiles while requests wait."""
    works = Law(imbalance=steady).serve(np.random.default_rng(0), count)
    works[5] = replace(works[5], seconds=times * works[5].seconds)
    told = known(model_of(works), mean_work(works[-4:]))
    assert told.fraction == pytest.approx(ASSUMED_FRACTION, abs=0.2)
    assert told.least > 0.15


def test_what_cannot_be_is_not_believed() -> None:
    for fraction in (-0.5, 2.5):
        works = Law(noise=0.005).serve(np.random.default_rng(0), 200)
        slopes_A = np.full(2, fraction / 1.3 / TOKENS * SECONDS)
        works = [
            replace(
                work, seconds=3 * SECONDS + float((work.busiest_A - 1.3 * work.mean_A) @ slopes_A)
            )
            for work in works
        ]
        usual = replace(mean_work(works), seconds=SECONDS)
        told = known(model_of(works), usual)
        assert (told.fraction, told.source) == (ASSUMED_FRACTION, "assumed")
        assert "cannot be" in told.reason


def test_what_is_not_finite_is_not_believed() -> None:
    for waiting in (
        Waiting(np.nan, 0.1, 0.9),
        Waiting(0.5, np.inf, 0.9),
        Waiting(0.5, 0.1, np.nan),
    ):
        told = as_known(waiting)
        assert (told.fraction, told.standard_error) == (ASSUMED_FRACTION, ASSUMED_ERROR)
        assert "not finite" in told.reason


def test_slopes_that_are_surely_nothing_are_learned_as_nothing() -> None:
    told, _ = learned(Law(fractions=(0.0, 0.0)), 3, 200)
    assert told.source == "learned"
    assert told.fraction < 0.06
    assert told.bounds[0] == told.least == 0.0


def test_only_the_chosen_phase_counts() -> None:
    law = Law(fractions=(0.5, 0.2), prefill=(0.0, 1.0))
    works = law.serve(np.random.default_rng(0), 200)
    usual = mean_work(works)
    decode = known(model_of(works, np.array([False, True])), usual)
    truth = usual.busiest_A[1] * law.slopes_A[1] / usual.seconds
    assert abs(decode.fraction - truth) < 3 * decode.standard_error < 0.1


def test_the_fraction_is_larger_where_the_busiest_rank_has_more() -> None:
    works = Law().serve(np.random.default_rng(0), 200)
    usual = mean_work(works)
    model = model_of(works)
    even = replace(usual, busiest_A=usual.mean_A)
    assert known(model, even).fraction == pytest.approx(
        known(model, usual).fraction * even.busiest_A.sum() / usual.busiest_A.sum()
    )


def test_scales_of_time_and_cost_do_not_matter() -> None:
    works = Law(prefill=(0.0, 1.0)).serve(np.random.default_rng(0), 100)
    scaled = [
        StepWork(seconds=50 * w.seconds, mean_A=1e-9 * w.mean_A, busiest_A=1e-9 * w.busiest_A)
        for w in works
    ]
    one, other = (known(model_of(some), mean_work(some)) for some in (works, scaled))
    assert other.fraction == pytest.approx(one.fraction, abs=1e-9)
    assert other.standard_error == pytest.approx(one.standard_error, rel=1e-6)


# --- from snapshots

CURRENT = Placement.contiguous(num_layers=2, num_experts=8, num_ranks=2)


def snapshots(rng: np.random.Generator, count: int, generation: int = 0) -> list[LoadSample]:
    """A server of which half waits for the busiest rank, on load that wavers between experts."""
    made = []
    for _ in range(count):
        counts_ALE = np.zeros((len(PHASES), 2, 8), dtype=np.int64)
        counts_ALE[1] = rng.integers(1000, 20_000, (2, 8))
        ranks_LR = CURRENT.rank_load_LR(counts_ALE.sum(axis=0))
        seconds = 1e-6 * (ranks_LR.mean(axis=1).sum() + ranks_LR.max(axis=1).sum())
        made.append(
            LoadSample(
                counts_ALE=counts_ALE,
                steps=16,
                step_seconds=seconds * (1 + 0.01 * rng.normal()),
                generation=generation,
                placement=CURRENT,
                quotas_LP=CURRENT.even_quotas_LP(),
            )
        )
    return made


def estimate(setting: float | str = "auto") -> ExpertTimeEstimate:
    return ExpertTimeEstimate(setting, cost=TokenCost(), phases=PHASES)  # type: ignore[arg-type]


def test_snapshots_are_learned_from() -> None:
    asked = estimate()
    assert (asked.latest, asked.at(None).source) == (None, "assumed")
    asked.add(snapshots(np.random.default_rng(0), 60))
    assert asked.latest is not None
    told = asked.at(asked.latest)
    assert told.source == "learned"
    truth = asked.latest.busiest_A.sum() / (asked.latest.busiest_A + asked.latest.mean_A).sum()
    assert abs(told.fraction - truth) < 3 * told.standard_error < 0.1


def test_few_snapshots_are_not_learned_from() -> None:
    asked = estimate()
    asked.add(snapshots(np.random.default_rng(0), LEAST_SNAPSHOTS))
    told = asked.at(asked.latest)
    assert (told.fraction, told.standard_error) == (ASSUMED_FRACTION, ASSUMED_ERROR)
    assert told.reason
    asked.add(snapshots(np.random.default_rng(1), 1))
    assert asked.at(asked.latest).standard_error < ASSUMED_ERROR


def test_a_set_fraction_stays_whatever_steps_tell() -> None:
    asked = estimate(0.3)
    asked.add(snapshots(np.random.default_rng(0), 60))
    told = asked.at(asked.latest)
    assert (told.fraction, told.standard_error, told.source) == (0.3, 0.0, "set")
    assert told.least == 0.3


def test_steps_of_a_migration_are_left_out() -> None:
    plain, migrating = estimate(), estimate()
    rng = np.random.default_rng(0)
    first, second = snapshots(rng, 40), snapshots(rng, 40, generation=1)
    slow = [replace_seconds(some[0], 10.0) for some in (first, second)]
    for part in (first[1:], second[1:]):
        plain.add([replace_seconds(part[0], 0.0), *part])
    migrating.add([slow[0], *first[1:]])
    migrating.add([slow[1], *second[1:]])
    assert plain.latest is not None
    assert migrating.at(plain.latest).fraction == pytest.approx(
        plain.at(plain.latest).fraction, abs=0.02
    )


def replace_seconds(sample: LoadSample, seconds: float) -> LoadSample:
    return LoadSample(
        counts_ALE=sample.counts_ALE,
        steps=sample.steps,
        step_seconds=seconds,
        generation=sample.generation,
        placement=sample.placement,
        quotas_LP=sample.quotas_LP,
    )


def test_snapshots_without_a_number_spoil_nothing() -> None:
    clean, spoilt = estimate(), estimate()
    samples = snapshots(np.random.default_rng(0), 60)
    broken = LoadSample(
        counts_ALE=samples[5].counts_ALE,
        steps=16,
        step_seconds=0.1,
        placement=CURRENT,
        quotas_LP=np.full((2, 8), np.nan),
    )
    clean.add([*samples[:5], replace_seconds(samples[5], 0.0), *samples[6:]])
    spoilt.add([*samples[:5], broken, *samples[6:]])
    assert spoilt.at(spoilt.latest) == clean.at(clean.latest)


def test_snapshots_that_fit_no_model_cost_no_plan() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        asked = estimate()
        asked.add([wild_snapshot(rng) for _ in range(41)])
        told = asked.at(asked.latest)
        assert 0.0 <= told.least <= told.fraction <= 1.0


def wild_snapshot(rng: np.random.Generator) -> LoadSample:
    """Prefill and decode in one proportion, and tokens and times of any size."""
    decode_LE = np.full((2, 8), int(10 ** rng.uniform(0, 9)))
    decode_LE[:, 0] *= rng.integers(1, 5)
    return LoadSample(
        counts_ALE=np.stack([2 * decode_LE, decode_LE]),
        steps=1,
        step_seconds=float(10 ** rng.uniform(-6, 5)),
        placement=CURRENT,
        quotas_LP=CURRENT.even_quotas_LP(),
    )


def test_times_that_are_no_numbers_are_refused() -> None:
    [sample] = snapshots(np.random.default_rng(0), 1)
    for seconds in (np.nan, np.inf, -1.0):
        with pytest.raises(ValueError, match="a step cannot take"):
            replace_seconds(sample, seconds)


def test_the_same_snapshots_tell_the_same() -> None:
    samples = snapshots(np.random.default_rng(0), 80)
    one, other = estimate(), estimate()
    for begin in range(0, 80, 8):
        one.add(samples[begin : begin + 8])
        other.add(samples[begin : begin + 8])
        assert one.at(one.latest) == other.at(other.latest)

import math

import pytest

from pof.schedule import scale
from pof.settings import ScheduleSettings


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 0.1),
        (59 + 195 / 196, 0.1),
        (60, 0.02),
        (119.999, 0.02),
        (120, 0.004),
        (160, 0.0008),
        (199.999, 0.0008),
        (200, 0.00016),
        (249, 0.00016),
    ],
)
def test_the_published_steps(epoch, rate):
    assert 0.1 * scale(ScheduleSettings(), epoch) == pytest.approx(rate, rel=1e-12)


def test_steps_of_ones_own():
    schedule = ScheduleSettings(milestones=(2,), factor=0.5)
    assert [scale(schedule, e) for e in (0, 1.5, 2, 100)] == [1, 1, 0.5, 0.5]
    assert scale(ScheduleSettings(milestones=()), 100) == 1


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(0, 1.0), (2, 0.75), (3, 0.5), (4, 0.25), (6, 0.0), (7, 0.0), (1.5, 0.5 + math.sqrt(2) / 4)],
)
def test_cosine(epoch, factor):
    schedule = ScheduleSettings(kind="cosine", total_epochs=6)
    assert scale(schedule, epoch) == pytest.approx(factor, abs=1e-15)


def test_constant():
    assert {scale(ScheduleSettings(kind="constant"), e) for e in (0, 0.5, 60, 1000)} == {1.0}

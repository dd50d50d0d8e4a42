"""The learning rate as a function of the epoch."""

import math
from bisect import bisect_right

from pof.settings import ScheduleSettings


def scale(schedule: ScheduleSettings, epoch: float) -> float:
    """Factor on the initial learning rate after ``epoch`` epochs (a fraction within an epoch).

    Args:
        schedule: Which schedule.
        epoch: Epochs completed, at least 0; ``epoch = 60`` is the first step of the 61st.

    Returns:
        A factor in [0, 1].
    """
    if schedule.kind == "step":
        return schedule.factor ** bisect_right(schedule.milestones, epoch)
    if schedule.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(epoch / schedule.total_epochs, 1.0)))
    return 1.0

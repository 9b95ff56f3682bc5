"""A cluster's attained share of its peak, from one measured step."""

from dataclasses import replace

from hydratron.perf.hardware import Hardware
from hydratron.perf.recorder import StepTraces
from hydratron.perf.roofline import step_time
from hydratron.perf.step import StepConfig

_LEAST, _MOST = 0.02, 1.0


def calibrate(
    hardware: Hardware, config: StepConfig, traces: StepTraces, seconds: float
) -> Hardware:
    """Return `hardware` with the `product_efficiency` at which a traced step takes `seconds`.

    Matrix products are most of a step, so one figure of one GPU is enough for what the profile
    knows least; all other shares stay.

    Raises:
        ValueError: no share of the peak explains the time.
    """

    def predicted(efficiency: float) -> float:
        return step_time(config, replace(hardware, product_efficiency=efficiency), traces).total

    if not predicted(_MOST) <= seconds <= predicted(_LEAST):
        raise ValueError(
            f"a measured step of {seconds * 1e3:.1f} ms is outside what {hardware.name} can take:"
            f" {predicted(_MOST) * 1e3:.1f} to {predicted(_LEAST) * 1e3:.1f} ms"
        )
    low, high = _LEAST, _MOST
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(middle) > seconds else (low, middle)
    return replace(hardware, product_efficiency=round(high, 4))

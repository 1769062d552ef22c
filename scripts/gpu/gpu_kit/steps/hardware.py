"""What `ep-rebalance advise --measure` finds of this machine."""

import sys

from gpu_kit.figures import tell


def main() -> int:
    from ep_rebalance.diagnosis.measured_hardware import measure_hardware

    measured = measure_hardware()
    tell(device=measured.device, **measured.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())

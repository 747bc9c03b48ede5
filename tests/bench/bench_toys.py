"""Toy distributions that are known exactly, with networks trained from scratch on one core.

  moons                8 Gaussians to moons under three conditions: squared W2 by coupling and objective, next to C2OT's
  intrinsic-dimension  mixtures of intrinsic dimension 2 to 64 in 64 dimensions: quality with 1, 2 and 8 steps by
                       objective, and how well a linear probe predicts the targets from noise and caption

Metrics are means and standard deviations over the seeds. Prints JSON.

    python tests/bench/bench_toys.py [--parts moons,intrinsic-dimension] [--seeds 3] [--plot DIMENSION.png]
"""

import argparse
import json
import os
import time
from pathlib import Path

from machine import machine

PARTS = ("moons", "intrinsic-dimension")
# Networks this small lose time on threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    """Run the parts in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--moons-steps", type=int, default=2000, help="training steps of each network")
    parser.add_argument("--dimension-steps", type=int, default=1000, help="training steps of each network")
    parser.add_argument("--dims", default="2,4,8,16,32,64", help="intrinsic dimensions")
    parser.add_argument("--plot", type=Path, help="plot quality by intrinsic dimension into this PNG file")
    options = parser.parse_args()

    import intrinsic_dimension
    import intrinsic_dimension_plot
    import moons
    import torch

    torch.set_num_threads(1)
    dims = [int(k) for k in options.dims.split(",")]
    measure = {
        "moons": lambda: moons.table(options.seeds, options.moons_steps),
        "intrinsic-dimension": lambda: intrinsic_dimension.table(dims, options.seeds, options.dimension_steps),
    }
    report: dict[str, object] = {"machine": machine(), "seeds": options.seeds}
    report |= {"moons_steps": options.moons_steps, "dimension_steps": options.dimension_steps}
    for part in options.parts.split(","):
        began = time.monotonic()
        report[part] = measure[part]()
        report[f"{part}_seconds"] = round(time.monotonic() - began)
    if options.plot and "intrinsic-dimension" in report:
        intrinsic_dimension_plot.plot(report["intrinsic-dimension"], options.plot)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

"""Toys of known law, each trained from scratch on one core.

  moons   8 Gaussians to moons under three conditions: squared W2 by coupling and objective, beside C2OT's figures
  dial    mixtures of intrinsic dimension 2 to 64 in 64 dimensions: quality with 1, 2 and 8 steps by objective, and how
          well the search's targets can be told from what the network is told

Figures are means and standard deviations over the seeds. Prints JSON.

    python tests/bench/bench_toys.py [--parts moons,dial] [--seeds 3] [--plot DIAL.png]
"""

import argparse
import json
import os
import time
from pathlib import Path

from machine import machine

PARTS = ("moons", "dial")
# Networks so small lose time on threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    """Run the parts in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--moons-steps", type=int, default=2000)
    parser.add_argument("--set-steps", type=int, default=1000)
    parser.add_argument("--dims", default="2,4,8,16,32,64", help="intrinsic dimensions of the dial")
    parser.add_argument("--plot", type=Path, help="draw the dial into this PNG file")
    given = parser.parse_args()

    import dial
    import dial_plot
    import moons
    import torch

    torch.set_num_threads(1)
    dims = [int(k) for k in given.dims.split(",")]
    measure = {
        "moons": lambda: moons.table(given.seeds, given.moons_steps),
        "dial": lambda: dial.table(dims, given.seeds, given.dial_steps),
    }
    found: dict[str, object] = {"machine": machine(), "seeds": given.seeds}
    found |= {"moons_steps": given.moons_steps, "dial_steps": given.dial_steps}
    for part in given.parts.split(","):
        began = time.monotonic()
        found[part] = measure[part]()
        found[f"{part}_seconds"] = round(time.monotonic() - began)
    if given.plot and "dial" in found:
        dial_plot.plot(found["dial"], given.plot)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

"""What the index is worth: quality floors of the geometries, balance, and the speed of its search.

  floors  MNIST, with a perfect network (the retrieved rows themselves): Frechet distance and coverage of the test set
          in a classifier's features, for every geometry without and with balance; and of training rows for comparison
  emoji   noto-emoji, where captions are unique: shares of draws before and after balance
  types   vectors in float16 and float32 by type of index, each with the fewest probes that reach a recall of 0.95
  faiss   LanceDB against faiss-cpu's IVF: the same vectors, the same number of partitions and threads, equal recall
  growth  10k, 100k and 1M synthetic rows x 256: build time, bytes, recall, queries per second

Rates are of batches of 1,024 queries, two in flight, by the training law; rivals take turns, medians over the rounds.
What the parts share (autoencoders, tables) is made in WORK once. Prints JSON.

    python tests/bench/bench_index.py --data DATA --work WORK [--parts floors,emoji,types,faiss,growth]
"""

import argparse
import json
import os
from pathlib import Path

from machine import machine

PARTS = ("floors", "emoji", "types", "faiss", "growth")
# Lance leaves two cores to others, which are all that some machines have.
os.environ.setdefault("LANCE_CPU_THREADS", str(os.cpu_count()))


def main() -> None:
    """Run the parts in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds mnist/ and noto-emoji/")
    parser.add_argument("--work", type=Path, required=True, help="for models and tables; about 3 GB for growth")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rows", default="10000,100000,1000000", help="of growth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--balance-time-limit", type=float, default=300)
    given = parser.parse_args()

    import floors
    import search_speed

    given.work.mkdir(parents=True, exist_ok=True)
    measure = {
        "floors": lambda: floors.floors(given.data, given.work, given.balance_time_limit),
        "emoji": lambda: floors.emoji(given.data, given.work, given.balance_time_limit),
        "types": lambda: search_speed.types(given.data, given.work, given.rounds),
        "faiss": lambda: search_speed.against_faiss(given.data, given.work, given.rounds),
        "growth": lambda: search_speed.growth(given.work, [int(n) for n in given.rows.split(",")], given.rounds),
    }
    print(json.dumps({"machine": machine()} | {part: measure[part]() for part in given.parts.split(",")}, indent=2))


if __name__ == "__main__":
    main()

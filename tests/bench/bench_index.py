"""Measure the index: how good perfect use of each geometry would be, what balance changes, how fast search is.

  references  MNIST, with a perfect network (the retrieved rows themselves): Frechet distance and coverage of the test
              set in a classifier's features, for each geometry without and with balance, and for training rows
  emoji       noto-emoji, whose captions are unique: hubness before and after balance
  types       vectors in float16 and float32 by index type, each with the fewest nprobes that reach a recall of 0.95
  faiss       LanceDB against faiss-cpu's IVF: the same vectors, as many partitions and threads, equal recall
  growth      10k, 100k and 1M synthetic rows x 256: build time, bytes, recall, queries per second

Rates are of batches of 1,024 queries, two in flight, from the query distribution of training; competitors take turns,
and the median over rounds counts. Autoencoders and tables that parts share are made in WORK once. Prints JSON.

    python tests/bench/bench_index.py --data DATA --work WORK [--parts references,emoji,types,faiss,growth]
"""

import argparse
import json
import os
from pathlib import Path

from machine import machine

PARTS = ("references", "emoji", "types", "faiss", "growth")
# Lance leaves two cores to other processes, and some machines have no more.
os.environ.setdefault("LANCE_CPU_THREADS", str(os.cpu_count()))


def main() -> None:
    """Run the parts in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds mnist/ and noto-emoji/")
    parser.add_argument("--work", type=Path, required=True, help="for models and tables; about 3 GB for growth")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rows", default="10000,100000,1000000", help="table sizes of growth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--balance-time-limit", type=float, default=300, help="seconds")
    args = parser.parse_args()

    import references
    import search_speed

    args.work.mkdir(parents=True, exist_ok=True)
    measure = {
        "references": lambda: references.perfect_network(args.data, args.work, args.balance_time_limit),
        "emoji": lambda: references.emoji(args.data, args.work, args.balance_time_limit),
        "types": lambda: search_speed.types(args.data, args.work, args.rounds),
        "faiss": lambda: search_speed.against_faiss(args.data, args.work, args.rounds),
        "growth": lambda: search_speed.growth(args.work, [int(n) for n in args.rows.split(",")], args.rounds),
    }
    print(json.dumps({"machine": machine()} | {part: measure[part]() for part in args.parts.split(",")}, indent=2))


if __name__ == "__main__":
    main()

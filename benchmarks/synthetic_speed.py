"""Seconds to draw synthetic faces, in flat memory, on one core.

python benchmarks/synthetic_speed.py                      # 50 000 faces at 32 px
python benchmarks/synthetic_speed.py --n 2000 --size 224
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from synthetic_faces import iterate_faces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=32, help="image width and height in pixels")
    parser.add_argument("--chunk", type=int, default=256)
    arguments = parser.parse_args()

    begin = time.perf_counter(), time.process_time()
    drawn = sum(len(block) for block in iterate_faces(arguments.n, arguments.size, chunk=arguments.chunk))
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{drawn:,} faces at {arguments.size} px: {wall:.1f} s ({cpu:.1f} s of processor), peak memory {peak:.0f} MB")


if __name__ == "__main__":
    main()

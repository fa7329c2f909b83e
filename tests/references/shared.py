"""What the reference scripts share.

Their command line, and how they report. They know nothing of this project.
"""

import argparse
import json
import sys
import time


def arguments():
    """The same for every trainer: DATA holds train/<class>/… and test/<class>/…"""
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    for name, kind in (("epochs", int), ("seed", int), ("batch", int), ("size", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument(
        "--plain", action="store_true", help="only resize and flip, as the other side does"
    )
    return parser.parse_args()


class Clock:
    """Counts the pictures and seconds of training, and each epoch's top-1.

    Says it all as one line of JSON.
    """

    def __init__(self):
        self.begin, self.pictures, self.training, self.top1 = time.perf_counter(), 0, 0.0, []

    def epoch(self, pictures, seconds, top1):
        self.pictures += pictures
        self.training += seconds
        self.top1.append(top1)
        print(
            f"epoch {len(self.top1)}: top-1 {top1:.2%}, {pictures / seconds:.0f} pictures/s",
            flush=True,
        )

    def report(self):
        print(
            json.dumps(
                {
                    "top1": self.top1[-1],
                    "best_top1": max(self.top1),
                    "seconds": time.perf_counter() - self.begin,
                    "images_per_second": self.pictures / self.training,
                }
            ),
            flush=True,
        )


def serve(work):
    """Do one round of `work` for each line of standard input, and answer with its seconds."""
    for _ in sys.stdin:
        begin = time.perf_counter()
        work()
        print(time.perf_counter() - begin, flush=True)

"""The parts around train.py. Import it before torch: OpenMP reads its environment once."""

import os
import sys

sys.excepthook = lambda kind, *rest: (
    os._exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
)

# Idle OpenMP threads spin for so many turns before they sleep: with fewer they wake slowly, and the default of endless turns made
# training up to 30 times slower where anything else wanted its cores
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

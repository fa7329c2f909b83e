"""The parts around train.py. Import it before torch: OpenMP reads its environment once."""
import os

# Idle OpenMP threads spin; where anything else wants the cores, their default of endless turns made training 30 times slower
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

"""The parts around train.py. What a student reads is here; utils/plumbing holds the rest."""

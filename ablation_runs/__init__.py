"""Ablation studies: the studies as data (studies.py), run.py, the statistics (results.py), report.py."""

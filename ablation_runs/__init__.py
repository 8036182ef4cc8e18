"""Ablation studies: data (studies.py), runner (run.py), statistics (results.py) and report (report.py)."""

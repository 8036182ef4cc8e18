"""Datasets: finding them (`layouts`, `index`) and reading them (`images`, `augment`, `packed`). No torch."""

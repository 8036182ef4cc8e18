"""Datasets on disk: what is there (`layouts`, `index`), how it is read (`images`, `packed`). No torch."""

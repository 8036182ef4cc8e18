"""Find datasets on disk (`layouts`, `index`) and read them (`images`, `augment`, `packed`), without torch."""

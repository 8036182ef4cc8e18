"""From a checkpoint or a run directory to a picture: one command each."""

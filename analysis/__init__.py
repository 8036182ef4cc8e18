"""From a checkpoint or a run to predictions, scores, a picture, a page or an export."""

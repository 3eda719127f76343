"""From raw text to token files, and from token files to batches."""

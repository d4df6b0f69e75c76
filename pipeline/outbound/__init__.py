"""The outbound belt: every step's numbers, to the journal and the loggers; checkpoints to the disk."""

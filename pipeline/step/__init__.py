"""One optimizer step, and what keeps it clean: the objective, the guard, metrics; evaluation too."""

"""What watches a run: the clock of its stages, the convoy, garbage, threads that hang."""

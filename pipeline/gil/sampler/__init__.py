"""What runs in the sampler's own process; standard library only, and light to import."""

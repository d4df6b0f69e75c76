"""The sampler seen from the measured process: started, calibrated, tested."""

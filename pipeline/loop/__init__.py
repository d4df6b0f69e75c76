"""The loop: an inbound belt, a step, an outbound belt."""

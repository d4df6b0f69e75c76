"""The inbound belt: a source's batches on the device, from wherever they are made best."""

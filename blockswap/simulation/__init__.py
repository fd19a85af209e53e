"""A device with a virtual clock and a race detector, for tests, demo and simulate."""

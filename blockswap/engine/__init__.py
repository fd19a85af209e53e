"""Blocks run: copies in order, tensors bound to slots and masters, one session."""

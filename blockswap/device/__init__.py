"""What a device offers: streams, events, memory, a worker; its errors in our words."""

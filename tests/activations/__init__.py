"""Forwards of the real wrapper, measured without running them."""

"""The true weights in host memory: pages, slabs, staging."""

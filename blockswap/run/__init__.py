"""One transformer, run after run: plan, watch, plan again, report."""

"""The real front ends, in a browser, with our nodes and our web folder, and no ComfyUI behind them."""

"""Where block swapping meets ComfyUI-WanVideoWrapper."""

"""What ranks counted: by snapshot, in a window, over days, on disk."""

"""One program each: what it found goes to `gpu_kit.figures`, whether it is right to its exit status."""

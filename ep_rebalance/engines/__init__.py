"""One folder per serving engine; nothing outside it imports that engine."""

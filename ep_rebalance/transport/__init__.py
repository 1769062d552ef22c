"""Expert weights from rank to rank, into staging memory, in bounded rounds."""

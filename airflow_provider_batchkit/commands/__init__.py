"""The command line, with which a person looks at batches and decides about them."""

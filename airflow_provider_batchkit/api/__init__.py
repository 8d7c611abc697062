"""The Message Batches API: its calls and their errors, looks at batches, and the result stream."""

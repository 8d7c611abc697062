"""A row and a template become a request: parameters, digest and ``custom_id``. Requests become upload bodies on disk, each one once."""

"""Everything on the request path."""

"""A model in the browser (extra `web`)."""

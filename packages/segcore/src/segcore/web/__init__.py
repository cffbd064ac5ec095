"""The page to play with (extra `web`)."""

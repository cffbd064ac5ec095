"""The tests that every method must pass; a method's own test files call them."""

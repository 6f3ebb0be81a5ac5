"""A toy checkpoint and made-up songs, for the demo and the tests."""

"""One frozen model cut in two: its paths, its cache, the drafter beside it, and where they come from."""

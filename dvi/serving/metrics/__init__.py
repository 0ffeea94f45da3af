"""What a server counts, and how it is shown: Prometheus, a page, a terminal."""

"""What is run: training beside serving, warm-up, a learning server, and what is seen of them."""

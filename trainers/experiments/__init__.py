"""Questions about learning, asked of real runs: does it help, what does it forget, which settings pay."""

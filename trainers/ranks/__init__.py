"""Several processes of one job: who does what, and what they tell each other."""

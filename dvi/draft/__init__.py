"""What is proposed and how much of it: length policies, companions, and what a round costs."""

"""A drafter learns: experience, losses, steps, versions."""

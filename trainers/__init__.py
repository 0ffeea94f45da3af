"""Training beside serving: the only package that knows both."""

from trainers.learning.online import OnlineTrainer

__all__ = ["OnlineTrainer"]

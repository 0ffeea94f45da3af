"""Training beside serving: the only package that knows both."""

from trainers.online import OnlineTrainer

__all__ = ["OnlineTrainer"]

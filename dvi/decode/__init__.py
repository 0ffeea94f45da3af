"""The round: draft, verify, commit; and the speculator that runs it."""

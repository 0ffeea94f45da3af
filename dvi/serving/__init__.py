"""Serving: requests in, tokens out, round by round, with a drafter that may learn meanwhile.

`Engine` decodes and `Scheduler` decides who; `EngineLoop` runs them on a thread of their own; `http_api` is the door.
Training is seen only as a `dvi.learner.Learner` that is passed in.
"""

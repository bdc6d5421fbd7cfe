"""Thin plumbing shared by the scripts: data, models, log-probs, generation, runs, measurements. No algorithm in it."""


class UserError(Exception):
    """A mistake in the user's input. Scripts print its one line and exit with status 2."""
